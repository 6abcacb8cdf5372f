"""An S3 server, moto's, of which a share of the calls fails: a 500, a 503, or a connection that closes.

    python tests/failing_s3.py [--port 0] [--rate 0.05] [--seed 0]

Half of the closed connections close after the call was carried out, so that a client cannot know whether it was. Prints
its URL when it answers and, when its stdin closes, what it did as JSON: {"calls": .., "500": .., "503": ..,
"before": .., "after": ..}. The fault of a call follows from the seed and the call's number.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

FAULTS = ("500", "503", "before", "after")


class Failing:
    """A WSGI application in front of another. `rate` of its calls, 0 to 1, fail; those for a new bucket never do."""

    def __init__(self, inside: Callable[..., Iterable[bytes]], rate: float, seed: int):
        self.inside, self.rate = inside, rate
        self.draw = random.Random(seed)
        self.lock = threading.Lock()
        self.conditional = threading.Lock()  # S3's If-None-Match is atomic, moto's is not
        self.did: Counter[str] = Counter(dict.fromkeys(("calls", *FAULTS), 0))

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            self.did["calls"] += 1
            fault = self.draw.choice(FAULTS) if self.draw.random() < self.rate else ""
            if environ["PATH_INFO"].strip("/").count("/") == 0 and environ["REQUEST_METHOD"] == "PUT":
                fault = ""
            self.did.update([fault] if fault else [])
        if fault in ("500", "503"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            code, status = {"500": ("InternalError", "500 Error"), "503": ("SlowDown", "503 Slow Down")}[fault]
            start_response(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()]
        if fault != "before":
            with self.conditional:
                answer = list(self.inside(environ, start_response))
            if not fault:
                return answer
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("on purpose")


@contextmanager
def failing_s3(rate: float = 0.05, seed: int = 0) -> Iterator[tuple[str, Counter[str]]]:
    """Such a server in a process of its own: its URL, and a counter that holds what it did once it has ended."""
    command = [sys.executable, __file__, "--rate", str(rate), "--seed", str(seed)]
    did: Counter[str] = Counter()
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip(), did
        did.update(json.loads(server.communicate(timeout=10)[0]))
    finally:
        server.kill()
        server.wait()


def main() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="to listen on, 0 for any [0]")
    parser.add_argument("--rate", type=float, default=0.05, help="share of the calls that fail, 0 to 1 [0.05]")
    parser.add_argument("--seed", type=int, default=0, help="of the faults [0]")
    options = parser.parse_args()

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

    failing = Failing(DomainDispatcherApplication(create_backend_app), options.rate, options.seed)
    server = make_server("127.0.0.1", options.port, failing, threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    print(json.dumps(failing.did), flush=True)


if __name__ == "__main__":
    main()

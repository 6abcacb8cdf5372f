"""Calls of a library that may end its process, in a child process: a crash costs one call, not the run.

A damaged Parquet footer makes Arrow end the process, and a damaged picture may do so in a decoder. Python cannot catch that.
The child starts once, reads calls from its standard input as JSON and frames of bytes, and ends with its parent.
"""

import importlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from functools import lru_cache
from typing import Any, BinaryIO

CALL_SECONDS = 300.0  # longest time that one call may take


class ProcessDied(RuntimeError):
    """The child process ended, or was ended because it was late; the message says which."""


@lru_cache
def isolated(name: str, seconds: float = CALL_SECONDS) -> "IsolatedFunction":
    """The `IsolatedFunction` of this name: one child process for all calls of this process."""
    return IsolatedFunction(name, seconds)


class IsolatedFunction:
    """A function of a module, called in a child process, one call at a time; any thread may call.

    Args:
        name: "module:function". The function takes bytes and what JSON can hold, and returns what JSON can hold.
    """

    def __init__(self, name: str, seconds: float = CALL_SECONDS) -> None:
        self.name, self.seconds = name, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, *arguments: Any, data: bytes | memoryview = b"") -> Any:
        """The function's result.

        Raises:
            ProcessDied: the call ended the child process, or took longer than it may; the next call starts another.
            ValueError: the function raised an error; this is its message.
        """
        with self._lock:
            if self._process is None:
                self._process = self._start()
            try:
                answer = self._exchange(self._process, json.dumps(arguments).encode(), data)
            except BaseException:
                self._end()
                raise
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Ends the child process; another call starts another."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", __name__, self.name]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        weakref.finalize(self, process.kill)
        return process

    def _exchange(self, process: subprocess.Popen[bytes], arguments: bytes, data: bytes | memoryview) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        try:
            for frame in (arguments, data):
                process.stdin.write(len(frame).to_bytes(8, "little"))
                process.stdin.write(frame)
            process.stdin.flush()
        except BrokenPipeError:
            raise self._death(process) from None
        deadline = time.monotonic() + self.seconds
        answers = select.poll()  # `select.select` takes no descriptor above 1023
        answers.register(process.stdout, select.POLLIN)
        received = bytearray()
        while len(received) < 8 or len(received) < 8 + int.from_bytes(received[:8], "little"):
            if not answers.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise ProcessDied(f"took longer than {self.seconds:,.0f} s")
            chunk = os.read(process.stdout.fileno(), 2**20)
            if not chunk:
                raise self._death(process)
            received += chunk
        answer: dict[str, Any] = json.loads(received[8:])
        return answer

    def _death(self, process: subprocess.Popen[bytes]) -> ProcessDied:
        code = process.wait()
        return ProcessDied(f"ended its process ({f'signal {-code}' if code < 0 else f'exit code {code}'})")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _frame(stream: BinaryIO) -> bytes | None:
    length = stream.read(8)
    return stream.read(int.from_bytes(length, "little")) if len(length) == 8 else None


def _serve(name: str) -> None:
    """The child: answers calls until its parent closes the stream or is gone."""
    module, _, function = name.partition(":")
    call = getattr(importlib.import_module(module), function)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    while (arguments := _frame(source)) is not None and (data := _frame(source)) is not None:
        try:
            answer = {"result": call(*json.loads(arguments), **({"data": data} if data else {}))}
        except Exception as error:
            answer = {"error": f"{error}" or type(error).__name__}
        text = json.dumps(answer).encode()
        sink.write(len(text).to_bytes(8, "little") + text)
        sink.flush()


if __name__ == "__main__":
    _serve(sys.argv[1])

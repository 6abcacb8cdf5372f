"""Fixtures of every room. The environment stands before Ray or transformers are imported."""

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

os.environ["RAY_AUTH_MODE"] = "disabled"  # clusters of the tests listen on loopback and live for minutes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # Ray's workers take it over; threads beyond the cores only wait
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# Two test processes that start a cluster at once need more than Ray's 30 s.
os.environ.update(RAY_raylet_start_wait_time_s="120")

import pytest

DEMO_FILES = ("tests/e2e/test_demo.py", "tests/e2e/test_documents.py")  # their tests use the fixture `ran`


def pytest_configure():
    os.environ["MOVA_CACHE"] = tempfile.mkdtemp(prefix="mova-cache-")  # of the workers of Ray, too


@pytest.hookimpl(optionalhook=True)  # unknown without xdist
def pytest_xdist_make_scheduler(config, log):
    """With `--dist loadfile` a process gets whole files, and both files that read the demo's folder.

    `--dist loadgroup`, meant for this, groups nothing: xdist 3.8 writes the group into `Item._nodeid`, which pytest 9.2 does
    not read.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class WholeFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "demo" if path in DEMO_FILES else path

    return WholeFiles(config, log)


def pytest_unconfigure():
    shutil.rmtree(os.environ["MOVA_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def ray_cluster():
    """One cluster on this machine for all tests that need Ray."""
    from cluster.session import ray_session

    with ray_session(num_cpus=4) as resources:
        yield resources


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Mounts a real disk of a size that `mount` understands ("300k") and returns its folder; skips where it may not."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", disk], check=True)  # actors may still hold it open


class _Handler(SimpleHTTPRequestHandler):
    """Files and ranges of them; counts the GETs of each path and fails as many of them as it was told to."""

    def do_GET(self) -> None:
        server = self.server.told  # type: ignore[attr-defined]
        with server.lock:
            server.gets[self.path] += 1
            server.failures[self.path] -= 1
            failing = server.failures[self.path] >= 0
        if failing:
            self.send_error(503)
        elif (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            with open(self.translate_path(self.path), "rb") as file:
                content = file.read()
            part = content[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server of a folder: its `folder`, its `url`, the `gets` of each path, and how many of them are `failures`."""
    folder = tmp_path / "web"
    folder.mkdir()
    monkeypatch.setenv("MOVA_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        told = SimpleNamespace(folder=folder, url=url, gets=Counter(), failures=Counter(), lock=threading.Lock())
        server.told = told  # type: ignore[attr-defined]
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True)
        thread.start()
        yield told
        server.shutdown()
        thread.join()

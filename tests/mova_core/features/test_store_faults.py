"""Every system call of the store fails once, or from then on: nothing is lost, nothing sound is called damaged.

The file is also a program, for a long run: `python -m tests.mova_core.features.test_store_faults <cases> <seed>`.
"""

import builtins
import errno
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from tenacity import wait_none

from mova_core.experts import Features
from mova_core.features import FeatureStore, StoreError
from mova_core.features.storage import mapped
from mova_core.io import filesystem as io_filesystem

KEYS = [f"{number:064x}" for number in range(12)]
STORED = KEYS[:8]
SIDE = 64  # with 16 channels a feature takes 256 KiB: it is mapped
ERRNOS = (
    *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY),
)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # flushing to a disk takes most of the time
PATH_CALLS = ("open", "link", "replace", "rename", "scandir", "listdir", "stat", "lstat", "unlink", "remove", "mkdir")
DESCRIPTOR_CALLS = ("fsync", "preadv", "posix_fadvise", "fstat")


def feature(key: str) -> Features:
    return Features(torch.full((SIDE * SIDE, 16), float(int(key, 16))), (SIDE, SIDE))


def description() -> dict[str, Any]:
    return {"expert": "clip", "weights": "one", "dtype": "float32"}


class Faults:
    """Counts the system calls on files below a folder, and fails those chosen with an errno.

    Args:
        folder: of the store.
        number: the errno.
        first: number of the first call that fails, from 0; None: none fails.
        lasting: all later calls fail too.
    """

    def __init__(self, folder: str, number: int = 0, first: int | None = None, lasting: bool = False):
        self.folder, self.number, self.first, self.lasting = folder, number, first, lasting
        self.calls, self.failed = 0, ""
        self._lock = threading.Lock()

    def check(self, name: str, path: object) -> None:
        """Raises OSError if this call is to fail."""
        if not isinstance(path, int) and not os.fspath(path).startswith(self.folder):  # type: ignore[call-overload]
            return
        with self._lock:
            call, self.calls = self.calls, self.calls + 1
            if self.first is None or call < self.first or (call > self.first and not self.lasting):
                return
            self.failed = self.failed or name
        raise OSError(self.number, os.strerror(self.number), str(path))

    @contextmanager
    def active(self) -> Iterator[None]:
        """The calls are counted and fail within the block."""

        def failing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(path: Any = ".", *arguments: Any, **options: Any) -> Any:
                self.check(name, path)
                return call(path, *arguments, **options)

            return wrapper

        def failing_open(path: Any, *arguments: Any, **options: Any) -> Any:
            self.check("open", path)
            file = real_open(path, *arguments, **options)
            return _File(file, self, str(path)) if str(path).startswith(self.folder) else file

        real_open, patches = builtins.open, [mock.patch.object(mapped, "_Mapping", failing("mmap", mapped._Mapping))]
        patches += [
            mock.patch.object(os, name, failing(name, getattr(os, name))) for name in (*PATH_CALLS, *DESCRIPTOR_CALLS)
        ]
        with mock.patch.object(builtins, "open", failing_open):
            for patch in patches:
                patch.start()
            try:
                yield
            finally:
                for patch in patches:
                    patch.stop()


class RemoteFaults(Faults):
    """The same for requests to a server, which here is fsspec's memory. Every other write that fails is carried out."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """The requests are counted and fail within the block."""

        def failing(name: str) -> Callable[..., Any]:
            call = getattr(MemoryFileSystem, name)

            def wrapper(filesystem: Any, path: str, *arguments: Any, **options: Any) -> Any:
                reply_is_lost = name in ("pipe_file", "rm_file") and self.calls % 2 == 1
                result = call(filesystem, path, *arguments, **options) if reply_is_lost else None
                self.check(name, filesystem._strip_protocol(path))
                return result if reply_is_lost else call(filesystem, path, *arguments, **options)

            return wrapper

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(io_filesystem, "WAIT", wait_none()))
            for name in ("ls", "info", "cat_file", "pipe_file", "rm_file", "modified"):
                patches.enter_context(mock.patch.object(MemoryFileSystem, name, failing(name)))
            yield


class _File:
    """An open file whose reads and writes are counted too."""

    def __init__(self, file: Any, faults: Faults, path: str):
        self._file, self._faults, self._path = file, faults, path

    def __getattr__(self, name: str) -> Any:
        if name in ("read", "write", "readinto"):
            self._faults.check(name, self._path)
        return getattr(self._file, name)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def keys_read(store: FeatureStore, keys: list[str]) -> list[str]:
    read = store.partition("clip").read(keys)
    return [key for key, found in zip(keys, read, strict=True) if torch.equal(found.tokens, feature(key).tokens)]


def write(store: FeatureStore) -> list[str]:
    partition = store.partition("clip")
    return [
        row["key"] for row in partition.write(partition.shard_id(KEYS[8:]), {key: feature(key) for key in KEYS[8:]})
    ]


def quarantine(store: FeatureStore) -> int:
    row = {"image": "b.png", "sha256": None, "reason": "text", "expert": "clip"}
    if len(store.quarantined()) < 2:  # as a retry after an unclear failure does
        store.quarantine([row])
    return len(store.quarantined())


def release(store: FeatureStore) -> int:
    store.release()
    return len(store.quarantined())


def export(store: FeatureStore) -> list[str]:
    other = FeatureStore(f"{store.location}-copy", create=True)
    store.export(other)
    return keys_read(other, STORED)


def open_anew(store: FeatureStore) -> Any:
    opened = FeatureStore(store.location)
    return opened.experts(), opened.partition("clip").stat()["features"]


ACTS: dict[str, Callable[[FeatureStore], Any]] = {
    "open": open_anew,
    "create": lambda store: FeatureStore(f"{store.location}-new", create=True).experts(),
    "add expert": lambda store: store.add_expert({**description(), "expert": "sam"}).stat()["features"],
    "missing": lambda store: store.missing(KEYS, "clip"),
    "read": lambda store: keys_read(store, STORED),
    "read anew": lambda store: keys_read(FeatureStore(store.location), STORED),
    "write": write,
    "snapshot": lambda store: bool(store.partition("clip").snapshot()),
    "stat": lambda store: store.stat()["experts"]["clip"]["features"],
    "quarantine": quarantine,
    "release": release,
    "verify": lambda store: list(store.verify()),
    "gc": lambda store: store.gc(-60) and keys_read(store, STORED),
    "export": export,
}


def make_template(folder: Path) -> Path:
    """A store with two shards in a snapshot and two that are not, a quarantined image and what a dead writer left."""
    store = FeatureStore(folder / "template", create=True)
    partition = store.add_expert(description())
    for start in range(0, 8, 2):
        keys = STORED[start : start + 2]
        partition.write(partition.shard_id(keys), {key: feature(key) for key in keys})
        if start == 2:
            partition.snapshot()
    store.quarantine([{"image": "a.png", "sha256": None, "reason": "0 bytes", "expert": "clip"}])
    (Path(partition.location) / "shards" / f"{'f' * 32}-000000000000.safetensors").write_bytes(b"never committed")
    return folder / "template"


def run_case(template: Path, act: str, number: int, place: float, lasting: bool, warm: bool, remote: bool) -> str:
    """One fault. Returns the name of the call that failed.

    Args:
        template: a store; copied.
        act: in `ACTS`.
        number: the errno.
        place: which call fails, 0 to 1 of all that the act makes.
        lasting: all later calls fail too, until the act has ended.
        warm: the store was read before.
        remote: it is on a server.
    """

    def opened(folder: str) -> FeatureStore:
        store = FeatureStore(folder)
        if warm:
            store.partition("clip").read(STORED)
        return store

    with tempfile.TemporaryDirectory(dir=template.parent) as scratch, ExitStack() as cleanup:
        kind = RemoteFaults if remote else Faults
        parents = [f"{scratch}/{name}" for name in ("sound", "faulty")]
        sound, folder = (f"memory:/{parent}/store" if remote else f"{parent}/store" for parent in parents)
        for copy in (sound, folder):
            if remote:
                MemoryFileSystem().put(f"{template}/", f"{copy}/", recursive=True)
            else:
                shutil.copytree(template, copy)
        if remote:
            cleanup.callback(MemoryFileSystem().rm, scratch, recursive=True)
        counter = kind(parents[0])
        store = opened(sound)
        with counter.active():
            expected = ACTS[act](store)
        store = opened(folder)
        faults = kind(parents[1], number, int(place * counter.calls), lasting)
        with _log() as records:
            try:
                with faults.active():
                    found = ACTS[act](store)
                if act != "verify":
                    assert found == expected, f"{found} instead of {expected}"
            except StoreError as error:
                assert "\n" not in str(error) and "damaged" not in str(error), error
                assert os.strerror(number) in str(error), f"the reason is not named: {error}"
        assert not any("damaged" in record for record in records), records
        # The same objects, and new ones, have all that was committed; the same command again does the rest.
        assert store.missing(STORED, "clip") == [] and keys_read(store, STORED) == STORED
        assert ACTS[act](store) == expected, "again"
        after = FeatureStore(folder)
        stored = KEYS if act == "write" else STORED
        assert list(after.verify()) == [] and keys_read(after, stored) == stored
        after.gc(-60)
        assert keys_read(FeatureStore(folder), stored) == stored
        assert not list(Path(parents[1], "store").rglob("*.tmp")), "gc leaves no temporary file"
    return faults.failed


@contextmanager
def _log() -> Iterator[list[str]]:
    """The messages that the store logs within the block."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mova_core").addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger("mova_core").removeHandler(handler)


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield make_template(Path(folder))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_a_failed_call_loses_nothing_and_is_no_damage(template: Path, act: str, remote: bool) -> None:
    draw = random.Random(act)
    for _ in range(3):
        run_case(template, act, draw.choice(ERRNOS), draw.random(), draw.random() < 0.5, draw.random() < 0.5, remote)


def main(cases: int, seed: int) -> None:
    draw, failed, calls = random.Random(seed), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        template = make_template(Path(folder))
        for _ in range(cases):
            act, number, place = draw.choice(list(ACTS)), draw.choice(ERRNOS), draw.random()
            lasting, warm, remote = (draw.random() < 0.5 for _ in range(3))
            try:
                calls[run_case(template, act, number, place, lasting, warm, remote)] += 1
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".replace(folder, "")[:300]
                case = f"{errno.errorcode[number]} at {place:.3f}, {lasting=}, {warm=}, {remote=}"
                name = f"{act}: {case}: {reason}"
                failed[name] += 1
                print("FAILED", name, flush=True)
    print(f"{cases} cases, {failed.total()} failed; calls that failed: {dict(calls)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

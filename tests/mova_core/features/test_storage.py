"""The storage backends by themselves: what they promise to a store, and the errors that name the reason."""

import ctypes
import errno
import os
import pickle
import re
import resource
import stat

import numpy as np
import pytest
import xxhash

from mova_core.features.storage import LocalStorage, StoreError, mapped, open_storage, writing
from mova_core.features.storage.mapped import PRIVATE_BYTES
from mova_core.io.filesystem import AccessDeniedError


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    location = tmp_path / "store" if request.param == "local" else f"memory://{tmp_path.name}/store"
    storage = open_storage(location)
    storage.mkdir("shards")
    return storage


def test_files(storage):
    storage.put("shards/a.bin", [b"0123", memoryview(b"456789")])
    assert storage.list_files("shards") == ["a.bin"] and storage.list_files("shards", ".json") == []
    assert storage.list_folders() == ["shards"] and storage.list_files("nowhere") == []
    assert storage.read("shards/a.bin", anew=True) == b"0123456789" and storage.stat("shards/a.bin")[0] == 10
    assert bytes(storage.read_range("shards/a.bin", 2, 3)) == b"234"
    own = storage.read_range("shards/a.bin", 2, 3, own=True)
    own[:] = 0
    assert storage.read("shards/a.bin") == b"0123456789", "memory of the caller's own changes no file"
    with pytest.raises(EOFError):
        storage.read_range("shards/a.bin", 8, 3)
    storage.delete("shards/a.bin")
    storage.delete("shards/a.bin")
    assert not storage.exists("shards/a.bin") and storage.list_temporaries() == []
    for read in (
        lambda: storage.read("shards/b.bin"),
        lambda: storage.stat("b"),
        lambda: storage.read_range("b", 0, 1),
    ):
        with pytest.raises(FileNotFoundError):
            read()


def test_only_one_writer_gets_a_name(storage):
    assert storage.put_if_absent("a", b"first") and not storage.put_if_absent("a", b"second")
    assert storage.read("a") == b"first" and storage.list_files("") == ["a"]


def test_local_copy(storage, monkeypatch, tmp_path):
    """What is mapped into memory is checked first: size, and every byte."""
    monkeypatch.setenv("MOVA_CACHE", str(tmp_path / "cache"))
    copies = tmp_path / "cache" / "indexes"
    first, second, third = (f"{xxhash.xxh3_64_intdigest(content):016x}" for content in (b"first", b"second", b"third"))
    storage.put("1.arrow", [b"first"])
    assert storage.local_copy("1.arrow", 5, first).read_bytes() == b"first"
    storage.put("2.arrow", [b"second"])
    assert storage.local_copy("2.arrow", 6, second).read_bytes() == b"second"
    for size, expected, said in ((7, first, r"bytes|ends before"), (5, third, "other bytes")):
        with pytest.raises(ValueError, match=said):
            storage.local_copy("1.arrow", size, expected)
    if isinstance(storage, LocalStorage):
        return
    [copy] = copies.iterdir()
    assert copy.read_bytes() == b"second", "only the newest copy stays"
    copy.write_bytes(b"damage")
    assert storage.local_copy("2.arrow", 6, second).read_bytes() == b"second", "a damaged copy is replaced"
    assert stat.S_IMODE(copies.stat().st_mode) == 0o700
    copies.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write"):
        storage.local_copy("2.arrow", 6, second)


def test_backends_pickle(storage):
    storage.put("a", [b"a"])
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"a"


def test_held_ranges_need_no_descriptors(tmp_path):
    """`mmap.mmap` holds a descriptor for every mapping: at `ulimit -n 1024` the 993rd feature held could not be read."""
    storage = LocalStorage(str(tmp_path))
    for file in ("a", "b"):
        storage.put(file, [bytes(PRIVATE_BYTES)])
        storage.read_range(file, 0, PRIVATE_BYTES)
    before = os.listdir("/proc/self/fd")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 2, limits[1]))
    try:
        held = [storage.read_range("ab"[number % 2], 0, PRIVATE_BYTES, own=True) for number in range(2000)]
        for number, part in enumerate(held):
            part[0] = number % 251
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert [int(part[0]) for part in held] == [number % 251 for number in range(len(held))]
    assert not np.any(storage.read_range("a", 0, PRIVATE_BYTES)), "the file is unchanged"
    del held, part
    assert not mapped._private_mappings, "unmapped with the last array"


def test_a_shard_has_one_descriptor_and_the_shards_are_bounded(tmp_path):
    storage = LocalStorage(str(tmp_path))
    before, held = len(os.listdir("/proc/self/fd")), []
    for number in range(200):
        storage.put(str(number), [bytes([number]) * 2 * PRIVATE_BYTES])
        held += [storage.read_range(str(number), 0, PRIVATE_BYTES, own=own) for own in (True, False)]
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    assert [int(part[-1]) for part in held] == [number for number in range(200) for _ in range(2)]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (errno.EFAULT, errno.EIO),  # a page that cannot be read
        (mapped.EHWPOISON, errno.EIO),
        (errno.ENOMEM, errno.ENOMEM),
        (errno.EINVAL, None),  # a kernel before Linux 5.14: pages are read when touched
    ],
)
def test_pages_that_cannot_be_read_are_an_error_and_no_signal(tmp_path, monkeypatch, failure, expected):
    class Failing:
        def madvise(self, *arguments):
            ctypes.set_errno(failure)
            return -1

    storage = LocalStorage(str(tmp_path))
    storage.put("a", [bytes(4096)])
    storage.read_range("a", 0, 10)
    monkeypatch.setattr(mapped, "_libc", Failing)
    monkeypatch.setattr(mapped.MappedFile, "in_memory", lambda *arguments: False)
    if expected is None:
        assert not np.any(storage.read_range("a", 0, 4096))
    else:
        with pytest.raises(OSError, match=re.escape(os.strerror(expected))) as caught:
            storage.read_range("a", 0, 4096)
        assert caught.value.errno == expected


def test_an_unsupported_system_is_named(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(StoreError, match=r"needs Linux \(this is darwin\)"):
        open_storage("/data/store")


def test_errors_of_writing_name_the_fix():
    with pytest.raises(StoreError, match=r"\(Too many open files\): raise the limit of open files"), writing("/store"):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with pytest.raises(StoreError, match=r"\(no credentials\): check that server, and the rights"), writing("s3://b"):
        raise AccessDeniedError(errno.EACCES, "no credentials")

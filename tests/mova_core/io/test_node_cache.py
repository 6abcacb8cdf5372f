"""The cache of fetched bytes that the processes of a machine share."""

import os
import stat
import time

import pytest

from mova_core.io.node_cache import NodeCache


def test_the_least_recently_used_are_evicted(tmp_path):
    cache, fetched = NodeCache(tmp_path / "cache", limit=10_000), []

    def get(number: int) -> bytes:
        def fetch() -> bytes:
            fetched.append(number)
            return bytes([number]) * 900

        return cache.get(str(number), fetch).to_pybytes()

    for number in range(12):
        assert get(number) == bytes([number]) * 900
        time.sleep(0.01)  # times of access have the resolution of the kernel's clock tick
        assert get(0) == bytes(900)
    assert fetched == [*range(12)]
    total = sum(file.stat().st_size for file in (tmp_path / "cache" / "objects").iterdir())
    assert 8_000 < total <= 10_000 and int((tmp_path / "cache" / "used").read_text()) == total
    assert get(0) and get(11) and fetched == [*range(12)], "used recently"
    assert get(1) and fetched[-1] == 1, "evicted"


def test_a_cache_that_cannot_be_used_costs_nothing_but_the_fetch(tmp_path):
    (tmp_path / "file").write_text("a file in place of the folder")
    assert NodeCache(tmp_path / "file", 1000).get("a", lambda: b"fetched").to_pybytes() == b"fetched"
    off = NodeCache(tmp_path / "off", 0)
    assert off.get("a", lambda: b"fetched").to_pybytes() == b"fetched"
    assert not any((tmp_path / "off" / "objects").iterdir())


def test_failed_and_empty_fetches_are_not_cached(tmp_path):
    cache = NodeCache(tmp_path / "cache", 1000)

    def fail() -> bytes:
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        cache.get("a", fail)
    assert cache.get("a", lambda: b"").to_pybytes() == b"" and cache.get("a", lambda: b"x").to_pybytes() == b"x"
    [cached] = [path for path in (tmp_path / "cache" / "objects").iterdir() if path.stat().st_size]
    os.truncate(cached, 0)  # what a power cut may leave
    assert cache.get("a", lambda: b"again").to_pybytes() == b"again"


def test_a_folder_of_another_user_is_not_trusted(tmp_path, monkeypatch, caplog):
    cache = NodeCache(tmp_path / "cache", 1000)
    assert cache.get("a", lambda: b"planted").to_pybytes() == b"planted"
    with monkeypatch.context() as other_user:
        other_user.setattr(os, "getuid", lambda: 4_000_000)
        for _ in range(2):
            assert cache.get("a", lambda: b"fetched").to_pybytes() == b"fetched"
    assert "belongs to another user" in caplog.text and len(caplog.records) == 1
    assert cache.get("a", lambda: b"fetched").to_pybytes() == b"planted", "our own again"


def test_nobody_else_may_enter_the_folder(tmp_path):
    folder = tmp_path / "cache"
    cache = NodeCache(folder, 1000)
    cache.get("a", lambda: b"a")
    folders = (folder, folder / "objects", folder / "locks")
    assert [stat.S_IMODE(path.stat().st_mode) for path in folders] == [0o700] * 3
    folder.chmod(0o755)  # of an earlier version: closed, and used
    assert cache.get("a", lambda: b"b").to_pybytes() == b"a" and stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folders:  # somebody else may have planted something
        path.chmod(0o777)
        assert cache.get("a", lambda: b"b").to_pybytes() == b"b"
        path.chmod(0o700)

"""The cache of fetched bytes that the processes of a machine share."""

import time

import pytest

from mova_core.io.node_cache import NodeCache


class TestNodeCache:
    def test_the_least_recently_used_goes_first(self, tmp_path):
        cache, made = NodeCache(tmp_path / "kept", limit=10_000), []

        def get(name: int) -> bytes:
            def make() -> bytes:
                made.append(name)
                return bytes([name]) * 900

            return cache.get(str(name), make).to_pybytes()

        for name in range(12):
            assert get(name) == bytes([name]) * 900
            time.sleep(0.01)  # the clock of a disk ticks slowly
            assert get(0) == bytes(900)
        assert made == [*range(12)]
        kept = sum(file.stat().st_size for file in (tmp_path / "kept" / "objects").iterdir())
        assert 8_000 < kept <= 10_000 and int((tmp_path / "kept" / "used").read_text()) == kept
        assert get(0) and get(11) and made == [*range(12)], "used a moment ago"
        assert get(1) and made[-1] == 1, "not used for the longest time"

    def test_callers_get_theirs_whatever_happens_to_it(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        assert NodeCache(tmp_path / "file", 1000).get("a", lambda: b"made").to_pybytes() == b"made"
        none = NodeCache(tmp_path / "none", 0)
        assert none.get("a", lambda: b"made").to_pybytes() == b"made" and not any(
            (tmp_path / "none" / "objects").iterdir()
        )
        cache = NodeCache(tmp_path / "kept", 1000)

        def fail() -> bytes:
            raise ValueError("no such thing")

        with pytest.raises(ValueError, match="no such thing"):
            cache.get("a", fail)
        assert cache.get("a", lambda: b"").to_pybytes() == b"" and cache.get("a", lambda: b"x").to_pybytes() == b"x"

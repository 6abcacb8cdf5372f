"""Where fetched and computed files are cached."""

from pathlib import Path

from mova_core.io.cache import cache_folder


def test_the_environment_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MOVA_CACHE", str(tmp_path / "cache"))
    assert cache_folder("fetched") == tmp_path / "cache" / "fetched" and not (tmp_path / "cache").exists()
    monkeypatch.delenv("MOVA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("fetched") == tmp_path / "xdg" / "mova" / "fetched"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("fetched") == Path.home() / ".cache" / "mova" / "fetched"

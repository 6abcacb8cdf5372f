"""Files and folders appear whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mova_core.io.atomic import atomic_path, write_atomic


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01" and os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_former_content(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, "former")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary.name.startswith(".")
        raise KeyboardInterrupt
    assert path.read_text() == "former" and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no folder" / "a.json", "")


@pytest.mark.parametrize("durable", [True, False])
def test_a_folder_replaces_a_folder(tmp_path, durable):
    for content in ("former", "new"):
        with atomic_path(tmp_path / "model", durable=durable) as temporary:
            (temporary / "weights").mkdir(parents=True)
            (temporary / "weights" / content).write_text(content)
    assert os.listdir(tmp_path / "model" / "weights") == ["new"] and os.listdir(tmp_path) == ["model"]
    with pytest.raises(ValueError, match="stopped"), atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        raise ValueError("stopped")
    assert os.listdir(tmp_path / "model" / "weights") == ["new"] and os.listdir(tmp_path) == ["model"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    (tmp_path / "a").write_text("former")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "former"


def test_writers_at_the_same_time_never_mix(tmp_path):
    contents = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(4) as writers:
        list(writers.map(lambda content: write_atomic(tmp_path / "a", content), contents))
    assert (tmp_path / "a").read_text() in contents and os.listdir(tmp_path) == ["a"]

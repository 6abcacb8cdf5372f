"""Pictures that cannot be had are found without reading any."""

import os

import fsspec

from pipelines.pictures import missing_files


def test_missing_files_here_and_elsewhere(tmp_path):
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere")
    (tmp_path / "x.tar").write_bytes(b"x")
    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write(b"a")
    there = [f"{tmp_path}/a.png", f"{tmp_path}/x.tar#b.png@0+1", "memory://pictures/a.png"]
    missing = [f"{tmp_path}/{name}.png" for name in ("b", "folder", "pipe", "link", "a" * 300, "a\0b")]
    missing += [f"{tmp_path}/y.tar#b.png@0+1", f"{tmp_path}/y.tar#c.png@0+1"]
    missing += ["memory://pictures/b.png", "memory://nowhere/a.png"]
    assert missing_files([*there, *missing]) == set(missing)

"""Records of Parquet files and webdataset tars: found in order, read alone as the same, broken ones named."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mova_core.data import DataError, iterate_samples
from mova_core.io.read import read_bytes
from mova_core.records import Position, RecordFile, read_records

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "ü"}]
PICTURES = [f"picture {number}".encode() for number in range(5)]


def records_of(path: Path) -> tuple[list[tuple[Position, dict[str, Any]]], list[str]]:
    """Records with their positions, each the same when it is read alone, and the errors of those left out."""
    errors: list[str] = []
    found = list(read_records(path, lambda error: errors.append(str(error))))
    file = RecordFile(str(path))
    for position, record in reversed(found):
        assert file.at(position) == record
    file.close()
    return found, errors


@pytest.mark.parametrize("form", ["struct", "binary", "list", "names"])
def test_rows_of_a_parquet_file_are_records_with_their_pictures(tmp_path, form):
    by_form: dict[str, list[Any]] = {
        "struct": [{"bytes": picture, "path": None} for picture in PICTURES],
        "binary": PICTURES,
        "list": [[{"bytes": picture, "path": "x.png"}] * (1 + number % 2) for number, picture in enumerate(PICTURES)],
        "names": [f"{number}.png" for number in range(5)],
    }
    images = by_form[form]
    table = pa.table({"image": images, "conversations": [TURNS] * 5, "routing": [["sam"], [], None, [], []],
                      "score": [0.5, float("nan"), 1.0, 2.0, 3.0], "blob": [b"x"] * 5})  # fmt: skip
    path = tmp_path / "data.parquet"
    pq.write_table(table, path, row_group_size=2)
    found, errors = records_of(path)
    assert errors == [] and [position[1:] for position, _ in found] == [
        (1, 1, 0, 0), (2, 2, 0, 1), (3, 3, 1, 0), (4, 4, 1, 1), (5, 5, 2, 0),
    ]  # fmt: skip
    assert [record["score"] for _, record in found] == [0.5, None, 1.0, 2.0, 3.0] and "blob" not in found[0][1]
    samples = list(iterate_samples(path))
    assert [sample.routing for sample in samples] == [("sam",), (), None, (), ()]
    if form == "names":
        assert [sample.images[0].path for sample in samples] == [f"{tmp_path}/{number}.png" for number in range(5)]
    else:
        assert [len(sample.images) for sample in samples] == ([1, 2, 1, 2, 1] if form == "list" else [1] * 5)
        assert all(sample.images[-1].read() == picture for sample, picture in zip(samples, PICTURES, strict=True))


def test_a_parquet_cell_without_bytes_names_its_file(tmp_path):
    images = [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    pq.write_table(pa.table({"image": images, "conversations": [TURNS] * 3}), tmp_path / "data.parquet")
    found, _ = records_of(tmp_path / "data.parquet")
    assert [record.get("image") for _, record in found] == [f"{tmp_path}/data.parquet#image[0,0]", "b.png", None]


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_samples_of_a_tar_are_records_with_their_pictures(tmp_path):
    record = json.dumps({"conversations": TURNS, "routing": ["sam"]}).encode()
    long = "n" * 150  # a name with a header of its own
    tar_of(tmp_path / "data.tar", [
        ("a.png", PICTURES[0]), ("a.json", record), ("b.json", record), ("b.txt", b"no record"),
        ("c.png", PICTURES[1]), ("d.json", b"{broken"), (f"{long}.left.jpg", PICTURES[2]), (f"{long}.right.jpg", PICTURES[3]),
        (f"{long}.json", record), ("e.json", b"[]"), ("x/a.json", record), ("x/a.png", PICTURES[4]),
    ])  # fmt: skip
    found, errors = records_of(tmp_path / "data.tar")
    assert [position.number for position, _ in found] == [1, 2, 5, 7]
    shown = [record.get("image", []) for _, record in found]
    assert [[read_bytes(locator) for locator in locators] for locators in shown] == [
        [PICTURES[0]], [], PICTURES[2:4], [PICTURES[4]],
    ]  # fmt: skip
    assert [error.partition("data.tar, ")[2][:42] for error in errors] == [
        "record 3, line 3: c has 0 .json members: g", "record 4, line 4: d.json is broken JSON (E",
        "record 6, line 6: e.json is list: a record",
    ]  # fmt: skip
    cut = (tmp_path / "data.tar").read_bytes()[:4000]
    (tmp_path / "cut.tar").write_bytes(cut)
    found, errors = records_of(tmp_path / "cut.tar")
    assert [position.number for position, _ in found] == [1] and "broken .tar file" in errors[-1], "b is cut off"


def test_a_packed_file_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "other.parquet")
    for name, problem in (("broken.parquet", "broken .parquet file"), ("none.parquet", "no data file"), ("none.tar", "no data file"),
                          ("other.parquet", "no column `conversations`, it has text")):  # fmt: skip
        with pytest.raises(DataError, match=f"{name}.*{problem}|{problem}.*{name}"):
            list(read_records(tmp_path / name))
    pq.write_table(pa.table({"conversations": [TURNS]}), tmp_path / "a.parquet")
    file = RecordFile(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match="not there any more: the file has changed"):
        file.at(Position(str(tmp_path / "a.parquet"), 2, 2, 1, 0))

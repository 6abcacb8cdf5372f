"""Bad records of a data file: the first ends the command, or all are left out and reported."""

import json

import pytest

from mova_core.data import DataError
from pipelines.invalid_records import read_valid_samples, report_skipped
from pipelines.precompute.listing import find_images


def test_bad_rows_stop_the_command_or_are_left_out_and_reported(tmp_path, capsys):
    def record(image: str | list[str]) -> str:
        said = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
        return json.dumps({"image": image, "conversations": said})

    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([record("a.png"), "{image}", record(["b.png", "c.png"]), *["[]"] * 6, record("d.png")]))
    with pytest.raises(DataError, match="line 2"):
        find_images(path)
    assert capsys.readouterr().err == ""
    skipped: list[str] = []
    found = find_images(path, None, "skip", skipped)["image"].to_pylist()
    assert found == [str(tmp_path / f"{name}.png") for name in "abcd"]
    assert len(skipped) == 7 and f"{path}, record 2, line 2: broken JSON" in skipped[0]
    told = capsys.readouterr().err.splitlines()
    assert told == ["bad rows skipped: 7", *(f"  {line}" for line in skipped[:5]), "  and 2 more"]

    samples, left_out = read_valid_samples(path, None, "skip", check=lambda sample: sample.image)
    assert [sample.where for sample in samples] == [f"{path}, record {n}, line {n}" for n in (1, 10)]
    assert len(left_out) == 8 and any("line 3: the record has 2 pictures" in line for line in left_out)
    path.write_text(record(["b.png", "c.png"]))
    for how in ("raise", "skip"):
        with pytest.raises(DataError, match="line 1: the record has 2 pictures"):
            read_valid_samples(path, None, how, check=lambda sample: sample.image)
    assert len(read_valid_samples(path)[0]) == 1
    report_skipped([])
    assert capsys.readouterr().err == ""

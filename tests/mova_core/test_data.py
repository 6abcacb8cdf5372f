import json

import pytest

from mova_core.data import DataError, read_records, read_samples, write_records

RECORD = {
    "id": "one",
    "image": "a.png",
    "kind": "photo",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}],
}


def test_array_and_lines_read_alike(tmp_path):
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text(json.dumps([RECORD, RECORD | {"id": "two", "routing": ["sam"]}], indent=2))
    lines.write_text("\n".join(json.dumps(r) for r in [RECORD, RECORD | {"id": "two", "routing": ["sam"]}]))
    first, second = read_samples(array)
    for one, other in zip(read_samples(array), read_samples(lines), strict=True):
        assert (one.id, one.turns, one.routing, one.extra) == (other.id, other.turns, other.routing, other.extra)
    assert (first.question, first.answer, first.extra) == ("What?", "A cat", {"kind": "photo"})
    assert first.image is not None and first.image.path == str(tmp_path / "a.png")
    assert (first.routing, second.routing) == (None, ("sam",))


@pytest.mark.parametrize(
    ("body", "line", "says"),
    [
        ('[\n{"id": 1, "conversations": []}\n]', 2, "conversations"),
        ('[\n{"conversations": [{"from": "human", "value": "a"}]},\n{"id": 2, "x": tru}\n]', 3, "broken JSON"),
        (
            '{"conversations": [{"from": "human", "value": "a"}]}\n{"conversations": [{"from": "dog", "value": "a"}]}',
            2,
            "dog",
        ),
        ('[\n\n{"conversations": [{"from": "human", "value": "<image>"}]}]', 3, "0 image"),
        ('[\n"text"]', 2, "str"),
        ('[\n{"id": 1', 2, "broken JSON"),
        ('[\n{"conversations": [{"from": "human", "value": "a"}]},\n', 3, "cut off"),
    ],
)
def test_a_broken_record_is_named_by_its_line(tmp_path, body, line, says):
    path = tmp_path / "bad.json"
    path.write_text(body)
    with pytest.raises(DataError) as error:
        read_samples(path)
    message = str(error.value)
    assert str(path) in message and says in message
    assert f"line {line}" in message


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match=r"no data file .*nothing\.json"):
        read_samples(tmp_path / "nothing.json")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="holds no record"):
        read_samples(tmp_path / "empty.json")


def test_written_records_read_back(tmp_path):
    path = tmp_path / "sub" / "out.json"
    write_records(path, [RECORD, RECORD])
    assert [record for _, record in read_records(path)] == [RECORD, RECORD]
    assert [line for line, _ in read_records(path)] == [2, 3]

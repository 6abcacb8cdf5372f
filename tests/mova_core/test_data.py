import json

import pytest

from mova_core.data import (
    IMAGE_MARK,
    DataError,
    read_records,
    read_samples,
    usable_samples,
    write_records,
)

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
    assert [(position.number, position.line) for position, _ in read_records(path)] == [(1, 2), (2, 3)]


def read(tmp_path, *records, **options):
    path = tmp_path / "data.json"
    write_records(path, list(records))
    return read_samples(path, **options)


def record(*values, **fields):
    turns = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]
    return {"conversations": turns, **fields}


def test_pictures_and_marks(tmp_path):
    text, moved, later, several, unmarked = read(
        tmp_path,
        record("Why?", "So."),
        record("What?\n<image>", "A cat", image="a.png"),
        record("What?", "A cat", "And\n<image>?", "A dog", image="a.png"),
        record("<image> or <image>?", "The first", image=["a.png", "b.png"]),
        record("Which?", "The first", image=["a.png", "b.png"]),
    )
    assert (text.images, text.image, text.length) == ((), None, -2)
    assert moved.turns[0] == ("user", "What?") and moved.length == 4
    assert later.turns[2] == ("user", f"{IMAGE_MARK}\nAnd\n?") and later.question == "What?\nAnd\n?"
    assert several.turns[0][1].count(IMAGE_MARK) == 2 and several.question == "or ?"
    assert [image.path for image in several.images] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert unmarked.turns[0] == ("user", "Which?") and len(unmarked.images) == 2
    with pytest.raises(DataError, match=r"line 5: the record has 2 pictures, only one can be used"):
        _ = several.image
    (tmp_path / "a.png").write_bytes(b"a")
    quarantine = [{"image": str(tmp_path / "a.png"), "sha256": moved.images[0].key}]
    assert usable_samples([text, moved, several], quarantine) == []


def test_an_opening_answer_is_left_out(tmp_path):
    turns = [
        {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "<image> What?"},
        {"from": "gpt", "value": "Cat"},
    ]
    (sample,) = read(tmp_path, {"conversations": turns, "image": "a.png"})
    assert sample.turns == (("user", "What?"), ("assistant", "Cat"))
    system = {"from": "system", "value": "Be brief."}
    (sample,) = read(tmp_path, {"conversations": [system, *turns], "image": "a.png"})
    assert sample.turns == (("system", "Be brief."), ("user", "What?"), ("assistant", "Cat"))


def test_routing_weights_are_routing(tmp_path):
    weights = [0, 0, 1, 0, 0, 0, 1.0]
    one, both, none = read(
        tmp_path,
        record("a", "b", routing_weights=weights),
        record("a", "b", routing_weights=weights, routing=["sam", "codetr"]),
        record("a", "b", routing_weights=[0] * 7),
    )
    assert (one.routing, both.routing, none.routing) == (("codetr", "sam"), ("sam", "codetr"), ())
    assert "routing_weights" not in one.extra
    (two,) = read(tmp_path, record("a", "b", routing_weights=[0, 1]), pool=("sam", "vary"))
    assert two.routing == ("vary",)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"routing_weights": [0, 1]}, "`routing_weights` must be 7 zeros and ones"),
        ({"routing_weights": [0, 1, 0.5, 0, 0, 0, 0]}, "zeros and ones"),
        ({"routing_weights": [1, 0, 0, 0, 0, 0, 0], "routing": ["sam"]}, "name different experts"),
        ({"routing": "sam"}, "`routing` must be a list"),
        ({"image": 3}, "`image` must be one path or a list of paths, got int"),
        ({"image": ["a.png", None]}, "got NoneType, str"),
    ],
)
def test_broken_fields(tmp_path, fields, says):
    with pytest.raises(DataError, match=says):
        read(tmp_path, record("a", "b", **fields))


def test_marks_must_match_pictures(tmp_path):
    for marks, images in ((1, []), (3, ["a", "b"]), (1, ["a", "b"])):
        with pytest.raises(DataError, match=f"{marks} <image> marks but {len(images)} image"):
            read(tmp_path, record("<image>" * marks + "?", "b", image=images))


def test_bad_rows_are_skipped_by_choice(tmp_path):
    path = tmp_path / "data.jsonl"
    good = json.dumps(RECORD)
    path.write_text("\n".join([good, '{"id": 1, "conver', good, '"text"', '{"conversations": []}', good, "{"]))
    skipped: list[DataError] = []
    samples = read_samples(path, on_error="skip", skipped=skipped)
    assert [sample.where for sample in samples] == [f"{path}, record {n}, line {n}" for n in (1, 3, 6)]
    assert [str(error).split(":")[0] for error in skipped] == [f"{path}, record {n}, line {n}" for n in (2, 4, 5, 7)]
    with pytest.raises(DataError, match="line 2"):
        read_samples(path)
    path.write_text('{"conversations": []}')
    with pytest.raises(DataError, match=r"no usable record, the first error: .*line 1"):
        read_samples(path, on_error="skip")
    array = tmp_path / "data.json"
    array.write_text(f"[{good},\n{{]")
    skipped.clear()
    assert [sample.id for sample in read_samples(array, on_error="skip", skipped=skipped)] == ["one"]
    assert "record 2, line 2: broken JSON" in str(skipped[0]) and "line 2: the array is never closed" in str(skipped[1])

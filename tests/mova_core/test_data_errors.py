"""Each thing that can be wrong with a record, in the words a user reads; and which samples a quarantine leaves out."""

import json
from typing import Any

import pytest

from mova_core.data import LONGEST_PATH, DataError, quarantine_check, read_samples, split_usable
from mova_core.images import ImageRef

TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat"}]
LONG = "x" * 5000
POOL = ("sam", "vary")

ERRORS = {
    "no turns": ({"image": "a.png"}, "a record needs `conversations`, a list of {from, value} turns"),
    "messages": (
        {"messages": TURNS},
        "a record needs `conversations`, a list of {from, value} turns (`messages` is not read)",
    ),
    "no dict": (
        {"conversations": ["human: " + "a" * 200]},
        f"a turn needs `from` (human or gpt) and a text `value`, got {json.dumps('human: ' + 'a' * 200)[:120]}",
    ),
    "no from": (
        {"conversations": [{"value": "What?"}]},
        'a turn needs `from` (human or gpt) and a text `value`, got {"value": "What?"}',
    ),
    "no question": ({"conversations": TURNS[1:]}, "a record needs a turn `from` human that asks something"),
    "video": ({"conversations": TURNS, "video": "a.mp4"}, "`video` is not read: only pictures can be used"),
    "number": (
        {"conversations": TURNS, "image": [3, None]},
        "`image` must be one path or a list of paths, got NoneType, int",
    ),
    "empty": ({"conversations": TURNS, "image": " "}, "`image` ' ' is no path: it is empty or has a NUL character"),
    "NUL": (
        {"conversations": TURNS, "image": "a\0" + LONG},
        f"`image` {('a' + chr(0) + LONG)[:80]!r} is no path: it is empty or has a NUL character",
    ),
    "data URI": (
        {"conversations": TURNS, "image": "DATA:image/png;base64," + LONG},
        "`image` is a data URI (DATA:image/png;b... of 5,022 characters): write the picture to a file and give its path",
    ),
    "long": (
        {"conversations": TURNS, "image": LONG + ",data:"},
        f"`image` '{'x' * 40}'... of 5,006 characters is too long for a path",
    ),
    "one mark": (
        {"conversations": [{"from": "human", "value": "<image><image>?"}], "image": "a.png"},
        "2 <image> marks but 1 image",
    ),
    "two marks": (
        {"conversations": [{"from": "human", "value": "<image>?"}], "image": ["a.png", "b.png"]},
        "1 <image> marks but 2 images",
    ),
    "routing": ({"conversations": TURNS, "routing": ["sam", 1]}, "`routing` must be a list of expert names"),
    "twice": (
        {"conversations": TURNS, "routing": ["sam", "vary"] * 20},
        f"`routing` names an expert twice: {', '.join(['sam', 'vary'] * 20)[:80]}",
    ),
    "weights": (
        {"conversations": TURNS, "routing_weights": [2] * 40},
        f"`routing_weights` must be 2 zeros and ones (sam, vary), got {str([2] * 40)[:80]}",
    ),
    "different": (
        {"conversations": TURNS, "routing_weights": [0, 1], "routing": ["sam"]},
        "`routing` and `routing_weights` name different experts; keep one of them",
    ),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_what_is_wrong_with_a_record_in_words(wrong, tmp_path):
    record, message = ERRORS[wrong]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"conversations": TURNS}) + "\n" + json.dumps(record))
    with pytest.raises(DataError) as error:
        read_samples(path, pool=POOL)
    assert str(error.value) == f"{path}, record 2, line 2: {message}"


def test_the_longest_path_is_read_and_a_record_is_named_by_its_id_or_its_place(tmp_path):
    path, images = tmp_path / "data.jsonl", tmp_path / "images"
    records: list[dict[str, Any]] = [
        {"conversations": TURNS, "image": "data:-" + "x" * (LONGEST_PATH - 6)},
        {"conversations": TURNS, "id": 7},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    first, second = read_samples(path, images)
    assert [image.path for image in first.images] == [f"{images}/{records[0]['image']}"]
    assert (first.id, first.where, first.number) == (f"{path}, record 1, line 1", f"{path}, record 1, line 1", 1)
    assert (second.id, second.number) == ("7", 2)


def test_samples_are_left_out_by_the_state_of_their_pictures(tmp_path):
    path = tmp_path / "data.jsonl"
    names = {"good": "good.png", "bad": "bad.png", "gone": "gone.png", "replaced": "replaced.png", "text": None}
    path.write_text(
        "\n".join(json.dumps({"id": name, "conversations": TURNS, "image": at}) for name, at in names.items())
    )
    for name in ("good", "bad", "replaced"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    rows: list[dict[str, Any]] = [
        {"image": str(tmp_path / "bad.png"), "sha256": ImageRef(path=str(tmp_path / "bad.png")).key},
        {"image": str(tmp_path / "gone.png"), "sha256": None},
        {"image": str(tmp_path / "replaced.png"), "sha256": "0" * 64},
        {"image": None, "sha256": "1" * 64},
    ]
    samples = {sample.id: sample for sample in read_samples(path)}
    usable, left_out = split_usable(samples.values(), rows)
    assert usable == [samples["good"], samples["replaced"]]
    assert left_out == {"no picture": [samples["text"]], "picture in quarantine": [samples["bad"], samples["gone"]]}
    assert not quarantine_check(rows)("")

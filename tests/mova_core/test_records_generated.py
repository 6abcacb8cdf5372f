"""Record files made by seed: every layout is read alike, and damage to one record costs no other.

`python -m tests.mova_core.test_records_generated 2000` runs more cases than the suite does.
"""

import itertools
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mova_core import records
from mova_core.data import DataError, Sample, read_samples
from mova_core.records import RecordFile, read_records, write_records
from pipelines.precompute.listing import find_images

CASES = 100
SECONDS = 5.0  # of one case, on a busy machine; a case takes about 2 ms
NAMES = ["a.png", "ü/b.png", "x y#z.png", 'q"uote.png', "{brace}.png"]
WORDS = ["what", "ü", '"', "\\", "{", "}", "[", "]", ",", "\n", "\u2028", "🙂", "<image", "null", "\t", "}, {", "]\n["]
JUNK: list[Any] = [
    None, 3, 1.5, True, "", "x", [], {}, [[]], [None], {"a": 1}, math.nan, -math.inf, -1, "<image>", ["a.png", 3], 10**400,
    10**5000, "\ud800", "\udce9.png", "\0", " ", [{"from": "human"}], [{"value": "x"}], [{"from": [], "value": {}}],
    ["sam", "sam"], [0, 1], {"conversations": []}, "a.png\n", "data:image/png;base64,xx",
]  # fmt: skip
# Values that are no valid JSON or no valid text; those of the second list also hide where their record ends in its line.
BROKEN = ["tru", "1e999", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a": 1, "a": 2}', "'x'", r'"\ud800"', r'"\x"', "1 2",
          '"a" "b"', '{"a" 1}', "[1 2]", "\0"]  # fmt: skip
UNBALANCED = ["[", "{", '"', "}", "]", '[{"a": ', '{"a": [1,']
PLACES = [
    "id",
    "image",
    "conversations",
    "routing",
    "routing_weights",
    "kind",
    "form",
    "video",
    "from",
    "value",
    "turn",
]


def sound(rng: random.Random, name: int) -> dict[str, Any]:
    """A valid record with one picture and one to three questions."""
    turns = []
    for number in range(2 * rng.randint(1, 3)):
        text = "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 12))) + "x"
        turns.append({"from": ("human", "gpt")[number % 2], "value": text})
    optional = {"kind": rng.choice([None, "photo", 3]), "text": rng.choice(WORDS), "x": {"y": [1, {"z": []}]}}
    fields = {key: value for key, value in optional.items() if rng.random() < 0.5}
    record = {"id": name, "image": rng.choice(NAMES), "conversations": turns, **fields}
    keys = rng.sample(list(record), len(record))
    return {key: record[key] for key in keys}


def laid_out(rng: random.Random, texts: Callable[[int | None], list[str]]) -> str:
    """The records in a layout chosen by chance: arrays and lines, indented or not, several after each other.

    Args:
        texts: gives the records as JSON, indented by so many blanks or not at all.
    """
    layout = rng.choice(["jsonl", "array", "line", "indented", "joined", "objects"])
    if layout == "indented":
        return "[\n" + ",\n".join(" " + text.replace("\n", "\n ") for text in texts(rng.choice([1, 2, 4]))) + "\n]"
    items = texts(None)
    if layout == "jsonl":
        return rng.choice(["\n", "\r\n", "\n\n"]).join(items) + rng.choice(["", "\n"])
    if layout == "array":
        return "[\n" + ",\n".join(items) + "\n]\n"
    if layout == "line":
        return "[" + rng.choice([", ", ",", " ,\t"]).join(items) + "]"
    if layout == "objects":
        return "\n".join(texts(2))
    middle = rng.randrange(len(items) + 1)
    parts = [items[:middle], items[middle:]]
    return rng.choice(["", "\n", "\ufeff"]).join("[" + ", ".join(part) + "]" for part in parts if part)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """One record with a few bytes lost, changed or added. A line break may come in, which makes two records of it."""
    data, kind, at = bytearray(content), rng.randrange(7), rng.randrange(len(content))
    if kind == 0:
        del data[max(1, at) :]
    elif kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        for _ in range(10):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 3:
        data[at : at + rng.randrange(1, 64)] = b"\xff" * rng.randrange(1, 64)
    elif kind == 4:
        del data[at : at + rng.randrange(1, 200)]
    elif kind == 5:
        data[at:at] = rng.randbytes(rng.randrange(1, 100))
    else:
        data[at:at] = rng.choice([b"{", b"}", b"[", b"]", b'"', b"\\", b",", b"\n", b'{"a": [', b"\0"])
    return bytes(data)


def with_junk(rng: random.Random, record: dict[str, Any]) -> str:
    """A record with a wrong value in one place."""
    place, value = rng.choice(PLACES), rng.choice(JUNK)
    turn = rng.randrange(len(record["conversations"]))
    if place in ("from", "value"):
        record["conversations"][turn][place] = value
    elif place == "turn":
        record["conversations"][turn] = value
    else:
        record[place] = value
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(record)
    finally:
        sys.set_int_max_str_digits(limit)


def read(path: Path) -> tuple[list[Sample], list[str]]:
    errors: list[DataError] = []
    try:
        samples = read_samples(path, on_error="skip", skipped=errors)
    except DataError as error:  # nothing usable at all
        return [], [str(error)]
    return samples, [str(error) for error in errors]


def check_layout(seed: int, path: Path) -> None:
    """Every record of a sound file is read, whatever its layout and the size of the window."""
    rng = random.Random(seed)
    items = [sound(rng, name) for name in range(rng.randint(1, 12))]
    ascii_only = rng.random() < 0.5
    text = laid_out(rng, lambda indent: [json.dumps(i, indent=indent, ensure_ascii=ascii_only) for i in items])
    path.write_text(rng.choice(["", "\ufeff"]) + text, newline="")
    assert [value for _, value in read_records(path)] == items
    samples, errors = read(path)
    assert errors == [] and [sample.id for sample in samples] == [str(item["id"]) for item in items]
    assert [sample.number for sample in samples] == list(range(1, len(items) + 1))


def check_damage(seed: int, path: Path) -> None:
    """A record with lost, changed or added bytes, or a wrong value, is read or named; its neighbours are read."""
    rng = random.Random(seed)
    items = [json.dumps(sound(rng, name)).encode() for name in range(rng.randint(2, 8))]
    place = rng.randrange(len(items))
    bad = sound(rng, place)
    junk = rng.random() < 0.5
    items[place] = with_junk(rng, bad).encode() if junk else damaged(rng, json.dumps(bad).encode())
    layout = rng.choice(["jsonl", "array", "line"] if junk else ["jsonl", "array"])
    joined = {"jsonl": b"\n", "array": b",\n", "line": b", "}[layout].join(items)
    path.write_bytes({"jsonl": joined, "array": b"[\n" + joined + b"\n]", "line": b"[" + joined + b"]"}[layout])
    samples, errors = read(path)
    lost = {str(name) for name in range(len(items)) if name != place} - {sample.id for sample in samples}
    assert not lost, f"sound records {lost} were lost: {errors}"
    assert all("\n" not in error and str(path) in error for error in errors), errors
    assert all(a.number < b.number for a, b in itertools.pairwise(samples))
    placed = list(read_records(path, on_invalid=lambda _: None))
    values = [value for _, value in placed]
    file = RecordFile(str(path))
    assert [file.at(position) for position, _ in placed] == values
    file.close()
    write_records(path.with_suffix(".out"), values)
    assert [value for _, value in read_records(path.with_suffix(".out"))] == values
    found = find_images(path, None, "skip")["image"].to_pylist()
    assert {image.path for sample in samples for image in sample.images} <= set(found)


def check_broken(seed: int, path: Path) -> None:
    """Exactly the record with a broken value is left out, by its number."""
    rng = random.Random(seed)
    items = [sound(rng, name) for name in range(rng.randint(2, 8))]
    place = rng.randrange(len(items))
    items[place]["broken"] = "@@"
    indent = rng.choice([None, 1, 3])
    unbalanced = rng.random() < 0.5
    value = rng.choice(UNBALANCED if unbalanced else BROKEN)
    texts = [json.dumps(item, indent=indent).replace('"@@"', value) for item in items]
    if indent is None and not unbalanced and rng.random() < 0.5:
        content = "[" + ", ".join(texts) + "]"
    elif indent is None:
        content = "\n".join(texts)
    else:
        content = "[\n" + ",\n".join("  " + text.replace("\n", "\n  ") for text in texts) + "\n]"
    path.write_text(content)
    samples, errors = read(path)
    assert [sample.id for sample in samples] == [str(name) for name in range(len(items)) if name != place], errors
    assert len(errors) == 1 and errors[0].startswith(f"{path}, record {place + 1}, line "), errors


CHECKS = [check_layout, check_damage, check_broken]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("window", [None, 64])
def test_generated_files(check, window, tmp_path, monkeypatch):
    if window:
        monkeypatch.setattr(records, "CHUNK", window)
    for seed in range(CASES // 4):
        started = time.monotonic()
        check(seed + (1000 if window else 0), tmp_path / "data.json")
        assert time.monotonic() - started < SECONDS, f"seed {seed} takes long"


if __name__ == "__main__":
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for each in CHECKS:
            for case in range(int(sys.argv[1])):
                records.CHUNK = (1 << 16, 64)[case % 2]
                try:
                    each(case, Path(folder) / "data.json")
                except Exception as error:
                    failures += 1
                    print(each.__name__, case, type(error).__name__, str(error)[:300])
    print(f"{len(CHECKS)} checks, {sys.argv[1]} cases each: {failures} failures")

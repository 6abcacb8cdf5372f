"""Every record of a file is read or named, whatever its form: one line, many lines, several arrays, damage of all kinds."""

import gzip
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mova_core import records
from mova_core.data import read_samples
from mova_core.records import CHUNK, DataError, read_records, write_records


def record(name: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nq?"}, {"from": "gpt", "value": "a"}]
    return {"id": name, "image": "a.png", "conversations": turns} | fields


def lines(*items: Any) -> str:
    return "\n".join(item if isinstance(item, str) else json.dumps(item) for item in items)


def read(path: Path, content: str | bytes) -> tuple[list[Any], list[str]]:
    """The ids of the valid samples of a file, and the errors of what is left out, without the file's name."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    errors: list[DataError] = []
    samples = read_samples(path, on_error="skip", skipped=errors)
    return [sample.id for sample in samples], [str(error).removeprefix(f"{path}, ") for error in errors]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.json"


ABC = [record("a"), record("b"), record("c")]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ABC),
        json.dumps(ABC, indent=1),
        json.dumps(ABC, indent=0),
        json.dumps(ABC, indent=1).replace("\n", "\r\n"),
        lines(*ABC),
        lines(*ABC).replace("\n", "\r\n\r\n"),
        "".join(map(json.dumps, ABC)),
        "\n".join(json.dumps(item, indent=2) for item in ABC),
        json.dumps(ABC[:1]) + json.dumps(ABC[1:]),
        json.dumps(ABC[:2], indent=1) + "\n" + lines(ABC[2]),
        lines(ABC[0]) + "\n" + json.dumps(ABC[1:]),
        "[" + json.dumps(ABC) + ",]",
        "\ufeff" + json.dumps(ABC[:1]) + "\ufeff" + json.dumps(ABC[1:], indent=2),
    ],
)
def test_all_records_of_every_form_are_read(path, content):
    assert read(path, content) == (["a", "b", "c"], [])


def test_a_record_is_known_by_its_number(path):
    """Several records on one line were taken for one: all got the labels of the last."""
    path.write_text(json.dumps([record("a"), record("b", conversations=[]), record("c"), record("d", image=3)]))
    errors: list[DataError] = []
    samples = read_samples(path, on_error="skip", skipped=errors)
    assert [(sample.id, sample.number) for sample in samples] == [("a", 1), ("c", 3)]
    assert [str(error).split(":")[0] for error in errors] == [f"{path}, record {n}, line 1" for n in (2, 4)]
    path.write_text(json.dumps([record(None), record(None)]))
    assert [sample.id for sample in read_samples(path)] == [f"{path}, record {n}, line 1" for n in (1, 2)]


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        ('{"id": tru}', "broken JSON (Expecting value)"),
        ('{"id": 1, "conver', "broken JSON"),
        ('{"id": 1, "conversations": [{"from": "human"},', "broken JSON"),
        ("{'id': 1}", "Expecting property name"),
        ("garbage", "Expecting value"),
        ('"text"', "a record must be a JSON object, this is str"),
        ("null", "this is NoneType"),
        ("[]", "this is list"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"x": ' + "9" * 5000 + "}", "Exceeds the limit (4300 digits)"),
        ('{"x": 1e999}', "the number 1e999 is too large"),
        ('{"id": 1, "image": "a.png", "image": "b.png"}', "`image` stands twice"),
        (lines(record(1, image="caf\udce9.png")), "\\udce9 is half a character"),
        (lines(record(1, image="a\0b.png")), "has a NUL character"),
        (lines(record(1, image=" ")), "it is empty"),
        (lines(record(1, video="a.mp4")), "`video` is not read: only pictures"),
        (lines(record(1, images=["a.png"])), "`images` is not read: name it `image`"),
        (lines(record(1, conversations=3)), "needs `conversations`"),
        (lines({"id": 1, "messages": [{"role": "user"}]}), "(`messages` is not read)"),
        (lines(record(1, conversations=[None])), "a turn needs"),
        (lines(record(1, routing=["sam", "sam"])), "names an expert twice"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "array", "line"])
def test_an_invalid_record_is_named_and_its_neighbours_are_read(path, damaged, says, form):
    good = [lines(record(name)) for name in "abcd"]
    items = [*good[:2], damaged, *good[2:]]
    content = {"jsonl": "\n".join(items), "array": "[\n" + ",\n".join(items) + "\n]", "line": f"[{', '.join(items)}]"}
    ids, errors = read(path, content[form])
    assert ids == ["a", "b", "c", "d"]
    line = {"jsonl": 3, "array": 4, "line": 1}[form]
    assert errors[0].startswith(f"record 3, line {line}: ") and says in errors[0]
    assert len(errors) == 1


def test_a_broken_record_of_an_indented_array_costs_no_other(path):
    content = json.dumps([record("a"), record("b"), record("c")], indent=2).replace('"b"', "tru")
    ids, errors = read(path, content)
    assert ids == ["a", "c"] and len(errors) == 1
    assert errors[0].startswith("record 2, line 16: broken JSON on line 17")


def test_bytes_that_are_no_text_cost_their_record_alone(path):
    content = lines(record("a"), record("b", kind="café"), record("c"), record("d", kind="x")).encode()
    content = content.replace(b"caf\\u00e9", b"caf\xe9")
    assert read(path, content) == (["a", "c", "d"], ["record 2, line 2: byte 0xe9 is no UTF-8 text"])


def test_what_is_no_record_file_is_refused_by_its_form(path, tmp_path):
    for content, says in (
        (gzip.compress(b"[]"), r"compressed \(gzip\)"),
        (json.dumps(ABC).encode("utf-16"), "UTF-16"),
        (json.dumps(ABC).encode("utf-16-le"), "UTF-16"),
        (b"PAR1", "Parquet"),
        (b"", "holds no record"),
        (b" \n\n", "holds no record"),
        (b"<html>", "no usable record, the first error: .*record 1, line 1: broken JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=says):
            read_samples(path, on_error="skip")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_samples(tmp_path)
    with pytest.raises(DataError, match="cannot be read: it is a device, not a file"):
        read_samples("/dev/zero")


def test_what_a_cut_off_file_holds_is_read_and_the_cut_is_named(path):
    whole = json.dumps([record(n) for n in range(3)])
    ids, errors = read(path, whole[:-30])
    assert ids == ["0", "1"] and len(errors) == 2
    assert errors[0].startswith("record 3, line 1: broken JSON") and "never closed" in errors[1]
    with pytest.raises(DataError, match="record 3, line 1: broken JSON"):
        read_samples(path)


def test_nan_is_read_as_null_and_never_written(path, tmp_path):
    path.write_text('[{"id": NaN, "kind": Infinity, "x": [-Infinity, 1.5]}]')
    [(_, value)] = read_records(path)
    assert value == {"id": None, "kind": None, "x": [None, 1.5]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_records(tmp_path / "out.json", [{"x": float("nan")}])
    assert not (tmp_path / "out.json").exists()


def test_null_fields_are_absent_ones(path):
    nulls: dict[str, Any] = {
        "image": None,
        "kind": None,
        "routing": None,
        "routing_weights": None,
        "video": None,
        "images": [],
    }
    path.write_text(lines(record(None, **nulls)).replace("<image>", ""))
    [sample] = read_samples(path)
    assert (sample.id, sample.images, sample.routing) == (f"{path}, record 1, line 1", (), None)


def test_windows_of_any_size_read_alike(path, monkeypatch):
    items = [record(n, text='é\n"{[' * (n % 7)) for n in range(40)]
    content = lines(*items[:10], '{"broken', *items[10:20], "") + json.dumps(items[20:30], indent=2, ensure_ascii=False)
    content += json.dumps(items[30:])
    expected = read(path, content)
    assert len(expected[0]) == 40 and len(expected[1]) == 1
    for size in (16, 17, 31, 64, 1000):
        monkeypatch.setattr(records, "CHUNK", size)
        assert read(path, content) == expected


def test_a_url_is_read_as_a_file_is():
    with fsspec.open("memory://records/data.jsonl", "w") as file:
        file.write(lines(*ABC))
    assert [value["id"] for _, value in read_records("memory://records/data.jsonl")] == ["a", "b", "c"]
    with pytest.raises(DataError, match="no data file memory://records/none"):
        list(read_records("memory://records/none.jsonl"))


def test_memory_is_that_of_a_record_and_time_is_linear(path):
    path.write_text("[" + ", ".join([json.dumps(record("x", text="t" * 500))] * 2000) + "]")  # one line of 1.3 MB
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * CHUNK

    def seconds(count: int) -> float:
        path.write_text((str(record(0)) + "\n") * count)
        errors: list[DataError] = []
        started = time.process_time()
        assert list(read_records(path, errors.append)) == []
        assert len(errors) == count
        return time.process_time() - started

    short, long = min(seconds(500) for _ in range(3)), seconds(4000)
    assert long < 20 * short, (short, long)  # quadratic time would be 64 times as long


def test_a_long_record_is_read_and_one_without_end_is_refused(path, monkeypatch):
    assert read(path, lines(record("a", text="x" * 3_000_000), record("b")))[0] == ["a", "b"]
    monkeypatch.setattr(records, "MAX_RECORD", 1 << 20)
    ids, errors = read(path, lines(record("a", text="x" * 3_000_000), record("b")))
    assert ids == ["b"] and errors == ["record 1, line 1: longer than 1 MiB: a bracket or quote is missing"]

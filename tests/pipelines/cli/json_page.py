"""Compares a document that a command printed with its table in docs/json.md."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE = (Path(__file__).parents[3] / "docs" / "json.md").read_text()
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "list": (list,),
    "any": (object, bool),
}
Path_ = tuple[str, ...]  # keys from the top of a document; "[]" for an element of a list


class Row(NamedTuple):
    """One line of a table."""

    path: Path_
    types: tuple[type, ...]
    optional: bool

    def describes(self, path: Path_) -> bool:
        """Whether a path of a document is this row's; a name in capitals is any name."""
        return len(path) == len(self.path) and all(
            named == key or (named.isupper() and key != "[]") for named, key in zip(self.path, path, strict=True)
        )

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        return isinstance(value, self.types) and (not isinstance(value, bool) or bool in self.types)


def keys_of(path: str) -> Path_:
    return tuple(part for part in path.replace("[]", ".[]").split(".") if part)


def documented(command: str, heading: str | None = None) -> list[Row]:
    """The table of a command, or the one below another heading."""
    title = re.escape(heading or f"## `mova {command}`")
    [section] = re.findall(rf"^{title}\n(.*?)(?=\n##|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(.+?)` \| (\w+) \| (.*) \|$", section, re.M)
    assert rows, f"docs/json.md has no table for {command}"
    return [Row(keys_of(path), TYPES[kind], "*optional*" in meaning) for path, kind, meaning in rows]


def entries(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value of a document with its path, containers included."""
    yield path, value
    if isinstance(value, dict):
        for key, part in value.items():
            yield from entries(part, (*path, key))
    elif isinstance(value, list):
        for part in value:
            yield from entries(part, (*path, "[]"))


def check(command: str, document: Any, heading: str | None = None) -> None:
    """Every key of the document is in the table with its type, and every key that is not optional is in the document."""
    rows = documented(command, heading)
    opaque: list[Path_] = []  # values whose inside the page does not describe
    empty: list[Path_] = []
    seen = set()
    for path, value in entries(document):
        if any(path[: len(above)] == above for above in opaque):
            continue
        row = next((row for row in rows if row.describes(path)), None)
        if row is not None:
            assert row.accepts(value), f"mova {command}: {'.'.join(path)} is {value!r}"
            seen.add(row)
            opaque.append(path)
        elif isinstance(value, dict | list):
            empty += [] if value else [path]
        else:
            above = [row for row in rows if row.optional and Row(row.path[: len(path)], (), True).describes(path)]
            assert value is None and above, f"docs/json.md lacks mova {command}: {'.'.join(path)} = {value!r}"
    for row in rows:
        nothing_there = any(Row(row.path[: len(path)], (), False).describes(path) for path in empty)
        assert row in seen or row.optional or nothing_there, f"mova {command} prints no {'.'.join(row.path)}"

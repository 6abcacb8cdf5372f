"""Records of a data file: JSON objects, read one at a time whatever the size of the file (docs/data_format.md).

A file holds JSON arrays of records, or records one after the other (JSONL), in UTF-8; or it is a Parquet file or a webdataset tar
(`mova_core.packed_records`). A record is known by its number in the file, counted from 1 over valid and invalid ones, because
one line may hold many. Imports no torch.
"""

import codecs
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mova_core.io.atomic import atomic_path
from mova_core.io.filesystem import open_seekable

CHUNK = 1 << 16  # bytes in memory, unless a record is longer; json's errors cost time in proportion to it
MAX_RECORD = 1 << 27  # bytes of a record; a longer one is taken for a file without ends of records

_BLANK = re.compile(
    "[ \t\r\n,\ufeff]*"
)  # a comma too many is harmless; a byte order mark may stand where files were joined
# Within a line: what may precede the next object, or the end of an array that ends the line; or the line's end.
_IN_LINE = re.compile(r"[,}\]]\s*(?=\{)|\}[ \t\r]*(?=\][ \t\r]*\n)|\n")
_IN_LAST_LINE = re.compile(r"[,}\]]\s*(?=\{)|\}[ \t\r]*(?=\][ \t\r]*(?:\n|\Z))|\n")
_EMPTY_ARRAY = re.compile(r"\[\s*\]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# First bytes of files that are no UTF-8 text, and what to do about them.
_OTHER_FORMATS = (
    (b"\x1f\x8b", "is compressed (gzip): unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd): unpack it"),
    (b"BZh", "is compressed (bzip2): unpack it"),
    (b"\xfd7zXZ", "is compressed (xz): unpack it"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
    (b"PAR1", "is a Parquet file without the suffix .parquet: rename it"),
    (b"\xff\xfe", "is UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text: save it as UTF-8"),
    (b"[\0", "is UTF-16 text: save it as UTF-8"),
    (b"{\0", "is UTF-16 text: save it as UTF-8"),
    (b"\0[", "is UTF-16 text: save it as UTF-8"),
    (b"\0{", "is UTF-16 text: save it as UTF-8"),
)


class DataError(ValueError):
    """A data file or one of its records is invalid; the message names the file, the record and the fix."""


class Position(NamedTuple):
    """Where a record stands.

    Attributes:
        path: its file.
        number: in the file, counted from 1 over valid and invalid records.
        line: on which it starts.
        offset, size: its bytes in a file of text or a tar; row group and row in a Parquet file.
    """

    path: str
    number: int
    line: int
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}, record {self.number}, line {self.line}"


def read_records(
    path: str | Path, on_invalid: Callable[[DataError], object] | None = None
) -> Iterator[tuple[Position, dict[str, Any]]]:
    """Yields every JSON object of a file with its position. Time is linear in the file's size, memory that of one record.

    Of an invalid record nothing is yielded; reading continues at the next line that can begin a record, and within a line at
    the next object with `conversations`. NaN and Infinity, which JSON does not have, are read as null.

    Args:
        path: the file, or its URL.
        on_invalid: receives the error of each record left out, and of an array that is never closed. Without `on_invalid` the
            first error is raised.

    Raises:
        DataError: no such file, a file of another format, or an error without `on_invalid`.
    """

    def refuse(problem: str) -> None:
        if on_invalid is None:
            raise DataError(problem)
        on_invalid(DataError(problem))

    try:
        if (packed := _packed(path)) is not None:
            yield from _of_packed(packed, path, refuse)
            return
        with open_seekable(path) as file:
            yield from _objects(_Text(file, path), path, refuse)
    except FileNotFoundError:
        raise DataError(f"no data file {path}: check the path") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


class RecordFile:
    """A data file of which single records are read, by one thread.

    Args:
        path: the file, or its URL.

    Raises:
        DataError, OSError: it cannot be read.
    """

    def __init__(self, path: str):
        self._packed = _packed(path)
        self._opened = ExitStack()
        self._file = None if self._packed is not None else self._opened.enter_context(open_seekable(path))

    def at(self, position: Position) -> dict[str, Any]:
        """The record that `read_records` found at a position of this file.

        Raises:
            DataError: no record begins and ends there: the file is another one now.
        """
        value: Any = None
        try:
            if self._file is None:
                value = self._packed.at((position.offset, position.size))
            else:
                self._file.seek(position.offset)
                text = self._file.read(position.size).decode()
                value, end = _DECODER.raw_decode(text)
                value = value if end == len(text) else None
        except (ValueError, LookupError, OSError):
            value = None
        if not isinstance(value, dict):
            raise DataError(f"{position}: the record is not there any more: the file has changed")
        return value

    def close(self) -> None:
        self._opened.close()


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> int:
    """Writes a JSON array, one record per line; a reader sees the whole former file or the whole new one.

    Returns:
        The number of records.

    Raises:
        ValueError: a record holds NaN or an infinity, for which JSON has no form.
    """
    path, count = Path(path), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(",\n" if count else "[\n")
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False))
            count += 1
        file.write("\n]\n" if count else "[\n\n]\n")
    return count


def _packed(path: str | Path) -> Any:
    """The reader of a Parquet file or tar; None for text.

    Raises:
        DataError: it cannot be read.
    """
    suffix = os.path.splitext(os.fspath(path))[1].lower()
    if suffix not in (".parquet", ".tar"):
        return None
    from mova_core import packed_records  # imports Arrow's Parquet reader, which text files need not wait for

    try:
        reader = packed_records.ParquetRecords if suffix == ".parquet" else packed_records.TarRecords
        return reader(os.fspath(path))
    except packed_records.BrokenFile as error:
        raise DataError(f"{path}: {error}") from None


def _of_packed(
    packed: Any, path: str | Path, refuse: Callable[[str], None]
) -> Iterator[tuple[Position, dict[str, Any]]]:
    """What a reader of `mova_core.packed_records` finds; number and line of a record are the same there."""
    number = 0
    rows = iter(packed)
    while True:
        try:
            (offset, size), record = next(rows)
        except StopIteration:
            return
        except (ValueError, OSError) as error:  # the rest cannot be read; Arrow's errors are of these kinds
            refuse(f"{path}, behind record {number}: {' '.join(str(error).split())}")
            return
        number += 1
        where = Position(os.fspath(path), number, number, offset, size)
        if isinstance(record, ValueError):
            refuse(f"{where}: {record}")
            continue
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            refuse(f"{where}: half a character (a lone surrogate): write the whole character")
            continue
        yield where, record


def _objects(
    text: "_Text", path: str | Path, refuse: Callable[[str], None]
) -> Iterator[tuple[Position, dict[str, Any]]]:
    number, arrays = 0, 0  # values so far, and the arrays that the next one stands in
    while (first := text.next_value()) is not None:
        if first == "[" and not (number and text.empty_array()):
            text.at += 1
            arrays += 1
            continue
        if first == "]" and arrays:
            text.at += 1
            arrays -= 1
            continue
        number += 1
        line, offset = text.line, text.byte
        try:
            value, end = text.read_value()
        except DataError as problem:
            refuse(f"{Position(os.fspath(path), number, line, offset, 0)}: {problem}")
            text.skip_invalid()
            continue
        text.move_to(end)
        where = Position(os.fspath(path), number, line, offset, text.byte - offset)
        if isinstance(value, dict):
            yield where, value
        else:
            refuse(f"{where}: a record must be a JSON object, this is {type(value).__name__}")
    if arrays:
        refuse(f"{path}, line {text.line}: the array is never closed; the file looks cut off")


class _Text:
    """The text of a file, of which a window is in memory; `at` is the place in `window` that has been read to."""

    def __init__(self, file: BinaryIO, path: str | Path):
        self.file, self.path = file, path
        self.size = file.seek(0, os.SEEK_END)
        self.window, self.at = "", 0
        self.line, self.byte, self._counted = 1, 0, 0  # line, and place in the file, of window[_counted]
        self.indent: int | None = 0  # characters before `at` on its line, None where another value precedes it
        self.ended = False  # whether the window reaches to the end of the file
        self._load(CHUNK)
        file.seek(0)
        head = file.read(8)
        for magic, problem in _OTHER_FORMATS:
            if head.startswith(magic):
                raise DataError(f"{path} {problem}")

    def next_value(self) -> str | None:
        """Moves `at` to the next value and returns its first character; None at the end of the file."""
        first_on_line = self.byte == 0 and self.at == 0
        indent = 0
        while True:
            blank = _BLANK.match(self.window, self.at)
            assert blank is not None
            _, newline, tail = blank[0].rpartition("\n")
            first_on_line = first_on_line or bool(newline)
            indent = len(tail) if newline else indent + len(blank[0])
            self.at = blank.end()
            if self.at < len(self.window):
                break
            if self.ended:
                self.move_to(self.at)
                return None
            self._load(CHUNK)
        self.move_to(self.at)
        self.indent = indent if first_on_line else None
        if len(self.window) > 2 * CHUNK:  # after a long record; errors would cost time in proportion to the window
            self._load(CHUNK)
        return self.window[self.at]

    def empty_array(self) -> bool:
        """Whether `[]` stands at `at`."""
        return _EMPTY_ARRAY.match(self.window, self.at) is not None

    def read_value(self) -> tuple[Any, int]:
        """The JSON value at `at`, and the place behind it. The window may move, so that `at` changes with it.

        Raises:
            DataError: the value is no valid JSON or no valid text.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.window, self.at)
                break
            except json.JSONDecodeError as error:
                # Only at the window's end can an error come from the missing rest; the longest token is a pair of escapes.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.window) - 16
                if not cut or self.ended:
                    line = self.line + self.window.count("\n", self.at, error.pos)
                    on_line = f" on line {line}" if line != self.line else ""
                    raise DataError(f"broken JSON{on_line} ({error.msg})") from None
                if len(self.window) - self.at >= MAX_RECORD:
                    raise DataError(f"longer than {MAX_RECORD >> 20} MiB: a bracket or quote is missing") from None
                self._load(max(CHUNK, 2 * (len(self.window) - self.at)))
            except RecursionError:
                raise DataError("its brackets are nested too deeply") from None
            except ValueError as error:  # of Python's limit of digits, or of the hooks below
                raise DataError(str(error).partition(";")[0]) from None
        _check_text(self.window[self.at : end], value)
        return value, end

    def skip_invalid(self) -> None:
        """Moves `at` behind the invalid value that begins there.

        The next line that is indented no deeper begins the next record: a line of a JSONL file, or a record of an array that
        has a record per line or is indented. Where another value precedes the invalid one on its line, the next object with
        `conversations` on that line is the next record.
        """
        indent = self.indent
        start = self.at + 1
        while True:
            if indent is not None:
                following = re.compile(rf"\n[ \t]{{0,{indent}}}(?=[^ \t\r\n}}])")
            else:
                following = _IN_LAST_LINE if self.ended else _IN_LINE
            match = following.search(self.window, start)
            if match is None and self.ended:
                self.at = len(self.window)
                return
            if match is None:
                # The next match may begin in the last characters of this window, of which the rest must be seen, too.
                last = self.window.rfind("\n", start)
                self.at = last if last > start else max(start, len(self.window) - 16)
                self._load(CHUNK)
                start = 0
                continue
            line_ends = match[0].startswith("\n")
            self.at = match.start() if line_ends else match.end()
            if line_ends or self.window[self.at] == "]" or self._record_begins():
                return
            start = self.at + 1

    def _record_begins(self) -> bool:
        """Whether a valid object with `conversations` stands at `at`."""
        try:
            value, _ = self.read_value()
        except DataError:
            return False
        return isinstance(value, dict) and "conversations" in value

    def move_to(self, place: int) -> None:
        """Makes `place` of the window the place that has been read to, and counts lines and bytes up to it."""
        self.at = place
        passed = self.window[self._counted : place]
        self.line += passed.count("\n")
        self.byte += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
        self._counted = place

    def _load(self, size: int) -> None:
        """Moves the window so that it begins at `at` and holds `size` bytes, fewer at the end of the file."""
        self.move_to(self.at)
        self.file.seek(self.byte)
        content = self.file.read(size)
        self.ended = self.byte + len(content) >= self.size
        # Bytes that are no UTF-8 become lone surrogates, so that only their record is invalid.
        self.window, _ = codecs.utf_8_decode(content, "surrogateescape", self.ended)
        self.at = self._counted = 0


def _check_text(source: str, value: Any) -> None:
    """Raises DataError for text that UTF-8 cannot hold: it could be neither written again nor be the name of a file."""
    if not source.isascii():
        try:
            source.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"byte 0x{ord(source[error.start]) - 0xDC00:02x} is no UTF-8 text") from None
    if _SURROGATE.search(source):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise DataError(f"{half} is half a character (a lone surrogate): write the whole character") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{repeated[:40]}` stands twice in one object")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_float=_finite, parse_constant=lambda _: None)

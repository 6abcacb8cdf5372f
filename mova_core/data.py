"""Samples: conversations about pictures, read from LLaVA's JSON format (docs/data_format.md).

Every error names the file and the line of the record. Imports no torch, so that a data file is checked before torch starts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mova_core.images import ImageError, ImageRef
from mova_core.io.atomic import write_atomic
from mova_core.io.filesystem import read_file
from mova_core.io.uris import absolute, joined, parent

IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class DataError(ValueError):
    """A data file or one of its records is invalid; the message names the file, the line and the fix."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation about any number of pictures.

    Attributes:
        id: the record's `id`; default its file and line.
        images: the pictures, in the order of the record.
        turns: (role, text), oldest first, with role "user", "assistant" or "system", as `MoVAProcessor` takes them.
        routing: labelled experts, lowest loss first; empty where no expert helps, None where the record has no label.
        extra: the record's other fields, unchanged.
        where: file and line of the record, for messages.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[tuple[str, str], ...]
    routing: tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def image(self) -> ImageRef | None:
        """The only picture; None for a conversation without pictures.

        Raises:
            DataError: the sample has several pictures.
        """
        if len(self.images) > 1:
            raise DataError(f"{self.where}: the record has {len(self.images)} pictures, only one can be used")
        return self.images[0] if self.images else None

    @property
    def question(self) -> str:
        """All user turns joined by line breaks, without image marks: what the gate and the router read."""
        return "\n".join(text.replace(IMAGE_MARK, "").strip() for role, text in self.turns if role == "user")

    @property
    def answer(self) -> str:
        """The last assistant turn, which evaluation compares with; empty where there is none."""
        return next((text for role, text in reversed(self.turns) if role == "assistant"), "")

    @property
    def length(self) -> int:
        """Words plus pictures, negated for a conversation without pictures, as `mova_core.samplers` takes it.

        Counts words, because counting tokens would need the tokenizer for every sample.
        """
        words = sum(len(text.replace(IMAGE_MARK, "").split()) for _, text in self.turns)
        return words + len(self.images) if self.images else -words


def read_samples(
    path: str | Path,
    images: str | Path | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    skipped: list[DataError] | None = None,
    pool: Sequence[str] | None = None,
) -> list[Sample]:
    """Reads a LLaVA JSON array (.json) or one record per line (.jsonl); docs/data_format.md describes the records.

    As in the published code, an assistant turn before the first question is dropped, and the mark of a single picture
    moves to the front of its turn; the marks of several pictures stay in place.

    Args:
        path: the file, or its URL.
        images: folder or URL that the records' `image` is relative to; default the file's own folder.
        on_error: "raise" ends at the first invalid record, "skip" leaves invalid records out. A JSON array with a syntax
            error raises in both cases, because the start of its next record is unknown.
        skipped: receives the error of every record left out.
        pool: experts in the order of `routing_weights`; default the published seven.

    Raises:
        DataError: the file is missing, holds no valid record, or a record is invalid; names file and line.
    """
    errors: list[DataError] = [] if skipped is None else skipped
    samples = list(iterate_samples(path, images, errors.append if on_error == "skip" else None, pool))
    if not samples:
        reason = f"no usable record, the first error: {errors[0]}" if errors else "no record"
        raise DataError(f"{path} holds {reason}: give a LLaVA JSON array or one JSON object per line")
    return samples


def iterate_samples(
    path: str | Path,
    images: str | Path | None = None,
    on_invalid: Callable[[DataError], object] | None = None,
    pool: Sequence[str] | None = None,
) -> Iterator[Sample]:
    """Yields what `read_samples` returns. `on_invalid` receives the errors of records left out; without it they are raised."""
    folder = images if images is not None else parent(path)
    for line, record in read_records(path, on_invalid):
        try:
            yield _sample(record, folder, f"{path}, line {line}", pool)
        except DataError as error:
            if on_invalid is None:
                raise
            on_invalid(error)


def read_records(
    path: str | Path, on_invalid: Callable[[DataError], object] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line on which the record starts, record) of a LLaVA JSON array or a JSONL file.

    Args:
        on_invalid: receives the error of each record left out: no valid JSON (JSONL only), or no JSON object. Without
            `on_invalid` the errors are raised.

    Raises:
        DataError: no such file, no UTF-8 text, or an array with a syntax error.
    """
    try:
        text = read_file(path).decode()
    except FileNotFoundError:
        raise DataError(f"no data file {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    decoder, at, line, counted_to = json.JSONDecoder(), 0, 1, 0
    array = text.lstrip()[:1] == "["
    if array:
        at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, counted_to = line + text.count("\n", counted_to, at), at
        if at >= len(text) or (array and text[at] == "]"):
            if array and at >= len(text):
                raise DataError(f"{path}, line {line}: the array is never closed; the file looks cut off")
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as cause:
            where = f"{path}, line {cause.lineno}: broken JSON in the record that starts on line {line}"
            invalid = DataError(f"{where} ({cause.msg})")
            if on_invalid is None or array:
                raise invalid from None
            at = text.find("\n", at) % (len(text) + 1)  # the next line; the end of the text where find returns -1
        else:
            if isinstance(record, dict):
                yield line, record
                continue
            invalid = DataError(f"{path}, line {line}: a record must be a JSON object, this is {type(record).__name__}")
        if on_invalid is None:
            raise invalid
        on_invalid(invalid)


def usable_samples(samples: Iterable[Sample], quarantine: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """Samples with pictures of which none is quarantined.

    Args:
        quarantine: rows with `image` (path or URL) and `sha256`, as `FeatureStore.quarantined` returns them.
    """
    return split_usable(samples, quarantine)[0]


def split_usable(
    samples: Iterable[Sample], quarantine: Iterable[Mapping[str, Any]]
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """`usable_samples`, and the others by the reason why they cannot be used: "no picture" or "picture in quarantine".

    A picture is quarantined while its file holds the bytes that could not be processed: a replaced file is usable again.
    """
    quarantined: dict[str, set[str | None]] = {}  # path -> keys; None: it could not be read
    for row in quarantine:
        if row["image"]:
            quarantined.setdefault(absolute(row["image"]), set()).add(row["sha256"])

    def is_quarantined(image: ImageRef) -> bool:
        path = absolute(image.path or "")
        try:
            return path in quarantined and image.key in quarantined[path]
        except ImageError:  # a quarantined picture that is unreadable now
            return True

    usable: list[Sample] = []
    left_out: dict[str, list[Sample]] = {}
    for sample in samples:
        if not sample.images:
            left_out.setdefault("no picture", []).append(sample)
        elif any(map(is_quarantined, sample.images)):
            left_out.setdefault("picture in quarantine", []).append(sample)
        else:
            usable.append(sample)
    return usable, left_out


def write_records(path: str | Path, records: list[dict[str, Any]]) -> None:
    """Writes a LLaVA JSON array, one record per line; a reader sees the whole former file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    write_atomic(path, f"[\n{body}\n]\n")


def _sample(record: dict[str, Any], folder: str | Path, where: str, pool: Sequence[str] | None) -> Sample:
    record = dict(record)
    conversation = record.pop("conversations", None)
    if not isinstance(conversation, list) or not conversation:
        raise DataError(f"{where}: a record needs `conversations`, a list of {{from, value}} turns")
    turns: list[tuple[str, str]] = []
    for turn in conversation:
        role = _ROLES.get(str(turn.get("from", ""))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise DataError(
                f"{where}: a turn needs `from` (human or gpt) and a text `value`, got {json.dumps(turn)[:120]}"
            )
        turns.append((role, turn["value"].strip()))
    while turns and turns[0][0] == "assistant":  # no question precedes it, so the published code drops it too
        turns.pop(0)
    if not any(role == "user" for role, _ in turns):
        raise DataError(f"{where}: a record needs a turn `from` human that asks something")
    pictures = record.pop("image", None)
    pictures = [] if pictures is None else pictures if isinstance(pictures, list) else [pictures]
    if not all(isinstance(picture, str) for picture in pictures):
        types = ", ".join(sorted({type(picture).__name__ for picture in pictures}))
        raise DataError(f"{where}: `image` must be one path or a list of paths, got {types}")
    return Sample(
        id=str(record.pop("id", where)),
        images=tuple(ImageRef(path=joined(folder, picture)) for picture in pictures),
        turns=_with_marks(turns, len(pictures), where),
        routing=_routing(record, pool, where),
        extra=record,
        where=where,
    )


def _with_marks(turns: list[tuple[str, str]], pictures: int, where: str) -> tuple[tuple[str, str], ...]:
    """Turns with one mark per picture, or without marks where every picture precedes the first question.

    `MoVAProcessor` puts pictures without marks in front of the first question, so the mark of a single picture is only
    needed in a later turn.
    """
    marks = [text.count(IMAGE_MARK) for _, text in turns]
    if sum(marks) > pictures or 0 < sum(marks) < pictures:
        raise DataError(f"{where}: {sum(marks)} {IMAGE_MARK} marks but {pictures} image{'' if pictures == 1 else 's'}")
    if sum(marks) != 1:
        return tuple(turns)
    first_question = next(index for index, (role, _) in enumerate(turns) if role == "user")
    without_mark = [(role, text.replace(IMAGE_MARK, "").strip()) for role, text in turns]
    marked = marks.index(1)
    if marked != first_question:
        without_mark[marked] = without_mark[marked][0], f"{IMAGE_MARK}\n{without_mark[marked][1]}"
    return tuple(without_mark)


def _routing(record: dict[str, Any], pool: Sequence[str] | None, where: str) -> tuple[str, ...] | None:
    """Labelled experts; removes their fields from the record."""
    routing, weights = record.pop("routing", None), record.pop("routing_weights", None)
    if routing is not None and not (isinstance(routing, list) and all(isinstance(name, str) for name in routing)):
        raise DataError(f"{where}: `routing` must be a list of expert names")
    if weights is None:
        return None if routing is None else tuple(routing)
    if pool is None:
        from mova_core.experts import EXPERTS  # imports torch, which records without weights need not wait for

        pool = EXPERTS
    if not isinstance(weights, list) or len(weights) != len(pool) or any(weight not in (0, 1) for weight in weights):
        wanted = f"{len(pool)} zeros and ones ({', '.join(pool)})"
        raise DataError(f"{where}: `routing_weights` must be {wanted}, got {json.dumps(weights)[:80]}")
    named = tuple(name for name, weight in zip(pool, weights, strict=True) if weight)
    if routing is not None and set(routing) != set(named):
        raise DataError(f"{where}: `routing` and `routing_weights` name different experts; keep one of them")
    return named if routing is None else tuple(routing)

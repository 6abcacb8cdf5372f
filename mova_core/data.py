"""Samples: conversations about pictures, made of LLaVA's records (docs/data_format.md).

Every error names the file, the number and the line of the record. Imports no torch, so that a data file is checked before
torch starts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mova_core.images import ImageError, ImageRef
from mova_core.io.uris import absolute, joined, parent
from mova_core.records import DataError, Position, read_records, write_records

__all__ = [
    "IMAGE_MARK",
    "DataError",
    "Sample",
    "Turn",
    "iterate_samples",
    "read_records",
    "read_samples",
    "sample_of",
    "split_usable",
    "usable_samples",
    "write_records",
]

IMAGE_MARK = "<image>"
LONGEST_PATH = 4096  # characters; no filesystem takes more
Turn = tuple[str, str]  # role and text
# Fields of other formats that hold what these records are about. A record that has one is refused: without it the
# conversation would be learnt as words about nothing.
_UNREAD = {
    "images": "name it `image`",
    "video": "only pictures can be used",
    "videos": "only pictures can be used",
    "audio": "only pictures can be used",
    "audios": "only pictures can be used",
}
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation about any number of pictures.

    Attributes:
        id: the record's `id`; default its place.
        images: the pictures, in the order of the record.
        turns: (role, text), oldest first, with role "user", "assistant" or "system", as `MoVAProcessor` takes them.
        routing: labelled experts, lowest loss first; empty where no expert helps, None where the record has no label.
        extra: the record's other fields, unchanged.
        where: file, number and line of the record, for messages.
        number: of the record in its file, counted from 1 over valid and invalid records; the record's key.
    """

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    routing: tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    number: int = 0

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
    def exchanges(self) -> list[tuple[tuple[Turn, ...], str, str]]:
        """(history, question, answer) of each user turn that an answer follows; the history is all turns before it."""
        return [
            (self.turns[:index], text, self.turns[index + 1][1])
            for index, (role, text) in enumerate(self.turns[:-1])
            if role == "user" and self.turns[index + 1][0] == "assistant" and self.turns[index + 1][1]
        ]

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

    As in the published code, an assistant turn before the first question is dropped (also after a system turn), and the
    mark of a single picture moves to the front of its turn; the marks of several pictures stay in place.

    Args:
        path: the file, or its URL.
        images: folder or URL that the records' `image` is relative to; default the file's own folder.
        on_error: "raise" ends at the first invalid record, "skip" leaves invalid records out.
        skipped: receives the error of every record left out.
        pool: experts in the order of `routing_weights`; default the published seven.

    Raises:
        DataError: the file is missing, holds no valid record, or a record is invalid; names file, record and line.
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
    for position, record in read_records(path, on_invalid):
        try:
            yield sample_of(record, folder, position, pool)
        except DataError as error:
            if on_invalid is None:
                raise
            on_invalid(error)


def usable_samples(samples: Iterable[Sample], quarantine: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """Samples with pictures of which none is quarantined.

    Args:
        quarantine: rows with `image` (path or URL) and `sha256`, as `FeatureStore.quarantined` returns them.
    """
    return split_usable(samples, quarantine)[0]


def split_usable(
    samples: Iterable[Sample], quarantine: Iterable[Mapping[str, Any]]
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """`usable_samples`, and the others by the reason why they cannot be used: "no picture" or "picture in quarantine"."""
    is_quarantined = quarantine_check(quarantine)
    usable: list[Sample] = []
    left_out: dict[str, list[Sample]] = {}
    for sample in samples:
        if not sample.images:
            left_out.setdefault("no picture", []).append(sample)
        elif any(is_quarantined(image.path or "") for image in sample.images):
            left_out.setdefault("picture in quarantine", []).append(sample)
        else:
            usable.append(sample)
    return usable, left_out


def quarantine_check(quarantine: Iterable[Mapping[str, Any]]) -> Callable[[str], bool]:
    """Tells whether the picture at a path or URL is quarantined.

    It is while its file holds the bytes that could not be processed: a replaced file is usable again.

    Args:
        quarantine: as `usable_samples` takes it.
    """
    keys: dict[str, set[str | None]] = {}  # by path; None: it could not be read
    for row in quarantine:
        if row["image"]:
            keys.setdefault(absolute(row["image"]), set()).add(row["sha256"])

    def is_quarantined(path: str) -> bool:
        path = absolute(path)
        try:
            return path in keys and ImageRef(path=path).key in keys[path]
        except ImageError:  # a quarantined picture that is unreadable now
            return True

    return is_quarantined


def sample_of(record: dict[str, Any], folder: str | Path, position: Position, pool: Sequence[str] | None) -> Sample:
    """The sample that a record describes; arguments and errors as those of `iterate_samples`."""
    record, where = dict(record), str(position)
    conversation = record.pop("conversations", None)
    if not isinstance(conversation, list) or not conversation:
        instead = " (`messages` is not read)" if record.get("messages") else ""
        raise DataError(f"{where}: a record needs `conversations`, a list of {{from, value}} turns{instead}")
    for name, advice in _UNREAD.items():
        if record.get(name):
            raise DataError(f"{where}: `{name}` is not read: {advice}")
    turns: list[Turn] = []
    for turn in conversation:
        role = _ROLES.get(str(turn.get("from", ""))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise DataError(
                f"{where}: a turn needs `from` (human or gpt) and a text `value`, got {json.dumps(turn)[:120]}"
            )
        turns.append((role, turn["value"].strip()))
    first_question = next((index for index, (role, _) in enumerate(turns) if role == "user"), None)
    if first_question is None:
        raise DataError(f"{where}: a record needs a turn `from` human that asks something")
    # An answer that no question precedes is dropped by the published code, too; a system turn stays.
    turns = [turn for index, turn in enumerate(turns) if index >= first_question or turn[0] == "system"]
    pictures = _pictures(record.pop("image", None), where)
    name = record.pop("id", None)
    return Sample(
        id=where if name is None else str(name),
        images=tuple(ImageRef(path=joined(folder, picture)) for picture in pictures),
        turns=_with_marks(turns, len(pictures), where),
        routing=_routing(record, pool, where),
        extra=record,
        where=where,
        number=position.number,
    )


def _pictures(image: Any, where: str) -> list[str]:
    """The paths that a record's `image` names."""
    pictures = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(picture, str) for picture in pictures):
        types = ", ".join(sorted({type(picture).__name__ for picture in pictures}))
        raise DataError(f"{where}: `image` must be one path or a list of paths, got {types}")
    for picture in pictures:
        if not picture.strip() or "\0" in picture:
            raise DataError(f"{where}: `image` {picture[:80]!r} is no path: it is empty or has a NUL character")
        if picture[:5].lower() == "data:" and "," in picture[:LONGEST_PATH]:
            raise DataError(
                f"{where}: `image` is a data URI ({picture[:16]}... of {len(picture):,} characters): write the picture to a "
                "file and give its path"
            )
        if len(picture) > LONGEST_PATH:
            raise DataError(
                f"{where}: `image` {picture[:40]!r}... of {len(picture):,} characters is too long for a path"
            )
    return pictures


def _with_marks(turns: list[Turn], pictures: int, where: str) -> tuple[Turn, ...]:
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
    if routing is not None and len(set(routing)) < len(routing):
        raise DataError(f"{where}: `routing` names an expert twice: {', '.join(routing)[:80]}")
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

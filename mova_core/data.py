"""Samples: questions on pictures in LLaVA's format, read with every broken record named by its line."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mova_core.images import ImageError, ImageRef

IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class DataError(ValueError):
    """A data file or one of its records is not what it should be; the message names the file, the line and the fix."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation on at most one picture."""

    id: str
    image: ImageRef | None
    turns: tuple[
        tuple[str, str], ...
    ]  # (role, text) with role "user", "assistant" or "system"; text without the image mark
    routing: tuple[str, ...] | None = None  # labelled experts, lowest loss first; None where nobody labelled it
    extra: dict[str, Any] = field(default_factory=dict)  # the record's other fields, as they stood
    where: str = ""  # file and line it was read from

    @property
    def question(self) -> str:
        """What the user asked, all turns (the text the gate and the router read)."""
        return "\n".join(text for role, text in self.turns if role == "user")

    @property
    def answer(self) -> str:
        """The last answer: the truth that evaluation compares with."""
        return next((text for role, text in reversed(self.turns) if role == "assistant"), "")


def read_samples(path: str | Path, images: str | Path | None = None) -> list[Sample]:
    """Reads a LLaVA JSON array (.json) or one record a line (.jsonl).

    Args:
        path: the file.
        images: folder that the records' `image` is relative to; default the file's own folder.

    Raises:
        DataError: the file is missing, empty, or a record is broken; names file and line.
    """
    path = Path(path)
    root = Path(images) if images is not None else path.parent
    samples = [_sample(record, root, f"{path}, line {line}") for line, record in read_records(path)]
    if not samples:
        raise DataError(f"{path} holds no record: give a LLaVA JSON array or one JSON object a line")
    return samples


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line the record starts on, the record) of a LLaVA JSON array or a JSONL file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"no data file {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    decoder, at, line, seen = json.JSONDecoder(), 0, 1, 0
    array = text.lstrip()[:1] == "["
    if array:
        at = text.index("[") + 1
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, seen = line + text.count("\n", seen, at), at
        if at >= len(text) or (array and text[at] == "]"):
            if array and at >= len(text):
                raise DataError(f"{path}, line {line}: the array is never closed; the file looks cut off")
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {error.lineno}: broken JSON in the record that starts on line {line} ({error.msg})"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {line}: a record must be a JSON object, this is {type(record).__name__}")
        yield line, record


def usable_samples(samples: Iterable[Sample], quarantine: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """Samples with a picture that is not in quarantine; one that was replaced since it was put there counts as good.

    Args:
        quarantine: rows with `image` (path) and `sha256`, as `FeatureStore.quarantined` gives them.
    """
    refused = {str(Path(row["image"]).resolve()): row["sha256"] for row in quarantine if row["image"]}

    def good(image: ImageRef) -> bool:
        path = str(Path(image.path or "").resolve())
        try:
            return path not in refused or image.key != refused[path]
        except ImageError:
            return False

    return [sample for sample in samples if sample.image is not None and good(sample.image)]


def write_records(path: str | Path, records: list[dict[str, Any]]) -> None:
    """Writes a LLaVA JSON array, one record a line, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    body = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    draft.write_text(f"[\n{body}\n]\n", encoding="utf-8")
    draft.replace(path)


def _sample(record: dict[str, Any], root: Path, where: str) -> Sample:
    record = dict(record)
    conversation = record.pop("conversations", None)
    if not isinstance(conversation, list) or not conversation:
        raise DataError(f"{where}: a record needs `conversations`, a list of {{from, value}} turns")
    turns: list[tuple[str, str]] = []
    marks = 0
    for turn in conversation:
        role = _ROLES.get(turn.get("from", "")) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise DataError(
                f"{where}: a turn needs `from` (human or gpt) and a text `value`, got {json.dumps(turn)[:120]}"
            )
        marks += turn["value"].count(IMAGE_MARK)
        turns.append((role, turn["value"].replace(IMAGE_MARK, "").strip()))
    image = record.pop("image", None)
    if image is not None and not any(role == "user" for role, _ in turns):
        raise DataError(f"{where}: a record with an image needs a turn `from` human that asks about it")
    if image is not None and not isinstance(image, str):
        raise DataError(f"{where}: `image` must be one path, got {type(image).__name__}")
    if marks > (image is not None):
        raise DataError(f"{where}: {marks} {IMAGE_MARK} marks but {int(image is not None)} image")
    routing = record.pop("routing", None)
    if routing is not None and not (isinstance(routing, list) and all(isinstance(name, str) for name in routing)):
        raise DataError(f"{where}: `routing` must be a list of expert names")
    return Sample(
        id=str(record.pop("id", where)),
        image=None if image is None else ImageRef(path=str(root / image)),
        turns=tuple(turns),
        routing=None if routing is None else tuple(routing),
        extra=record,
        where=where,
    )

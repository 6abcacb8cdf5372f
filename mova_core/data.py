"""Samples: questions on pictures in LLaVA's format, read with every broken record named by its line; and the order in which
batches take them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mova_core.experts import EXPERTS
from mova_core.images import ImageError, ImageRef
from mova_core.io.filesystem import read_file
from mova_core.io.uris import absolute, joined, parent

IMAGE_MARK = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class DataError(ValueError):
    """A data file or one of its records is not what it should be; the message names the file, the line and the fix."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation on any number of pictures."""

    id: str
    images: tuple[ImageRef, ...]
    turns: tuple[tuple[str, str], ...]  # (role, text) with role "user", "assistant" or "system", for `MoVAProcessor`
    routing: tuple[str, ...] | None = None  # labelled experts, lowest loss first; None where nobody labelled it
    extra: dict[str, Any] = field(default_factory=dict)  # the record's other fields, as they stood
    where: str = ""  # file and line it was read from

    @property
    def image(self) -> ImageRef | None:
        """Its only picture; None for text alone.

        Raises:
            DataError: it has several.
        """
        if len(self.images) > 1:
            raise DataError(
                f"{self.where}: it has {len(self.images)} pictures where only one can be used: leave it out"
            )
        return self.images[0] if self.images else None

    @property
    def question(self) -> str:
        """What the user asked, all turns (the text the gate and the router read), without image marks."""
        return "\n".join(text.replace(IMAGE_MARK, "").strip() for role, text in self.turns if role == "user")

    @property
    def answer(self) -> str:
        """The last answer: the truth that evaluation compares with."""
        return next((text for role, text in reversed(self.turns) if role == "assistant"), "")

    @property
    def length(self) -> int:
        """Words and pictures, negative for text alone: what `modality_groups` sorts by, without any tokenizer."""
        words = sum(len(text.replace(IMAGE_MARK, "").split()) for _, text in self.turns)
        return words + len(self.images) if self.images else -words


def read_samples(
    path: str | Path,
    images: str | Path | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    skipped: list[DataError] | None = None,
    pool: Sequence[str] = EXPERTS,
) -> list[Sample]:
    """Reads a LLaVA JSON array (.json) or one record a line (.jsonl).

    A record has `conversations`, and may have `id`, `image` (a path or a list of them) and its experts: their names in
    `routing`, or `routing_weights`, one 0 or 1 per expert of `pool`. As in the published code an assistant's turn before the
    first question is left out and a single picture goes to the front of its turn; several stay at their marks.

    Args:
        path: the file, or its URL.
        images: folder or URL that the records' `image` is relative to; default the file's own folder.
        on_error: whether the first broken record ends it, or all are left out. A JSON array that cannot be parsed is always
            fatal: nobody knows where its next record starts.
        skipped: takes the error of every record left out, which names its line.
        pool: experts in the order of `routing_weights`.

    Raises:
        DataError: the file is missing, holds no usable record, or a record is broken; names file and line.
    """
    refused: list[DataError] = [] if skipped is None else skipped
    samples = list(iterate_samples(path, images, refused.append if on_error == "skip" else None, pool))
    if not samples:
        why = f"no usable record, the first error: {refused[0]}" if refused else "no record"
        raise DataError(f"{path} holds {why}: give a LLaVA JSON array or one JSON object a line")
    return samples


def iterate_samples(
    path: str | Path,
    images: str | Path | None = None,
    broken: Callable[[DataError], object] | None = None,
    pool: Sequence[str] = EXPERTS,
) -> Iterator[Sample]:
    """As `read_samples`, one after another. `broken` takes the errors of records left out; without it they are raised."""
    root = images if images is not None else parent(path)
    for line, record in read_records(path, broken):
        try:
            yield _sample(record, root, f"{path}, line {line}", pool)
        except DataError as error:
            if broken is None:
                raise
            broken(error)


def read_records(
    path: str | Path, broken: Callable[[DataError], object] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line the record starts on, the record) of a LLaVA JSON array or a JSONL file.

    `broken` takes the error of each record that is left out: no JSON (in JSONL) or no object. Without it they are raised.
    """
    try:
        text = read_file(path).decode()
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
        except json.JSONDecodeError as cause:
            where = f"{path}, line {cause.lineno}: broken JSON in the record that starts on line {line}"
            refusal = DataError(f"{where} ({cause.msg})")
            if broken is None or array:
                raise refusal from None
            at = text.find("\n", at) % (len(text) + 1)  # the next line; the end where there is none
        else:
            if isinstance(record, dict):
                yield line, record
                continue
            refusal = DataError(f"{path}, line {line}: a record must be a JSON object, this is {type(record).__name__}")
        if broken is None:
            raise refusal
        broken(refusal)


def usable_samples(samples: Iterable[Sample], quarantine: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """Samples with pictures of which none is in quarantine; one that was replaced since it was put there counts as good.

    Args:
        quarantine: rows with `image` (path) and `sha256`, as `FeatureStore.quarantined` gives them.
    """
    refused = {absolute(row["image"]): row["sha256"] for row in quarantine if row["image"]}

    def good(image: ImageRef) -> bool:
        path = absolute(image.path or "")
        try:
            return path not in refused or image.key != refused[path]
        except ImageError:
            return False

    return [sample for sample in samples if sample.images and all(map(good, sample.images))]


def write_records(path: str | Path, records: list[dict[str, Any]]) -> None:
    """Writes a LLaVA JSON array, one record a line, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    body = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    draft.write_text(f"[\n{body}\n]\n", encoding="utf-8")
    draft.replace(path)


def length_groups(lengths: Sequence[int], batch_size: int, world_size: int, generator: Any = None) -> list[int]:
    """A random order of samples in which the batches of one step are of similar length, the longest first.

    The published trainer's order for the same generator: chance forms groups of world_size * batch_size, each sorted by
    length and dealt out so that every worker's batch is about equally long in all.
    """
    import torch  # who only reads data should not wait for it

    group = world_size * batch_size
    order = torch.randperm(len(lengths), generator=generator).tolist()
    dealt = []
    for start in range(0, len(order), group):
        indices = sorted(order[start : start + group], key=lambda index: lengths[index], reverse=True)
        dealt += [index for batch in even_batches(indices, lengths, world_size) for index in batch]
    return dealt


def even_batches(indices: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deals indices into `count` batches of one size, each index to the shortest so far; by turns where sizes must differ."""
    if len(indices) % count:
        return [list(indices[start::count]) for start in range(count)]
    batches: list[list[int]] = [[] for _ in range(count)]
    for index in indices:
        open_ = [batch for batch in batches if len(batch) < len(indices) // count]
        min(open_, key=lambda batch: sum(lengths[member] for member in batch)).append(index)
    return batches


def modality_groups(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: Any = None, within: Any = None
) -> list[int]:
    """As `length_groups`, but no step mixes samples with pictures and text alone, except what is left over at the end.

    Args:
        lengths: of samples, negative for text alone, as `Sample.length`.
        generator: of the order of the steps.
        within: of the order within a modality; None takes torch's global one, as published.

    Raises:
        ValueError: a length of zero.
    """
    import torch

    if not all(lengths):
        raise ValueError("a sample of length 0 belongs to neither modality: leave it out")
    kinds = [[index for index, length in enumerate(lengths) if (length > 0) == pictured] for pictured in (True, False)]
    if not all(kinds):
        return length_groups([abs(length) for length in lengths], batch_size, world_size, generator)
    group = world_size * batch_size
    whole, rest = [], []
    for kind in kinds:
        order = length_groups([abs(lengths[index]) for index in kind], batch_size, world_size, within)
        steps = [[kind[place] for place in order[start : start + group]] for start in range(0, len(order), group)]
        whole += steps[:-1]
        rest += steps[-1]
    steps = [whole[place] for place in torch.randperm(len(whole), generator=generator).tolist()]
    return [index for step in [*steps, sorted(rest)] for index in step]


def _sample(record: dict[str, Any], root: str | Path, where: str, pool: Sequence[str]) -> Sample:
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
    while turns and turns[0][0] == "assistant":  # it answers nothing
        turns.pop(0)
    if not any(role == "user" for role, _ in turns):
        raise DataError(f"{where}: a record needs a turn `from` human that asks something")
    pictures = record.pop("image", None)
    pictures = [] if pictures is None else pictures if isinstance(pictures, list) else [pictures]
    if not all(isinstance(picture, str) for picture in pictures):
        kinds = ", ".join(sorted({type(picture).__name__ for picture in pictures}))
        raise DataError(f"{where}: `image` must be one path or a list of paths, got {kinds}")
    return Sample(
        id=str(record.pop("id", where)),
        images=tuple(ImageRef(path=joined(root, picture)) for picture in pictures),
        turns=_placed(turns, len(pictures), where),
        routing=_routing(record, pool, where),
        extra=record,
        where=where,
    )


def _placed(turns: list[tuple[str, str]], pictures: int, where: str) -> tuple[tuple[str, str], ...]:
    """Turns whose image marks are as many as the pictures; none where all stand before the first question anyway."""
    marks = [text.count(IMAGE_MARK) for _, text in turns]
    if sum(marks) > pictures or 0 < sum(marks) < pictures:
        raise DataError(f"{where}: {sum(marks)} {IMAGE_MARK} marks but {pictures} image{'' if pictures == 1 else 's'}")
    if sum(marks) != 1:
        return tuple(turns)
    first = next(index for index, (role, _) in enumerate(turns) if role == "user")
    plain = [(role, text.replace(IMAGE_MARK, "").strip()) for role, text in turns]
    at = marks.index(1)
    if at != first:
        plain[at] = plain[at][0], f"{IMAGE_MARK}\n{plain[at][1]}"
    return tuple(plain)


def _routing(record: dict[str, Any], pool: Sequence[str], where: str) -> tuple[str, ...] | None:
    """Labelled experts; takes their fields out of the record."""
    routing, weights = record.pop("routing", None), record.pop("routing_weights", None)
    if routing is not None and not (isinstance(routing, list) and all(isinstance(name, str) for name in routing)):
        raise DataError(f"{where}: `routing` must be a list of expert names")
    if weights is None:
        return None if routing is None else tuple(routing)
    if not isinstance(weights, list) or len(weights) != len(pool) or any(weight not in (0, 1) for weight in weights):
        asked = f"{len(pool)} zeros and ones ({', '.join(pool)})"
        raise DataError(f"{where}: `routing_weights` must be {asked}, got {json.dumps(weights)[:80]}")
    named = tuple(name for name, weight in zip(pool, weights, strict=True) if weight)
    if routing is not None and set(routing) != set(named):
        raise DataError(f"{where}: `routing` and `routing_weights` name different experts; keep one of them")
    return named if routing is None else tuple(routing)

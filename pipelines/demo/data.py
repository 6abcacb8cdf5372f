"""The demo's data set: real pictures and questions whose answers are measured, written as LLaVA data.

`sources.py` says on which side of the train/test split each source stands; the pictures are crops, mirrorings, lightings and
drawings of them. An answer is either how the picture was made (which stamp in which corner) or measured on the finished
pixels, and what is too close to call is not asked.
"""

import hashlib
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from pipelines.demo.charts import GROUNDS, chart
from pipelines.demo.documents import PAPERS, STAMPS, document
from pipelines.demo.photographs import DIGIT_INKS, TINTS, digit, medical, photo
from pipelines.demo.picture import CORNERS, INKS, Picture, Traits
from pipelines.demo.questions import QUESTIONS, choose_forms

_MODALITIES = ("CT", "MR", "ultrasound", "eye", "microscope")
# Traits that are dealt evenly over the pictures of a kind.
_DEALT: dict[str, dict[str, tuple[Any, ...]]] = {
    "photo": {
        "corner": CORNERS, "light": ("dark", "bright"), "tone": ("colour", "grey", "tint"),
        "tint": tuple(TINTS), "focus": ("sharp", "blurred"),
    },
    "chart": {
        "type": ("bar", "line"), "trend": ("rise", "fall"),
        "bars": tuple((n, at) for n in (3, 4, 5, 6) for at in ("left", "middle", "right") if (n, at) != (4, "middle")),
        "legend": ("yes", "no"), "background": tuple(GROUNDS), "colour": tuple(INKS),
    },
    "document": {
        "type": ("article", "article", "letter", "form", "table"), "columns": (1, 2, 3), "heading": ("yes", "no"),
        "corner": CORNERS, "stamp": STAMPS, "paper": tuple(PAPERS),
    },
    "digit": {
        "corner": CORNERS, "value": tuple("0123456789"), "ink": tuple(DIGIT_INKS), "size": ("large", "small"),
    },
    "medical": {
        "view": tuple((kind, look) for kind in _MODALITIES for look in ("colour", "grey", "negative")),
        "side": ("left", "right"),
        "corner": CORNERS, "marker": ("L", "R"),
    },
}  # fmt: skip
_DRAW: dict[str, Callable[[Generator, str, Traits], Picture]] = {
    "photo": photo, "chart": chart, "document": document, "digit": digit, "medical": medical,
}  # fmt: skip
KINDS = tuple(_DRAW)
# Files whose code decides the pictures: a change of any makes a new build.
_RECIPE = ("charts.py", "data.py", "documents.py", "photographs.py", "picture.py", "questions.py", "sources.py")
_MARKER = "demo_data.json"  # the parameters of the build; "finished" is set last


@dataclass(frozen=True)
class DemoData:
    """Files of the demo's data. "image" in a record is relative to the folder `images`, as in LLaVA's data."""

    folder: Path
    train: Path  # LLaVA JSON
    test: Path
    images: Path
    bad: tuple[Path, ...]  # files in `images` that hold no usable picture; no record names them


def _deal(rng: Generator, count: int, options: Sequence[Any]) -> list[Any]:
    """`count` values in random order; each option occurs as often as any other, give or take one."""
    order = [int(i) for i in rng.permutation(len(options))]
    cards = [options[order[i % len(options)]] for i in range(count)]
    return [cards[int(i)] for i in rng.permutation(count)]


def _write_bad_files(bad: tuple[Path, ...], jpeg: bytes) -> None:
    """Writes files that no pipeline can use: half a JPEG, no bytes, 144 million pixels in a few kilobytes, and text."""
    truncated, empty, bomb, notes = bad
    truncated.write_bytes(jpeg[: len(jpeg) // 2])
    empty.write_bytes(b"")
    notes.write_text("These are notes that somebody gave the wrong name.\n", encoding="utf-8")
    packer = zlib.compressobj(9)
    row = bytes(1 + 12000 // 8)  # filter byte, then one bit per pixel
    data = b"".join(packer.compress(row) for _ in range(12000)) + packer.flush()
    with bomb.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", 12000, 12000, 1, 0, 0, 0, 0)),
            (b"IDAT", data),
            (b"IEND", b""),
        ):
            file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))


def build_demo_data(
    folder: Path, seed: int = 0, images: int = 480, progress: Callable[[int, int], None] | None = None
) -> DemoData:
    """Draws pictures with three questions each, three quarters of them for training, and writes them as LLaVA data.

    The same seed and package versions give the same bytes. A finished build with the same parameters is reused; an
    unfinished or different build is replaced.

    Args:
        images: number of pictures.
        progress: called with (done, images) after each picture.

    Raises:
        FileExistsError: `folder` holds files that this function did not write.
        FileNotFoundError: an installed package does not hold a source file.
    """
    folder = Path(folder)
    images_folder, marker = folder / "images", folder / _MARKER
    bad = tuple(images_folder / name for name in ("truncated.jpg", "empty.png", "bomb.png", "notes.png"))
    result = DemoData(folder, folder / "train.json", folder / "test.json", images_folder, bad)
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in _RECIPE)
    build = {"seed": seed, "images": images, "recipe": hashlib.sha256(code).hexdigest()[:16]}
    if marker.is_file():
        if marker.read_text() == json.dumps({**build, "finished": True}):
            return result
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no demo data: name an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({**build, "finished": False}))
    shutil.rmtree(images_folder, ignore_errors=True)
    images_folder.mkdir()

    done = 0

    def drawn() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, images)

    records: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for index, kind in enumerate(KINDS):
        count = images // len(KINDS) + (index < images % len(KINDS))
        train = _draw_split(images_folder, kind, "train", count - count // 4, [seed, index, 0], None, drawn)
        known = {(record["form"], record["conversations"][1]["value"]) for record in train}
        test = _draw_split(images_folder, kind, "test", count // 4, [seed, index, 1], known, drawn)
        records["train"] += train
        records["test"] += test
    _write_bad_files(bad, (images_folder / records["train"][0]["image"]).read_bytes())
    for split, file in (("train", result.train), ("test", result.test)):
        file.write_text(json.dumps(records[split], indent=1) + "\n", encoding="utf-8")
    marker.write_text(json.dumps({**build, "finished": True}))
    return result


def _draw_split(
    folder: Path,
    kind: str,
    split: str,
    count: int,
    seeds: Sequence[int],
    known: set[tuple[str, str]] | None,
    drawn: Callable[[], None],
) -> list[dict[str, Any]]:
    """Draws the pictures of one kind and split into `folder`; returns their records.

    Args:
        known: (form, answer) pairs of the training records: the test records ask for no other answer. None: no limit.
        drawn: called after each picture.
    """
    rng = np.random.default_rng(seeds)
    traits = {key: _deal(rng, count, values) for key, values in _DEALT[kind].items()}
    pictures = []
    for number in range(count):
        of_picture = {key: values[number] for key, values in traits.items()}
        picture = _DRAW[kind](np.random.default_rng([*seeds, number]), split, of_picture)
        if known is not None:
            picture = replace(picture, facts={f: a for f, a in picture.facts.items() if (f, a) in known})
        pictures.append(picture)
        drawn()
    records = []
    for number, (picture, forms) in enumerate(zip(pictures, choose_forms(rng, pictures), strict=True)):
        name = f"{kind}-{split}-{number:04d}"
        as_jpeg = kind in ("photo", "digit") or (kind != "chart" and rng.random() < 0.5)
        file = folder / (name + (".jpg" if as_jpeg else ".png"))
        picture.image.save(file, quality=int(rng.integers(85, 96)))  # PNG has no quality and ignores it
        for form in forms:
            question = str(rng.choice(QUESTIONS[form]))
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": picture.facts[form]},
            ]
            source = "+".join(picture.sources)
            records.append(
                {
                    "id": f"{name}-{form}",
                    "image": file.name,
                    "conversations": turns,
                    "kind": kind,
                    "form": form,
                    "source": source,
                }
            )
    return records

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
from pipelines.demo.picture import CORNERS, INKS, Picture, Wish
from pipelines.demo.questions import QUESTIONS, choose_forms

_MODALITIES = ("CT", "MR", "ultrasound", "eye", "microscope")
# What is dealt evenly over the pictures of a kind.
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
_DRAW: dict[str, Callable[[Generator, str, Wish], Picture]] = {
    "photo": photo, "chart": chart, "document": document, "digit": digit, "medical": medical,
}  # fmt: skip
KINDS = tuple(_DRAW)
# Other code draws other pictures.
_RECIPE = ("charts.py", "data.py", "documents.py", "photographs.py", "picture.py", "questions.py", "sources.py")
_MARKER = "demo_data.json"  # says what the folder holds; "finished" turns true last


@dataclass(frozen=True)
class DemoData:
    """Where the data lie. The records' "image" is relative to `images`, as LLaVA's image folder wants it."""

    folder: Path
    train: Path  # LLaVA JSON
    test: Path
    images: Path
    bad: tuple[Path, ...]  # files in `images` that are no usable picture and that no record names


def _deal(rng: Generator, count: int, options: Sequence[Any]) -> list[Any]:
    """`count` values in random order, every option as often as every other (give or take one)."""
    order = [int(i) for i in rng.permutation(len(options))]
    cards = [options[order[i % len(options)]] for i in range(count)]
    return [cards[int(i)] for i in rng.permutation(count)]


def _spoil(bad: tuple[Path, ...], jpeg: bytes) -> None:
    """Four files that no pipeline can use: half a JPEG, nothing, 144 million pixels in a few kilobytes, and text."""
    truncated, empty, bomb, notes = bad
    truncated.write_bytes(jpeg[: len(jpeg) // 2])
    empty.write_bytes(b"")
    notes.write_text("These are notes that somebody gave the wrong name.\n", encoding="utf-8")
    packer = zlib.compressobj(9)
    row = bytes(1 + 12000 // 8)  # filter byte and one bit a pixel
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
    """Draws `images` pictures (three quarters for training) with three questions each and writes them as LLaVA data.

    The same seed and package versions give the same bytes. A finished build with the same parameters is reused; a
    half-finished or different one is made anew. `progress(done, total)` is called after each picture. Raises
    FileExistsError where `folder` holds something that was not built here, FileNotFoundError where a package does not
    ship what it should.
    """
    folder = Path(folder)
    pictures_at, marker = folder / "images", folder / _MARKER
    bad = tuple(pictures_at / name for name in ("truncated.jpg", "empty.png", "bomb.png", "notes.png"))
    result = DemoData(folder, folder / "train.json", folder / "test.json", pictures_at, bad)
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in _RECIPE)
    recipe = hashlib.sha256(code).hexdigest()[:16]
    made = {"seed": seed, "images": images, "recipe": recipe}
    if marker.is_file():
        if marker.read_text() == json.dumps({**made, "finished": True}):
            return result
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no demo data: name an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({**made, "finished": False}))
    shutil.rmtree(pictures_at, ignore_errors=True)
    pictures_at.mkdir()

    done = 0
    jpeg = b""
    records: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for index, kind in enumerate(KINDS):
        known: set[tuple[str, str]] = set()  # answers given in training: the test set asks for no other
        for split in ("train", "test"):
            seeds = [seed, index, ("train", "test").index(split)]
            deal = np.random.default_rng(seeds)
            total = images // len(KINDS) + (index < images % len(KINDS))
            count = total - total // 4 if split == "train" else total // 4
            hands = {key: _deal(deal, count, values) for key, values in _DEALT[kind].items()}
            drawn = []
            for number in range(count):
                rng = np.random.default_rng([*seeds, number])
                picture = _DRAW[kind](rng, split, {key: values[number] for key, values in hands.items()})
                if split == "test":
                    picture = replace(picture, facts={f: a for f, a in picture.facts.items() if (f, a) in known})
                drawn.append(picture)
                done += 1
                if progress:
                    progress(done, images)
            for number, (picture, forms) in enumerate(zip(drawn, choose_forms(deal, drawn), strict=True)):
                name = f"{kind}-{split}-{number:04d}"
                as_jpeg = kind in ("photo", "digit") or (kind != "chart" and deal.random() < 0.5)
                file = pictures_at / (name + (".jpg" if as_jpeg else ".png"))
                picture.image.save(file, quality=int(deal.integers(85, 96)))  # PNG knows no quality and ignores it
                jpeg = jpeg or file.read_bytes()
                for form in forms:
                    question, answer = str(deal.choice(QUESTIONS[form])), picture.facts[form]
                    known.add((form, answer))
                    records[split].append(
                        {
                            "id": f"{name}-{form}",
                            "image": file.name,
                            "conversations": [
                                {"from": "human", "value": f"<image>\n{question}"},
                                {"from": "gpt", "value": answer},
                            ],
                            "kind": kind,
                            "form": form,
                            "source": "+".join(picture.sources),
                        }
                    )
    _spoil(bad, jpeg)
    for split, file in (("train", result.train), ("test", result.test)):
        file.write_text(json.dumps(records[split], indent=1) + "\n", encoding="utf-8")
    marker.write_text(json.dumps({**made, "finished": True}))
    return result

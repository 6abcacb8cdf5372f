"""Valid files damaged by seed: each is read or refused by its reader's own error, and nothing beside them is lost.

MOVA_FUZZ_CASES sets the number of cases per reader (default 100).
"""

import io
import json
import os
import random
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mova_core.images import ImageError, load_image
from mova_core.io.uris import parse
from pipelines.precompute.inspect_images import SEEN, inspect_images
from pipelines.precompute.listing import find_images

CASES = int(os.environ.get("MOVA_FUZZ_CASES", "100"))
LONGEST_S = 20.0  # of one case


def _picture(width: int = 64, height: int = 48) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 4 % 256, y * 5 % 256, (x + y) * 2 % 256], -1).astype(np.uint8))


def _encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _flip_a_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite_bytes(data: bytearray, rng: random.Random) -> None:
    for _ in range(10):
        data[rng.randrange(len(data))] = rng.randrange(256)


def _overwrite_the_head(data: bytearray, rng: random.Random) -> None:
    for _ in range(4):
        data[rng.randrange(min(64, len(data)))] = rng.choice((0, 1, 127, 128, 255))


def _overwrite_the_tail(data: bytearray, rng: random.Random) -> None:
    """Where Parquet has its footer, ZIP-like formats their directory."""
    for _ in range(4):
        data[-1 - rng.randrange(min(600, len(data)))] = rng.randrange(256)


def _fill_a_run(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start : start + rng.randrange(1, 64)] = rng.choice((b"\xff", b"\0")) * rng.randrange(1, 64)


def _take_a_piece_out(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 200)]


def _put_a_piece_in(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = rng.randbytes(rng.randrange(1, 100))


def _repeat_a_piece(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.randrange(1, 600)]


def _write_an_extreme_number(data: bytearray, rng: random.Random) -> None:
    start, number = rng.randrange(len(data)), rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1))
    data[start : start + 4] = number.to_bytes(4, rng.choice(("little", "big")))


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [
    *(_cut, _flip_a_bit, _overwrite_bytes, _overwrite_the_head, _overwrite_the_tail, _fill_a_run),
    *(_take_a_piece_out, _put_a_piece_in, _repeat_a_piece, _write_an_extreme_number),
]


def damaged(data: bytes, seed: int) -> bytes:
    rng, content = random.Random(seed), bytearray(data)
    DAMAGES[seed % len(DAMAGES)](content, rng)
    return bytes(content)


def _pictures() -> dict[str, bytes]:
    picture, exif = _picture(), Image.Exif()
    exif[0x112] = 6
    two = {"save_all": True, "append_images": [picture.rotate(90)]}
    grey16 = Image.fromarray((np.arange(64 * 48).reshape(48, 64) * 20).astype(np.uint16))
    return {
        "jpeg": _encoded(picture, "JPEG", exif=exif),
        "progressive": _encoded(picture, "JPEG", progressive=True),
        "cmyk": _encoded(picture.convert("CMYK"), "JPEG"),
        "png": _encoded(picture, "PNG", exif=exif),
        "png16": _encoded(grey16, "PNG"),
        "palette": _encoded(picture.quantize(16), "PNG", transparency=3),
        "gif": _encoded(picture, "GIF", **two),
        "bmp": _encoded(picture, "BMP"),
        "ppm": _encoded(picture, "PPM"),
        "webp": _encoded(picture, "WEBP"),
        "webp of two": _encoded(picture, "WEBP", **two),
        "tiff": _encoded(picture, "TIFF"),
        "tiff lzw": _encoded(picture, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": _encoded(picture, "TIFF", compression="jpeg"),
        "jpeg2000": _encoded(picture, "JPEG2000"),
        "ico": _encoded(_picture(64, 64), "ICO"),
        "avif": _encoded(picture, "AVIF"),
        "mpo": _encoded(picture, "MPO", **two),
    }


@pytest.mark.filterwarnings("ignore")  # of Pillow, about what it reads none the less
def test_damaged_pictures_are_read_or_refused_in_one_line():
    outcomes: Counter[str] = Counter()
    whole = list(_pictures().items())
    for seed in range(CASES):
        name, data = whole[seed % len(whole)]
        started = time.monotonic()
        try:
            load_image(damaged(data, seed // len(whole)))
            outcomes["read"] += 1
        except ImageError as error:
            assert str(error) and "\n" not in str(error), (name, seed)
            outcomes["refused"] += 1
        assert time.monotonic() - started < LONGEST_S, (name, seed)
    print(outcomes)
    assert outcomes["read"] and outcomes["refused"]


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name in ("d/0.png", "d/1.png", f"d/{'x' * 150}.png"):
            member = tarfile.TarInfo(name)
            content = _encoded(_picture(), "PNG")
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _parquet(kind: str) -> bytes:
    cell = {"bytes": _encoded(_picture(), "PNG"), "path": "a.png"}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([[cell]] * 3, pa.list_(struct)) if kind == "lists" else pa.array([cell] * 3, struct)
    features = {"image": {"_type": "Image"}}
    table = pa.table({"image": column, "text": ["what is it", "b", None]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=2)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["tar", "parquet", "parquet of lists"])
def test_damaged_archives_cost_nothing_beside_them(tmp_path: Path, kind: str, capsys):
    """Every member or cell of the sound files is found and read; a damaged file is found, or told by its name."""
    suffix = kind.partition(" ")[0]
    whole = _tar() if suffix == "tar" else _parquet(kind.rpartition(" ")[2])
    for number in range(CASES):
        (tmp_path / f"bad-{number}.{suffix}").write_bytes(damaged(whole, number))
    for number in range(3):
        (tmp_path / f"good-{number}.{suffix}").write_bytes(whole)
    told: list[str] = []
    found = find_images(tmp_path, None, "skip", told)["image"].to_pylist()
    empty = {name: pa.nulls(len(found), SEEN.field(name).type) for name in ("version", "key", "error")}
    looked_at = inspect_images(pa.table({"row": np.arange(len(found)), "image": found, **empty}))
    errors = dict(zip(found, looked_at["error"].to_pylist(), strict=True))
    assert [place for place in found if "good-" in place and errors[place] is None] == [
        place for place in found if "good-" in place
    ]
    assert sum("good-" in place for place in found) == 9
    assert all("bad-" in problem and "\n" not in problem for problem in told)
    assert all("\n" not in problem for problem in errors.values() if problem)
    files = {getattr(parse(place), "file", place) for place in found}
    silent = [
        number for number in range(CASES)
        if f"{tmp_path}/bad-{number}.{suffix}" not in files and not any(f"bad-{number}.{suffix}" in t for t in told)
    ]  # fmt: skip
    assert not [number for number in silent if number % len(DAMAGES) != 0 or suffix != "tar"], "neither found nor told"
    with capsys.disabled():
        if CASES > 100:
            print(
                kind, len(told), "told,", sum(error is not None for error in errors.values()), "of", len(found), "bad"
            )

"""The demo's data: real pictures and questions whose answers are measured, built from what installed packages ship.

Nothing is downloaded: every photograph, table, text, digit and scan is a file inside a wheel (scikit-image,
scikit-learn, matplotlib, vega_datasets, pydicom), opened by its path so that no package's own fetcher runs. `SOURCES`
says on which side of the train/test split each one stands; the pictures are crops, mirrorings, lightings and drawings
of them. An answer is either how the picture was made (which stamp in which corner) or measured on the finished pixels,
and what is too close to call is not asked.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pydicom
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pydicom.pixels import apply_color_lut

Facts = dict[str, str]  # form of question -> its answer for this picture
Wish = Mapping[str, Any]  # what a picture is to show, dealt evenly so that no answer is the common one

# Of files that show the same thing only one is named: the stereo pair of the motorcycle, two sizes of one ultrasound,
# pydicom's re-encodings of one slice, vega's copy of the iris table, matplotlib's copy of the stock prices.
SOURCES: dict[str, dict[str, dict[str, str]]] = {
    "photo": {
        "train": {
            "astronaut": "skimage/data/astronaut.png",
            "brick": "skimage/data/brick.png",
            "chelsea": "skimage/data/chelsea.png",
            "coins": "skimage/data/coins.png",
            "flower": "sklearn/datasets/images/flower.jpg",
            "grace_hopper": "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
            "grass": "skimage/data/grass.png",
            "hubble": "skimage/data/hubble_deep_field.jpg",
            "motorcycle": "skimage/data/motorcycle_left.png",
            "rocket": "skimage/data/rocket.jpg",
        },
        "test": {
            "camera": "skimage/data/camera.png",
            "china": "sklearn/datasets/images/china.jpg",
            "coffee": "skimage/data/coffee.png",
            "gravel": "skimage/data/gravel.png",
        },
    },
    "table": {
        "train": {
            "barley": "vega_datasets/_data/barley.json",
            "breast cancer": "sklearn/datasets/data/breast_cancer.csv",
            "cars": "vega_datasets/_data/cars.json",
            "crimea": "vega_datasets/_data/crimea.json",
            "diabetes": "sklearn/datasets/data/diabetes_data_raw.csv.gz",
            "electricity": "vega_datasets/_data/iowa-electricity.csv",
            "employment": "vega_datasets/_data/us-employment.csv",
            "iris": "sklearn/datasets/data/iris.csv",
            "seattle weather": "vega_datasets/_data/seattle-weather.csv",
            "stocks": "vega_datasets/_data/stocks.csv",
            "wheat": "vega_datasets/_data/wheat.json",
        },
        "test": {
            "airports": "vega_datasets/_data/airports.csv",
            "driving": "vega_datasets/_data/driving.json",
            "san francisco": "vega_datasets/_data/sf-temps.csv",
            "wine": "sklearn/datasets/data/wine_data.csv",
        },
    },
    "text": {
        "train": {
            "breast cancer": "sklearn/datasets/descr/breast_cancer.rst",
            "california": "sklearn/datasets/descr/california_housing.rst",
            "forests": "sklearn/datasets/descr/covtype.rst",
            "diabetes": "sklearn/datasets/descr/diabetes.rst",
            "digits": "sklearn/datasets/descr/digits.rst",
            "iris": "sklearn/datasets/descr/iris.rst",
            "intrusions": "sklearn/datasets/descr/kddcup99.rst",
            "faces": "sklearn/datasets/descr/lfw.rst",
            "newsgroups": "sklearn/datasets/descr/twenty_newsgroups.rst",
            "dejavu licence": "matplotlib/mpl-data/fonts/ttf/LICENSE_DEJAVU",
        },
        "test": {
            "olivetti": "sklearn/datasets/descr/olivetti_faces.rst",
            "newswire": "sklearn/datasets/descr/rcv1.rst",
            "species": "sklearn/datasets/descr/species_distributions.rst",
            "wine": "sklearn/datasets/descr/wine_data.rst",
            "stix licence": "matplotlib/mpl-data/fonts/ttf/LICENSE_STIX",
        },
    },
    "scan": {
        "train": {
            "CT chest": "pydicom/data/test_files/CT_small.dcm",
            "CT brain": "pydicom/data/test_files/693_J2KI.dcm",
            "MR head": "matplotlib/mpl-data/sample_data/s1045.ima.gz",
            "MR shoulder": "pydicom/data/test_files/MR_small.dcm",
            "ultrasound doppler": "pydicom/data/test_files/examples_jpeg2k.dcm",
            "ultrasound sector": "pydicom/data/test_files/examples_palette.dcm",
            "eye fundus": "skimage/data/retina.jpg",
            "microscope ihc": "skimage/data/ihc.png",
        },
        "test": {
            "CT skull": "pydicom/data/test_files/J2K_pixelrep_mismatch.dcm",
            "MR abdomen": "pydicom/data/test_files/examples_overlay.dcm",
            "ultrasound heart": "pydicom/data/test_files/examples_ybr_color.dcm",
            "eye aneurysms": "skimage/data/microaneurysms.png",
            "microscope cell": "skimage/data/cell.png",
        },
    },
}
# Left, top, right, bottom of the picture itself on screens with lettering around it, which would come out mirrored.
_AREAS = {
    "ultrasound doppler": (44, 106, 598, 352),
    "ultrasound sector": (336, 62, 650, 345),
    "ultrasound heart": (36, 16, 290, 215),
}
DIGITS = "sklearn/datasets/data/digits.csv.gz"  # every fourth distinct sample is a test sample

CORNERS = ("top left", "top right", "bottom left", "bottom right")
INKS = {"red": (205, 40, 40), "green": (30, 140, 60), "blue": (40, 80, 200), "orange": (240, 140, 20)}
_GROUNDS = {"white": ("white", "black"), "grey": ("#b4b4b4", "black"), "black": ("black", "white")}  # back, front
PAPERS = {"white": (251, 251, 248), "yellow": (250, 238, 170), "blue": (190, 216, 245), "pink": (250, 205, 216)}
TINTS = {"red": (0.85, 0.2, 0.2), "green": (0.2, 0.7, 0.3), "blue": (0.2, 0.4, 0.9), "yellow": (0.85, 0.75, 0.15)}
DIGIT_INKS = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "red": (0.85, 0.0, 0.0), "yellow": (1.0, 0.9, 0.1)}
INK, PEN = (25, 25, 30), (30, 40, 140)  # of print and of handwriting
STAMPS = ("paid", "copy", "draft", "final")

# How each form is put into words. A form is one question; its chance level is that of its commonest answer in training.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "photo-tone": (
        "Is the photograph in colour or in grey?", "Colour or grey?", "Does the picture have colour or is it grey?",
    ),
    "photo-tint": (
        "Which colour is the photograph toned in?", "What is the tint of the picture?",
        "The photograph has a tint of which colour?",
    ),
    "photo-side": (
        "Which side of the photograph is brighter, left or right?", "Is the left or the right side brighter?",
        "Where is more light, left or right?",
    ),
    "photo-corner": (
        "Which corner of the photograph is the brightest?", "In which corner is the most light?",
        "What is the brightest corner?",
    ),
    "photo-focus": ("Is the photograph sharp or blurred?", "Sharp or blurred?", "Is the picture blurred or sharp?"),
    "photo-light": ("Is the photograph dark or bright?", "Dark or bright?", "Is the picture bright or dark?"),
    "chart-type": ("Is this a bar chart or a line chart?", "Which kind of chart is it, bar or line?", "Bar or line?"),
    "chart-trend": ("Does the line rise or fall?", "Does the line of the chart fall or rise?", "Rise or fall?"),
    "chart-peak": (
        "Is the highest bar on the left, in the middle or on the right?",
        "Where is the highest bar, left, middle or right?", "Where in the chart is the tallest bar?",
    ),
    "chart-count": (
        "How many bars are there?", "What is the number of bars in the chart?", "How many bars does the chart have?",
    ),
    "chart-legend": ("Is there a legend?", "Does the chart have a legend?"),
    "chart-background": (
        "What is the background colour of the chart?", "Which colour is the background?",
        "Is the background white, grey or black?",
    ),
    "chart-colour": (
        "Which colour is the data drawn in?", "What is the colour of the bars or the line?",
        "In which colour are the values drawn?",
    ),
    "document-type": (
        "What is this page: article, letter, form or table?", "Which kind of document is it?",
        "Is this an article, a letter, a form or a table?",
    ),
    "document-columns": ("How many columns of text are there?", "In how many columns is the text set?"),
    "document-heading": ("Is there a large heading?", "Does the page have a large heading?"),
    "document-corner": (
        "In which corner is the stamp?", "Where is the stamp on the page?", "Which corner of the page has the stamp?",
    ),
    "document-stamp": ("What does the stamp say?", "Which word is on the stamp?", "Read the word on the stamp."),
    "document-paper": ("Which colour is the paper?", "What is the colour of the page?"),
    "digit-corner": (
        "In which corner is the digit?", "Where is the digit?", "Which corner of the picture has the digit?",
    ),
    "digit-value": ("Which digit is written in the picture?", "What is the digit?", "Read the digit."),
    "digit-ink": (
        "Which colour is the digit?", "What is the colour of the digit?", "In which colour is the digit written?",
    ),
    "digit-size": ("Is the digit large or small?", "Large or small digit?", "Is the written digit small or large?"),
    "medical-kind": (
        "Which kind of medical picture is this: CT, MR, ultrasound, eye or microscope?",
        "How was this medical picture taken?", "What kind of scan or picture is this?",
    ),
    "medical-side": (
        "Which side of the scan is brighter, left or right?", "Is the left or the right side brighter?",
        "Where is more light, left or right?",
    ),
    "medical-tone": (
        "Is the scan in colour or in grey?", "Colour or grey?", "Does the picture have colour or is it grey?",
    ),
    "medical-background": (
        "Is the background of the scan black or white?", "What is the background colour of the scan?",
    ),
    "medical-corner": (
        "In which corner is the marker?", "Where is the letter marker?", "Which corner of the scan has the marker?",
    ),
    "medical-marker": (
        "Which letter is on the marker, L or R?", "Read the letter of the marker.", "Is the marker L or R?",
    ),
}  # fmt: skip
PER_IMAGE = 3  # questions asked of one picture


@dataclass(frozen=True)
class DemoData:
    """Where the data lie. The records' "image" is relative to `images`, as LLaVA's image folder wants it."""

    folder: Path
    train: Path  # LLaVA JSON
    test: Path
    images: Path
    bad: tuple[Path, ...]  # files in `images` that are no usable picture and that no record names


@dataclass(frozen=True)
class Picture:
    """A drawn picture, what it was drawn from, and everything that may be asked about it."""

    image: Image.Image
    sources: tuple[str, ...]
    facts: Facts


@dataclass(frozen=True)
class Table:
    """A real table: columns of numbers and of words, all of the same length, the rows in their natural order."""

    name: str
    numbers: dict[str, np.ndarray]
    words: dict[str, list[str]]
    order: list[str] | None  # the label of each row where neighbouring rows follow each other in time

    def rows(self) -> int:
        return len(next(iter(self.numbers.values())))


# ------------------------------------------------------------------ reading what the packages ship


def shipped(path: str) -> Path:
    """The file `package/inside/the/package` in the installed wheel; the package is not imported."""
    package, _, inside = path.partition("/")
    spec = find_spec(package)
    file = Path(spec.origin).parent / inside if spec and spec.origin else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{package} does not ship {inside}: install the versions in constraints.txt")
    return file


@cache
def photograph(path: str) -> Image.Image:
    """A photograph as RGB, grey ones with three equal channels."""
    return Image.open(shipped(path)).convert("RGB")


@cache
def scan(path: str) -> Image.Image:
    """A medical picture as RGB: first frame, palette applied, grey values windowed to their 1st..99.5th percentile."""
    if path.endswith((".png", ".jpg")):
        return photograph(path)
    if path.endswith(".ima.gz"):  # matplotlib's MR slice: 256 x 256 little-endian 16 bit, no header
        pixels = np.frombuffer(gzip.decompress(shipped(path).read_bytes()), "<u2").reshape(256, 256)
    else:
        dataset = pydicom.dcmread(shipped(path))
        pixels = dataset.pixel_array
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            pixels = (apply_color_lut(pixels, dataset) >> 8).astype(np.uint8)
    if pixels.ndim == 4:
        pixels = pixels[0]
    if pixels.ndim == 3:
        return Image.fromarray(pixels)
    low, high = np.percentile(pixels, (1, 99.5))
    grey = np.clip((pixels.astype(np.float64) - low) / (high - low), 0, 1)
    return Image.fromarray((grey * 255).astype(np.uint8)).convert("RGB")


@cache
def digits(split: str) -> dict[str, list[np.ndarray]]:
    """Handwritten digits of one split as 8 x 8 arrays of 0..16, by value. Identical scans count once."""
    rows = np.loadtxt(io.BytesIO(gzip.decompress(shipped(DIGITS).read_bytes())), delimiter=",", dtype=np.int64)
    distinct = list({row[:64].tobytes(): row for row in rows}.values())
    mine = [row for index, row in enumerate(distinct) if (index % 4 == 3) == (split == "test")]
    return {str(value): [row[:64].reshape(8, 8) for row in mine if row[64] == value] for value in range(10)}


@cache
def paragraphs(path: str) -> tuple[str, ...]:
    """The running text of a file without reStructuredText marks, tables and code."""
    text = shipped(path).read_text(encoding="utf-8")
    text = re.sub(r":[a-z:]+:`~?([^`<]+)[^`]*`", r"\1", text)
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        if re.search(r"^\s*(\.\.|>>>|:|={4})|={5}|-{5}|https?:", block, re.MULTILINE):
            continue
        block = " ".join(re.sub(r"[`*_|#]+|\[\d+\]|:(?=:)", "", block).split())
        if len(block) > 60:
            blocks.append(block)
    return tuple(blocks)


_IRIS = ("sepal length", "sepal width", "petal length", "petal width")
_WINE = (
    "alcohol", "malic acid", "ash", "alcalinity", "magnesium", "phenols", "flavanoids",
    "nonflavanoids", "proanthocyanins", "colour", "hue", "dilution", "proline",
)  # fmt: skip
_CANCER = ("radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity", "points", "symmetry")
_DIABETES = ("age", "sex", "body mass", "pressure", "cholesterol", "LDL", "HDL", "ratio", "triglycerides", "sugar")
# The files of scikit-learn do not name their columns.
_MEASURED = {"iris": _IRIS, "wine": _WINE, "breast cancer": _CANCER, "diabetes": _DIABETES}
_ORDERED_BY = {
    "crimea": "date", "driving": "year", "employment": "month", "san francisco": "date", "seattle weather": "date",
    "wheat": "year",
}  # fmt: skip
_PIVOTED = {"electricity": ("year", "source", "net_generation"), "stocks": ("date", "symbol", "price")}


@cache
def table(name: str, path: str) -> Table:
    """A table of the given file. Long tables of several series are pivoted to one column per series."""
    raw = gzip.decompress(shipped(path).read_bytes()) if path.endswith(".gz") else shipped(path).read_bytes()
    text = raw.decode("utf-8")
    if name in _MEASURED:
        rows = [line.replace(",", " ").split() for line in text.splitlines()]
        header = rows.pop(0)[2:] if name != "diabetes" else []
        columns = {column: np.array([float(row[i]) for row in rows]) for i, column in enumerate(_MEASURED[name])}
        return Table(name, columns, {"class": [header[int(row[-1])] for row in rows]} if header else {}, None)
    records = json.loads(text) if path.endswith(".json") else list(csv.DictReader(io.StringIO(text)))
    if name not in _PIVOTED:
        records = [{key.replace("_", " ").lower(): cell for key, cell in record.items()} for record in records]
    if name in _PIVOTED:
        order, series, value = _PIVOTED[name]
        whole = [record for record in records if record[series] != "GOOG"]  # starts four years after the other prices
        by_series: dict[str, list[float]] = {}
        for record in whole:
            by_series.setdefault(record[series], []).append(float(record[value]))
        labels = list(dict.fromkeys(record[order] for record in whole))
        return Table(name, {key: np.array(values) for key, values in by_series.items()}, {}, labels)
    numbers, words = {}, {}
    for column in records[0]:
        cells = [record.get(column) for record in records]
        try:
            numbers[column] = np.array([np.nan if cell in (None, "") else float(cell) for cell in cells])
        except ValueError:
            words[column] = [str(cell) for cell in cells]
    order_cells = None
    if name in _ORDERED_BY:  # an hourly stamp is shortened to month/day and hour
        times = (str(record[_ORDERED_BY[name]]) for record in records)
        order_cells = [re.sub(r"^\d{4}/(\S+) (\d\d):.*", r"\1 \2h", time) for time in times]
    for calendar in ("year", "date", "month"):  # a calendar is an axis, not a quantity
        numbers.pop(calendar, None)
        words.pop(calendar, None)
    return Table(name, numbers, words, order_cells)


# ------------------------------------------------------------------ what photographs and scans share


def _crop(rng: Generator, picture: Image.Image, least: float, sides: tuple[int, int] = (176, 480)) -> np.ndarray:
    """A random part of the picture, its shorter side at least `least` of the original's; (H, W, 3) in 0..1."""
    ratio = float(rng.choice((1.0, 4 / 3, 3 / 4)))
    scale = rng.uniform(least, 1.0)
    width, height = picture.size
    w = scale * min(width, height * ratio)
    h = w / ratio
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    longest = rng.integers(*sides, endpoint=True)
    size = (round(longest * min(1.0, ratio)), round(longest * min(1.0, 1 / ratio)))
    part = picture.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + w, y + h), reducing_gap=3.0)
    return np.asarray(part, dtype=np.float64) / 255


def _chroma(picture: Image.Image | np.ndarray) -> float:
    """How far the colours are from grey: 0 for a grey picture, 1 for pure colours."""
    pixels = picture if isinstance(picture, np.ndarray) else np.asarray(picture.reduce(8), dtype=np.float64) / 255
    return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())


def _corner_means(grey: np.ndarray, part: float) -> dict[str, float]:
    """Mean brightness of the four corners, each `part` of the height and width."""
    h, w = (max(1, round(part * n)) for n in grey.shape)
    corners = (grey[:h, :w], grey[:h, -w:], grey[-h:, :w], grey[-h:, -w:])
    return {name: float(values.mean()) for name, values in zip(CORNERS, corners, strict=True)}


def _turn_to(pixels: np.ndarray, corner: str) -> np.ndarray:
    """Mirrored so that its brightest corner becomes `corner`."""
    means = _corner_means(pixels.mean(axis=2), 0.5)
    brightest = max(means, key=means.__getitem__)
    if brightest.split()[0] != corner.split()[0]:
        pixels = pixels[::-1]
    if brightest.split()[1] != corner.split()[1]:
        pixels = pixels[:, ::-1]
    return pixels


def _lit_from(pixels: np.ndarray, corner: str, strength: float) -> np.ndarray:
    """Lit from one corner: the opposite one loses `strength` of its light."""
    y = np.linspace(0, 1, pixels.shape[0])[:, None]
    x = np.linspace(0, 1, pixels.shape[1])[None, :]
    far = ((1 - y if "bottom" in corner else y) + (1 - x if "right" in corner else x)) / 2
    return pixels * (1 - strength * far)[..., None]


def _brighter_side(grey: np.ndarray, margin: float) -> Facts:
    half = grey.shape[1] // 2
    difference = grey[:, :half].mean() - grey[:, -half:].mean()
    return {} if abs(difference) < margin else {"side": "left" if difference > 0 else "right"}


def _image(pixels: np.ndarray) -> Image.Image:
    """0..1 to an 8-bit image; grey pictures become one-channel files, as grey photographs are."""
    eight = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(eight[..., 0] if (eight == eight[..., :1]).all() else eight)


def _box_in(rng: Generator, corner: str, outer: tuple[int, int], inner: tuple[int, int]) -> tuple[int, int]:
    """Top left point of an `inner` box near a corner of `outer`, a little off the edges. Sizes are (width, height)."""
    off = [round(rng.uniform(0.02, 0.08) * side) for side in outer]
    x = outer[0] - inner[0] - off[0] if "right" in corner else off[0]
    y = outer[1] - inner[1] - off[1] if "bottom" in corner else off[1]
    return x, y


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = shipped(f"matplotlib/mpl-data/fonts/ttf/{name}.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)  # raqm is not on every machine


# ------------------------------------------------------------------ the five kinds of picture


def _sharpness(grey: np.ndarray) -> float:
    """Share of the contrast that a one-pixel blur takes away, at the 168 pixels the mini model sees."""
    small = Image.fromarray((grey * 255).astype(np.uint8))
    small.thumbnail((168, 168), Image.Resampling.BICUBIC)
    values, soft = (np.asarray(i, dtype=np.float64) for i in (small, small.filter(ImageFilter.GaussianBlur(1))))
    return float((values - soft).std() / (values.std() + 4))


def photo(rng: Generator, split: str, wish: Wish) -> Picture:
    """A photograph or a texture: cropped, mirrored, lit, exposed, toned, in or out of focus."""
    named = SOURCES["photo"][split]
    fit = [name for name, path in named.items() if wish["tone"] != "colour" or _chroma(photograph(path)) > 0.15]
    name = str(rng.choice(fit))
    pixels = _crop(rng, photograph(named[name]), least=0.45)
    pixels = _lit_from(_turn_to(pixels, wish["corner"]), wish["corner"], rng.uniform(0.4, 0.8))
    target = rng.uniform(0.2, 0.28) if wish["light"] == "dark" else rng.uniform(0.62, 0.72)
    low, high = 0.05, 8.0
    for _ in range(20):  # the exposure (as a gamma) that gives this mean brightness
        gamma = (low * high) ** 0.5
        low, high = (gamma, high) if (pixels**gamma).mean() > target else (low, gamma)
    pixels = pixels**gamma
    facts: Facts = {}
    grey = pixels.mean(axis=2, keepdims=True)
    if wish["tone"] == "colour":
        if _chroma(pixels) > 0.1:
            facts["photo-tone"] = "colour"
    elif wish["tone"] == "grey":
        pixels = np.repeat(grey, 3, axis=2)
        facts["photo-tone"] = "grey"
    else:  # toned: black over the tint to white
        tint = np.array(TINTS[wish["tint"]])
        pixels = np.where(grey < 0.5, tint * 2 * grey, tint + (1 - tint) * (2 * grey - 1))
        facts["photo-tint"] = wish["tint"]
    image = _image(pixels)
    if wish["focus"] == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(2.5, 4) * max(image.size) / 168))
    seen = np.asarray(image.convert("L"), dtype=np.float64) / 255
    sharp = _sharpness(seen)
    if wish["focus"] == "blurred" and sharp < 0.03:
        facts["photo-focus"] = "blurred"
    elif wish["focus"] == "sharp" and sharp > 0.06:
        facts["photo-focus"] = "sharp"
    if abs(seen.mean() - 0.44) > 0.1:
        facts["photo-light"] = "dark" if seen.mean() < 0.44 else "bright"
    facts |= {f"photo-{key}": value for key, value in _brighter_side(seen, 0.05).items()}
    quarters, corners = (sorted(_corner_means(seen, part).items(), key=lambda item: -item[1]) for part in (0.5, 0.3))
    if quarters[0][0] == corners[0][0] and min(c[0][1] - c[1][1] for c in (quarters, corners)) > 0.04:
        facts["photo-corner"] = quarters[0][0]
    return Picture(image, (f"photo:{name}",), facts)


def _categories(rng: Generator, data: Table, count: int) -> tuple[str, list[str], np.ndarray] | None:
    """A number by category: `count` categories in an arbitrary order, as (title, labels, values)."""
    if data.order is not None:  # a stretch of time: its order is its own
        column = str(rng.choice(list(data.numbers)))
        step = int(rng.choice((1, 3, 7, 12)))
        start = int(rng.integers(0, max(1, data.rows() - count * step)))
        picked = slice(start, start + count * step, step)
        return f"{column} ({data.name})", data.order[picked], data.numbers[column][picked]
    groups = [group for group, cells in data.words.items() if 2 < len(set(cells)) < len(cells) / 3]
    if not groups:
        return None
    group = str(rng.choice(groups))
    cells = np.array(data.words[group])
    names = sorted(set(cells))
    if len(names) < count:
        return None
    labels = [str(label) for label in rng.choice(names, size=count, replace=False)]
    column = str(rng.choice([*data.numbers, "count"]))
    chosen = [cells == label for label in labels]
    values = [rows.sum() if column == "count" else np.nanmean(data.numbers[column][rows]) for rows in chosen]
    return f"{column} by {group}", labels, np.array(values, dtype=np.float64)


def _course(rng: Generator, data: Table) -> tuple[str, list[str], np.ndarray] | None:
    """How a number runs, over time or over another number, as (title, labels, values)."""
    column = str(rng.choice(list(data.numbers)))
    if data.order is not None:
        count = int(rng.integers(5, 25))
        step = int(rng.choice((1, 2, 5, 30)))
        start = int(rng.integers(0, max(1, data.rows() - count * step)))
        picked = slice(start, start + count * step, step)
        return f"{column} ({data.name})", data.order[picked], data.numbers[column][picked]
    over = str(rng.choice(list(data.numbers)))
    if over == column:
        return None
    x, y = data.numbers[over], data.numbers[column]
    known = ~(np.isnan(x) | np.isnan(y))
    bins = np.array_split(np.argsort(x[known], kind="stable"), int(rng.integers(5, 11)))
    labels = [f"{x[known][rows].mean():.4g}" for rows in bins]
    return f"{column} by {over}", labels, np.array([y[known][rows].mean() for rows in bins])


def _trend(values: np.ndarray) -> str | None:
    """Whether the values rise or fall as a whole, None where a reader could doubt it."""
    span = values.max() - values.min()
    if len(values) < 5 or not np.isfinite(span) or span <= 0:
        return None
    fit = np.corrcoef(np.arange(len(values)), values)[0, 1]
    if abs(fit) < 0.85 or abs(values[-1] - values[0]) < 0.7 * span:
        return None
    return "rise" if fit > 0 else "fall"


def _peak(values: np.ndarray) -> str | None:
    """In which third of the chart the highest bar stands, None where it is near a border or not clearly the highest."""
    second, first = np.sort(values)[-2:]
    at = (int(values.argmax()) + 0.5) / len(values)
    if first < 1.15 * second or 0.3 < at < 0.4 or 0.6 < at < 0.7:
        return None
    return "left" if at < 0.4 else "middle" if at < 0.6 else "right"


def chart(rng: Generator, split: str, wish: Wish) -> Picture:
    """A bar chart of a number by category or a line chart of its course, from a real table."""
    names = SOURCES["table"][split]
    bar = wish["type"] == "bar"
    count, peak = wish["bars"]
    while True:  # until the tables yield what is wished; every side of the split has some for every wish
        name = str(rng.choice(list(names)))
        data = table(name, names[name])
        drawn = _categories(rng, data, count) if bar else _course(rng, data)
        if drawn is None or not np.isfinite(drawn[2]).all():
            continue
        title, labels, values = drawn
        if bar and len(values) == count and values.min() > 0.05 * values.max() > 0 and _peak(values) == peak:
            break
        if not bar and _trend(values) == wish["trend"]:
            break
    facts = {f"chart-{key}": wish[key] for key in ("type", "legend", "background", "colour")}
    facts |= {"chart-peak": peak, "chart-count": str(count)} if bar else {"chart-trend": wish["trend"]}

    back, front = _GROUNDS[wish["background"]]
    ink = tuple(value / 255 for value in INKS[wish["colour"]])
    places = np.arange(len(values))
    family, letters = str(rng.choice(("DejaVu Sans", "DejaVu Serif"))), rng.uniform(6.5, 9)
    size = (rng.uniform(2.2, 3.8), rng.uniform(2.0, 3.2))  # inches of 100 pixels
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        matplotlib.rc("font", family=family, size=letters)
        figure = Figure(figsize=size, dpi=100, facecolor=back, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor=back)
        label = re.split(r" \(| by ", title)[0]
        if bar:
            axes.bar(places, values, width=rng.uniform(0.45, 0.8), color=ink, label=label)
        else:
            marker = str(rng.choice(("", "o", "s")))
            axes.plot(
                places, values, color=ink, linewidth=rng.uniform(1.5, 3), marker=marker, markersize=4, label=label
            )
        shown = places if bar else places[:: max(1, len(places) // 4)]
        axes.set_xticks(shown, [str(labels[i])[:10] for i in shown], rotation=0 if len(shown) < 4 else 30)
        if rng.random() < 0.4:
            axes.grid(axis="y", color=front, alpha=0.25)
        if wish["legend"] == "yes":  # with room above the data, so that it hides nothing
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.3 * (high - low))
            left = rng.random() < 0.5
            axes.legend(
                loc="upper left" if left else "upper right",
                facecolor=back,
                edgecolor=front,
                labelcolor=front,
                framealpha=1,
            )
        if rng.random() < 0.8:
            axes.set_title(title[:34], color=front)
        axes.tick_params(colors=front)
        framed = bool(rng.random() < 0.5)
        for place, spine in axes.spines.items():
            spine.set(color=front, visible=framed or place in ("left", "bottom"))
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return Picture(image, (f"table:{name}",), facts)


@dataclass
class _Page:
    """A page under the pen: the drawing, its ink and letters, and the box that is still free."""

    draw: ImageDraw.ImageDraw
    face: str  # a font family with "", "-Bold"
    size: int  # of the body's letters, pixels
    left: int
    top: int
    right: int
    bottom: int

    def font(self, scale: float = 1.0, bold: bool = False) -> ImageFont.FreeTypeFont:
        return _font(self.face + ("-Bold" if bold else ""), round(self.size * scale))

    def line(self, x: int, text: str, bold: bool = False, scale: float = 1.0) -> None:
        self.draw.text((x, self.top), text, fill=INK, font=self.font(scale, bold))
        self.top += round(self.size * scale * 1.35)

    def column(self, words: list[str], left: int, right: int, bottom: int) -> None:
        """Sets words (taken from the list) flush left from `top` down to `bottom`."""
        font, y = self.font(), self.top
        while words and y + self.size < bottom:
            line = [words.pop(0)]
            while words and font.getlength(" ".join([*line, words[0]])) <= right - left:
                line.append(words.pop(0))
            self.draw.text((left, y), " ".join(line), fill=INK, font=font)
            y += round(self.size * 1.3)


def _words(rng: Generator, path: str) -> list[str]:
    """A page full of a text's words from a random paragraph on, without those too long for a narrow column."""
    blocks = paragraphs(path)
    start = int(rng.integers(len(blocks)))
    return [word for word in " ".join((blocks[start:] + blocks[:start]) * 6).split() if len(word) < 15]


def _cells(data: Table, row: int) -> list[tuple[str, str]]:
    cells = [(key, values[row]) for key, values in data.words.items()]
    cells += [(key, f"{values[row]:.4g}") for key, values in data.numbers.items()]
    return ([("time", data.order[row])] if data.order else []) + cells


def _write_article(page: _Page, words: list[str], columns: int) -> None:
    gutter = round(1.6 * page.size)
    width = (page.right - page.left - gutter * (columns - 1)) // columns
    for index in range(columns):
        left = page.left + index * (width + gutter)
        page.column(words, left, left + width, page.bottom)


def _write_letter(rng: Generator, page: _Page, words: list[str]) -> None:
    sender = page.left if rng.random() < 0.5 else page.left + round(0.6 * (page.right - page.left))
    for line in (" ".join(words[:2]), " ".join(words[2:4])):
        page.line(sender, line[:18])
    page.line(sender, f"{rng.integers(1, 29)} May {rng.integers(1970, 2025)}")
    page.top += round(2.2 * page.size)
    page.line(page.left, "Dear reader,")
    page.top += page.size
    end = page.top + round(rng.uniform(0.4, 0.55) * (page.bottom - page.top))
    page.column(words, page.left, page.right, end)
    page.top = end + page.size
    page.line(page.left, "Yours sincerely,")
    x = page.left + np.linspace(0, 9 * page.size, 40)  # the signature: a scribble
    y = page.top + 1.5 * page.size + np.cumsum(rng.normal(0, 0.45, 40)) * page.size * np.hanning(40)
    page.draw.line([(float(a), float(b)) for a, b in zip(x, y, strict=True)], fill=PEN, width=2, joint="curve")


def _write_form(rng: Generator, page: _Page, data: Table) -> None:
    fields = _cells(data, int(rng.integers(data.rows())))[: int(rng.integers(5, 9))]
    height, middle = round(2.1 * page.size), page.left + round(0.4 * (page.right - page.left))
    for key, value in fields:
        if page.top + 3 * height > page.bottom:
            break
        page.draw.text((page.left, page.top + 4), key[:14], fill=INK, font=page.font())
        page.draw.rectangle((middle, page.top, page.right, page.top + height - 4), outline=INK, fill="white")
        page.draw.text((middle + 5, page.top + 4), value[:20], fill=PEN, font=page.font())
        page.top += round(1.35 * height)
    ticked = str(rng.choice(("yes", "no")))
    for label in ("yes", "no"):
        left, top, right, bottom = page.left, page.top, page.left + page.size, page.top + page.size
        page.draw.rectangle((left, top, right, bottom), outline=INK, fill="white")
        if label == ticked:
            page.draw.line((left, top, right, bottom), fill=PEN, width=2)
            page.draw.line((left, bottom, right, top), fill=PEN, width=2)
        page.line(page.left + 2 * page.size, label)


def _write_table(rng: Generator, page: _Page, data: Table) -> None:
    start = int(rng.integers(max(1, data.rows() - 20)))
    columns = min(int(rng.integers(3, 6)), len(_cells(data, start)))
    height = round(1.7 * page.size)
    rows = min(int(rng.integers(9, 18)), (page.bottom - page.top) // height - 1)
    width = (page.right - page.left) / columns
    for index in range(rows + 1):
        y = page.top + index * height
        for column, (key, value) in enumerate(_cells(data, start + max(0, index - 1))[:columns]):
            text, font = (value, page.font()) if index else (key, page.font(bold=True))
            while font.getlength(text) > width - 4:
                text = text[:-1]
            page.draw.text((page.left + column * width + 3, y + 2), text, fill=INK, font=font)
        page.draw.line((page.left, y, page.right, y), fill=INK)
    bottom = page.top + (rows + 1) * height
    page.draw.line((page.left, bottom, page.right, bottom), fill=INK)
    for column in range(columns + 1):
        x = round(page.left + column * width)
        page.draw.line((x, page.top, x, bottom), fill=INK)


def _stamp(rng: Generator, word: str, width: int) -> Image.Image:
    """A rubber stamp, `width` pixels wide before it is turned a little, on transparent ground."""
    colour = INKS[str(rng.choice(("red", "green", "blue")))]
    font = _font("DejaVuSans-Bold", round(width / 4.4))
    text = word.upper()
    height = round(1.6 * font.size)
    stamp = Image.new("RGBA", (width, height), (*colour, 240))
    draw = ImageDraw.Draw(stamp)
    draw.rectangle((3, 3, width - 4, height - 4), outline="white", width=max(1, width // 60))
    draw.text((width / 2, height / 2), text, fill="white", font=font, anchor="mm")
    return stamp.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)


def document(rng: Generator, split: str, wish: Wish) -> Picture:
    """A page of real text or of a real table's rows, stamped, on coloured paper, scanned a little askew."""
    width = int(rng.integers(260, 371))
    size = (width, round(width * rng.uniform(1.1, 1.29)))
    paper = PAPERS[wish["paper"]]
    image = Image.new("RGB", size, paper)
    margin = round(width * rng.uniform(0.06, 0.1))
    face = str(rng.choice(("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")))
    letters = round(width / rng.uniform(28, 34))
    page = _Page(ImageDraw.Draw(image), face, letters, margin, margin, width - margin, size[1] - margin)
    named = SOURCES["text" if wish["type"] in ("article", "letter") else "table"][split]
    name = str(rng.choice(list(named)))
    facts = {f"document-{key}": wish[key] for key in ("type", "heading", "corner", "stamp", "paper")}
    if wish["corner"] == "top left":  # where the stamp may cover the heading
        del facts["document-heading"]
    if wish["heading"] == "yes":
        page.line(page.left, name.title(), bold=True, scale=2.4)
        page.top += page.size // 2
    if wish["type"] in ("article", "letter"):
        source = f"text:{name}"
        words = _words(rng, named[name])
        if wish["type"] == "article":
            facts["document-columns"] = str(wish["columns"])
            _write_article(page, words, wish["columns"])
        else:
            _write_letter(rng, page, words)
    else:
        source = f"table:{name}"
        (_write_form if wish["type"] == "form" else _write_table)(rng, page, table(name, named[name]))
    image = image.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
    stamp = _stamp(rng, wish["stamp"], round(0.4 * width))
    image.paste(stamp, _box_in(rng, wish["corner"], size, stamp.size), stamp)
    grain = rng.normal(0, 3, (size[1], size[0], 1))
    return Picture(_image((np.asarray(image) + grain) / 255), (source,), facts)


def digit(rng: Generator, split: str, wish: Wish) -> Picture:
    """A handwritten digit in one corner of a photograph."""
    named = SOURCES["photo"][split]
    name = str(rng.choice(list(named)))
    pixels = _turn_to(_crop(rng, photograph(named[name]), least=0.5), str(rng.choice(CORNERS)))
    faded = 0.5 if wish["ink"] in ("black", "red") else 0.0  # under dark ink; under light ink the photograph is dimmed
    pixels = 0.45 * pixels + faded
    samples = digits(split)[wish["value"]]
    sample = int(rng.integers(len(samples)))
    share = rng.uniform(0.36, 0.44) if wish["size"] == "large" else rng.uniform(0.2, 0.25)
    side = round(share * min(pixels.shape[:2]))
    written = Image.fromarray(np.pad(samples[sample] * 255 // 16, 1).astype(np.uint8))
    strength = np.asarray(written.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)[..., None] / 255
    alpha = np.clip((strength - 0.3) / 0.35, 0, 1)
    x, y = _box_in(rng, wish["corner"], (pixels.shape[1], pixels.shape[0]), (side, side))
    under = pixels[y : y + side, x : x + side]
    pixels[y : y + side, x : x + side] = under * (1 - alpha) + np.array(DIGIT_INKS[wish["ink"]]) * alpha
    facts = {f"digit-{key}": wish[key] for key in ("corner", "value", "ink", "size")}
    return Picture(_image(pixels), (f"photo:{name}", f"digit:{split}-{wish['value']}-{sample}"), facts)


@cache
def _palette(name: str) -> np.ndarray:
    """A standard colour palette of DICOM as (256, 3) in 0..1."""
    lut = pydicom.dcmread(shipped(f"pydicom/data/palettes/{name}.dcm"))
    planes = [lut[f"{colour}PaletteColorLookupTableData"].value for colour in ("Red", "Green", "Blue")]
    return np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=1) / 255


def medical(rng: Generator, split: str, wish: Wish) -> Picture:
    """A part of a scan or microscope picture in colour, grey or negative, with a side marker in one corner."""
    named = SOURCES["scan"][split]
    modality, look = wish["view"]
    name = str(rng.choice([n for n in named if n.startswith(modality)]))
    original = scan(named[name])
    original = original.crop(_AREAS.get(name, (0, 0, *original.size)))
    least = {"eye": 0.15 if original.width > 500 else 0.6, "microscope": 0.3}.get(modality, 0.7)
    pixels = _crop(rng, original, least)
    while pixels.std() < 0.04:
        pixels = _crop(rng, original, least)
    corner = f"{rng.choice(('top', 'bottom'))} {wish['side']}"
    pixels = _lit_from(_turn_to(pixels, corner), corner, rng.uniform(0.1, 0.5))
    facts: Facts = {"medical-kind": modality}
    grey = pixels[..., 1]  # red-free, as fundus pictures are often taken
    if look != "colour":
        pixels = np.repeat(grey[..., None], 3, axis=2)
        facts["medical-tone"] = "grey"
        border = np.concatenate([grey[:4].ravel(), grey[-4:].ravel(), grey[:, :4].ravel(), grey[:, -4:].ravel()]).mean()
        if border < 0.2:
            facts["medical-background"] = "white" if look == "negative" else "black"
        if look == "negative":
            pixels = 1 - pixels
    else:
        if _chroma(pixels) < 0.1:
            shade = (np.clip(grey, 0, 1) * 255).astype(np.uint8)
            pixels = _palette(str(rng.choice(("hotiron", "hotmetalblue", "pet"))))[shade]
        facts["medical-tone"] = "colour"
    image = _image(pixels).convert("RGB")
    side = round(rng.uniform(0.15, 0.2) * min(image.size))
    x, y = _box_in(rng, wish["corner"], image.size, (side, side))
    draw = ImageDraw.Draw(image)
    draw.rectangle((x, y, x + side, y + side), fill=(15, 15, 15), outline=(240, 240, 240), width=max(1, side // 20))
    font = _font("DejaVuSans-Bold", round(0.8 * side))
    draw.text((x + side / 2, y + side / 2), wish["marker"], fill=(250, 250, 250), font=font, anchor="mm")
    seen = np.asarray(image.convert("L"), dtype=np.float64) / 255
    facts |= {f"medical-{key}": value for key, value in _brighter_side(seen, 0.05).items()}
    facts |= {"medical-corner": wish["corner"], "medical-marker": wish["marker"]}
    return Picture(_image(np.asarray(image) / 255), (f"scan:{name}",), facts)


# ------------------------------------------------------------------ the set

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
        "legend": ("yes", "no"), "background": tuple(_GROUNDS), "colour": tuple(INKS),
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
_MARKER = "demo_data.json"  # says what the folder holds; "finished" turns true last


def _deal(rng: Generator, count: int, options: Sequence[Any]) -> list[Any]:
    """`count` values in random order, every option as often as every other (give or take one)."""
    order = [int(i) for i in rng.permutation(len(options))]
    cards = [options[order[i % len(options)]] for i in range(count)]
    return [cards[int(i)] for i in rng.permutation(count)]


def _ask(rng: Generator, pictures: Sequence[Picture]) -> list[list[str]]:
    """The forms asked of each picture: those whose answer here was given least so far, so that none gets common."""
    options: dict[str, set[str]] = {}
    for picture in pictures:
        for form, answer in picture.facts.items():
            options.setdefault(form, set()).add(answer)
    given: Counter[tuple[str, str]] = Counter()
    asked = []
    for picture in pictures:
        weight = {}
        for form, answer in picture.facts.items():
            ahead = given[form, answer] - min(given[form, other] for other in options[form])
            weight[form] = given[form, answer] * len(options[form]) + 3 * ahead + rng.random()  # ties fall by lot
        forms = sorted(weight, key=weight.__getitem__)[:PER_IMAGE]
        given.update((form, picture.facts[form]) for form in forms)
        asked.append(forms)
    return asked


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
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # other code draws other pictures
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
            for number, (picture, forms) in enumerate(zip(drawn, _ask(deal, drawn), strict=True)):
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


# ------------------------------------------------------------------ looking at it


def contact_sheet(data: DemoData, split: str = "test", per_kind: int = 12, seed: int = 0) -> Image.Image:
    """Pictures of each kind, one kind a row or two, with what is asked of them and the answers."""
    by_image: dict[str, list[dict[str, Any]]] = {}
    for record in json.loads((data.train if split == "train" else data.test).read_text(encoding="utf-8")):
        by_image.setdefault(record["image"], []).append(record)
    rng = np.random.default_rng(seed)
    chosen = []
    for kind in KINDS:
        names = [name for name, asked in by_image.items() if asked[0]["kind"] == kind]
        chosen += [str(name) for name in rng.choice(names, size=min(per_kind, len(names)), replace=False)]
    cell, across, text = 250, 6, 62
    sheet = Image.new("RGB", (across * cell, -(-len(chosen) // across) * (cell + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, name in enumerate(chosen):
        x, y = place % across * cell, place // across * (cell + text)
        picture = Image.open(data.images / name).convert("RGB")
        picture.thumbnail((cell - 6, cell - 6))
        sheet.paste(picture, (x, y))
        for line, record in enumerate(by_image[name]):
            question, answer = (turn["value"].removeprefix("<image>\n") for turn in record["conversations"])
            draw.text((x, y + cell - 4 + 20 * line), question[:46], fill=(90, 90, 90), font=_font("DejaVuSans", 9))
            draw.text((x + 6, y + cell + 6 + 20 * line), answer, fill=(180, 0, 0), font=_font("DejaVuSans-Bold", 9))
    return sheet

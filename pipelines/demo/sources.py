"""The files that the demo's pictures are drawn from: photographs, tables, texts, digits and scans inside installed packages.

Nothing is downloaded: each file is part of a wheel (scikit-image, scikit-learn, matplotlib, vega_datasets, pydicom) and is
opened by its path, so that no package's own fetcher runs.
"""

import csv
import gzip
import io
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import apply_color_lut

# Kind -> side of the train/test split -> name -> file. Of several files that show the same thing only one is listed, so
# that nothing stands on both sides: the stereo pair of the motorcycle, two sizes of one ultrasound, pydicom's re-encodings
# of one slice, vega's copy of the iris table, matplotlib's copy of the stock prices.
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
DIGITS = "sklearn/datasets/data/digits.csv.gz"  # every fourth distinct sample is a test sample


@dataclass(frozen=True)
class Table:
    """A real table: columns of numbers and of words, all of the same length, with the rows in the order of the file."""

    name: str
    numbers: dict[str, np.ndarray]
    words: dict[str, list[str]]
    order: list[str] | None  # label of each row where rows follow each other in time, else None

    def rows(self) -> int:
        return len(next(iter(self.numbers.values())))


def shipped(path: str) -> Path:
    """The path of the file `package/inside/the/package` in an installed wheel; the package is not imported.

    Raises:
        FileNotFoundError: the package is not installed, or its version does not hold the file.
    """
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
    of_split = [row for index, row in enumerate(distinct) if (index % 4 == 3) == (split == "test")]
    return {str(value): [row[:64].reshape(8, 8) for row in of_split if row[64] == value] for value in range(10)}


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

"""The demo's data: honest answers, a clean split, the same bytes for the same seed."""

import filecmp
import hashlib
import json
import socket
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.demo import charts, sources
from pipelines.demo.data import KINDS, DemoData, build_demo_data
from pipelines.demo.documents import PAPERS
from pipelines.demo.picture import CORNERS
from pipelines.demo.questions import QUESTIONS
from pipelines.demo.sources import SOURCES

IMAGES = 200


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    """A small build, made with the network cut off: nothing may be downloaded."""

    def refuse(*_: object) -> None:
        raise AssertionError("the demo data tried the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return build_demo_data(tmp_path_factory.mktemp("demo"), images=IMAGES)


def records(data: DemoData, split: str) -> list[dict]:
    return json.loads((data.train if split == "train" else data.test).read_text(encoding="utf-8"))


def answers(data: DemoData, form: str) -> list[tuple[str, Path]]:
    """(answer, image file) of every question of this form, both splits."""
    asked = records(data, "train") + records(data, "test")
    return [(r["conversations"][1]["value"], data.images / r["image"]) for r in asked if r["form"] == form]


def rgb(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) / 255


def test_records_are_llava_and_every_image_opens(data: DemoData) -> None:
    both = records(data, "train") + records(data, "test")
    assert len({record["id"] for record in both}) == len(both)
    assert len({record["image"] for record in both}) == IMAGES
    for record in both:
        assert set(record) == {"id", "image", "conversations", "kind", "form", "source"}
        human, gpt = record["conversations"]
        assert human["from"] == "human" and gpt["from"] == "gpt"
        assert human["value"].removeprefix("<image>\n") in QUESTIONS[record["form"]]
        assert gpt["value"] and len(gpt["value"].split()) <= 2
        assert record["kind"] in KINDS and record["form"].startswith(record["kind"])
    for name in {record["image"] for record in both}:
        with Image.open(data.images / name) as image:
            image.load()
            assert min(image.size) >= 120 and max(image.size) <= 480, name
    assert {Path(record["image"]).suffix for record in both} == {".jpg", ".png"}


def test_no_source_and_no_pixels_are_in_both_splits(data: DemoData) -> None:
    used = {
        split: {part for r in records(data, split) for part in r["source"].split("+")} for split in ("train", "test")
    }
    assert used["train"].isdisjoint(used["test"])
    assert {part.split(":")[0] for part in used["test"]} == {"photo", "table", "text", "scan", "digit"}
    pixels = {
        split: {
            hashlib.sha256(Image.open(data.images / r["image"]).convert("RGB").tobytes()).digest()
            for r in records(data, split)
        }
        for split in ("train", "test")
    }
    assert pixels["train"].isdisjoint(pixels["test"])
    assert len(pixels["train"]) + len(pixels["test"]) == IMAGES


def test_no_picture_under_two_names_is_in_both_splits() -> None:
    def small(image: Image.Image) -> np.ndarray:
        values = np.asarray(image.convert("L").resize((24, 24), Image.Resampling.BOX), dtype=np.float64)
        return (values - values.mean()) / values.std()

    # two views of one motorcycle agree by 0.79, two encodings of one scan by 0.999; two heads in one scanner by 0.89
    for kind, read, limit in (("photo", sources.photograph, 0.75), ("scan", sources.scan, 0.97)):
        train, test = ({n: small(read(p)) for n, p in SOURCES[kind][split].items()} for split in ("train", "test"))
        for (a, seen), (b, unseen) in product(train.items(), test.items()):
            assert abs((seen * unseen).mean()) < limit, f"{a} and {b} look like one picture"
    left, right = (small(sources.photograph(f"skimage/data/motorcycle_{side}.png")) for side in ("left", "right"))
    assert (left * right).mean() > 0.75
    names = ("examples_jpeg2k", "examples_rgb_color")
    large, little = (small(sources.scan(f"pydicom/data/test_files/{name}.dcm")) for name in names)
    assert (large * little).mean() > 0.97


def test_no_text_table_row_or_digit_is_in_both_splits() -> None:
    texts = {
        split: {p for path in SOURCES["text"][split].values() for p in sources.paragraphs(path)}
        for split in ("train", "test")
    }
    assert texts["train"].isdisjoint(texts["test"])
    rows: dict[str, set[tuple[float, ...]]] = {"train": set(), "test": set()}
    for split in ("train", "test"):
        for name, path in SOURCES["table"][split].items():
            values = np.stack(list(sources.table(name, path).numbers.values()), axis=1)
            rows[split] |= {tuple(row) for row in values if len(row) > 1}
    assert rows["train"] and rows["test"] and rows["train"].isdisjoint(rows["test"])
    scans = {
        split: {s.tobytes() for group in sources.digits(split).values() for s in group} for split in ("train", "test")
    }
    assert scans["train"].isdisjoint(scans["test"])
    assert 0.2 < len(scans["test"]) / (len(scans["train"]) + len(scans["test"])) < 0.3


def test_every_kind_is_tested_and_no_answer_is_the_common_one(data: DemoData) -> None:
    train, test = (
        {
            form: Counter(a["conversations"][1]["value"] for a in records(data, split) if a["form"] == form)
            for form in QUESTIONS
        }
        for split in ("train", "test")
    )
    for kind in KINDS:
        assert sum(count.total() for form, count in test.items() if form.startswith(kind)) >= 25
    for form in QUESTIONS:
        assert train[form], form
        assert set(test[form]) <= set(train[form])
        assert len(train[form]) >= 2
        share = train[form].most_common(1)[0][1] / train[form].total()
        assert share <= 1 / len(train[form]) + 0.2, (form, train[form])


def test_measured_answers_hold_on_the_saved_files(data: DemoData) -> None:
    for answer, path in answers(data, "photo-tone"):
        spread = rgb(path).max(axis=2) - rgb(path).min(axis=2)
        assert (spread.mean() > 0.05) == (answer == "colour"), path
    for answer, path in answers(data, "photo-light"):
        assert (rgb(path).mean() > 0.44) == (answer == "bright"), path
    for form in ("photo-side", "medical-side"):
        for answer, path in answers(data, form):
            grey = np.asarray(Image.open(path).convert("L"), dtype=np.float64)
            middle = grey.shape[1] // 2
            assert (grey[:, :middle].mean() > grey[:, middle:].mean()) == (answer == "left"), path
    for answer, path in answers(data, "photo-corner"):
        grey = np.asarray(Image.open(path).convert("L").resize((2, 2), Image.Resampling.BOX)).ravel()
        assert CORNERS[int(grey.argmax())] == answer, path
    strongest = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1)}
    for answer, path in answers(data, "photo-tint"):
        red, green, blue = rgb(path).mean(axis=(0, 1))
        if answer == "yellow":
            assert min(red, green) > blue + 0.05, path
        else:
            assert int(np.argmax((red, green, blue))) in strongest[answer], path


def test_drawn_answers_hold_on_the_saved_files(data: DemoData) -> None:
    for answer, path in answers(data, "chart-background"):
        assert abs(rgb(path)[2, 2].mean() - {"white": 1.0, "grey": 0.7, "black": 0.0}[answer]) < 0.05, path
    for answer, path in answers(data, "document-paper"):
        paper = np.median(rgb(path).reshape(-1, 3), axis=0) * 255
        assert min(PAPERS, key=lambda name: float(np.abs(paper - PAPERS[name]).sum())) == answer, path
    yellow = {path for answer, path in answers(data, "digit-ink") if answer == "yellow"}
    found = 0
    for answer, path in answers(data, "digit-corner"):
        if path in yellow:
            red, green, blue = np.moveaxis(rgb(path), 2, 0)
            y, x = np.nonzero((red > 0.8) & (green > 0.7) & (blue < 0.4))
            seen = ("top" if y.mean() < red.shape[0] / 2 else "bottom") + (
                " left" if x.mean() < red.shape[1] / 2 else " right"
            )
            assert seen == answer, path
            found += 1
    assert found > 2


@pytest.mark.parametrize(
    ("values", "trend"),
    [
        ((1, 2, 3, 4, 5), "rise"),
        ((9, 7, 6, 3, 1), "fall"),
        ((1, 5, 2, 4, 2), None),
        ((3, 3, 3, 3, 3), None),
        ((1, 2), None),
    ],
)
def test_a_trend_is_only_asked_for_where_it_is_clear(values: tuple[float, ...], trend: str | None) -> None:
    assert charts._trend(np.array(values, dtype=float)) == trend


@pytest.mark.parametrize(
    ("values", "peak"),
    [((9, 1, 2), "left"), ((1, 9, 2), "middle"), ((1, 2, 9), "right"), ((1, 9, 2, 3), None), ((9, 8.5, 1), None)],
)
def test_a_peak_is_only_asked_for_where_it_is_clear(values: tuple[float, ...], peak: str | None) -> None:
    assert charts._peak(np.array(values, dtype=float)) == peak


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    one, two, other = (build_demo_data(tmp_path / n, seed=s, images=15) for n, s in (("a", 3), ("b", 3), ("c", 4)))
    names = sorted(str(p.relative_to(one.folder)) for p in one.folder.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(two.folder)) for p in two.folder.rglob("*") if p.is_file())
    assert filecmp.cmpfiles(one.folder, two.folder, names, shallow=False) == (names, [], [])
    assert one.train.read_bytes() != other.train.read_bytes()


def test_a_finished_build_is_reused_and_a_half_finished_one_made_anew(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    first = build_demo_data(tmp_path / "d", images=10, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 10) for i in range(10)]
    before = {p.name: p.stat().st_mtime_ns for p in first.images.iterdir()}
    assert build_demo_data(tmp_path / "d", images=10, progress=lambda *_: calls.append((0, 0))) == first
    assert len(calls) == 10 and before == {p.name: p.stat().st_mtime_ns for p in first.images.iterdir()}

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    wanted = first.test.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        build_demo_data(tmp_path / "d", images=10, seed=1, progress=stop)
    assert build_demo_data(tmp_path / "d", images=10).test.read_bytes() == wanted
    assert {p.name for p in first.images.iterdir()} == set(before)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="not empty"):
        build_demo_data(tmp_path, images=10)
    assert (tmp_path / "images" / "mine.png").read_bytes() == b"precious"


def test_a_missing_shipped_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"skimage does not ship data/absent\.png"):
        sources.shipped("skimage/data/absent.png")


def test_bad_files_are_unusable_in_four_ways_and_no_record_names_them(data: DemoData) -> None:
    truncated, empty, bomb, notes = data.bad
    assert [path.name for path in data.bad] == ["truncated.jpg", "empty.png", "bomb.png", "notes.png"]
    assert {path.name for path in data.bad}.isdisjoint(
        r["image"] for r in records(data, "train") + records(data, "test")
    )
    with Image.open(truncated) as image, pytest.raises(OSError, match="truncated"):
        image.load()
    assert empty.stat().st_size == 0
    assert bomb.stat().st_size < 500_000
    with pytest.warns(Image.DecompressionBombWarning), Image.open(bomb) as image:
        assert image.size == (12000, 12000) and image.mode == "1"
    assert notes.read_text(encoding="utf-8").startswith("These are notes")
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(notes)


def test_demo_data_needs_neither_ray_nor_torch() -> None:
    heavy = "{'ray', 'torch', 'skimage', 'sklearn', 'pandas', 'pooch'}"
    code = f"import sys, pipelines.demo.data; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sources.__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr

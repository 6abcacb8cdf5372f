"""Where pictures come from, and the first look at them."""

import json

import numpy as np
import pytest
from PIL import Image

from mova_core.data import DataError
from mova_core.features import FeatureStore
from pipelines.inspect_images import inspect
from pipelines.sources import find_images, image_table


def draw(path, seed: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    return str(path)


def record(*images: str, **fields) -> dict:
    said = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
    return {"image": list(images), "conversations": said, **fields}


class TestFolders:
    def test_pictures_at_any_depth_sorted(self, tmp_path):
        drawn = [draw(tmp_path / name, seed) for seed, name in enumerate(("a/b/1.png", "a/c.jpg", "z.PNG"))]
        (tmp_path / "notes.txt").write_text("left alone")
        found = find_images(tmp_path)
        assert found["image"].to_pylist() == drawn and found["experts"].null_count == 3
        assert find_images(tmp_path, limit=2)["image"].to_pylist() == drawn[:2]

    def test_nothing_in_it(self, tmp_path):
        with pytest.raises(DataError, match="holds no picture"):
            find_images(tmp_path)


class TestRecords:
    def test_each_image_once_in_the_order_of_the_records(self, tmp_path):
        path = tmp_path / "data.json"
        path.write_text(json.dumps([record("2.png"), record("1.png", "2.png"), record("3.png")]))
        there = [str(tmp_path / "there" / f"{number}.png") for number in (2, 1, 3)]
        assert find_images(path, tmp_path / "there")["image"].to_pylist() == there
        assert find_images(path, tmp_path / "there", limit=2)["image"].to_pylist() == there[:2]

    def test_routed_only_unites_the_labels_of_an_image(self, tmp_path):
        path = tmp_path / "data.jsonl"
        labelled = [
            record("1.png", routing=["sam"]), record("2.png", routing=[]), record("1.png", routing=["deplot", "sam"]),
        ]  # fmt: skip
        path.write_text("\n".join(map(json.dumps, labelled)))
        assert find_images(path, routed_only=True)["experts"].to_pylist() == [["deplot", "sam"], []]
        assert find_images(path)["experts"].to_pylist() == [None, None]
        path.write_text("\n".join(map(json.dumps, [*labelled, record("3.png")])))
        with pytest.raises(DataError, match=r"line 4: it has no routing label: run `mova label` first"):
            find_images(path, routed_only=True)
        skipped: list[str] = []
        assert len(find_images(path, None, "skip", skipped, routed_only=True)) == 2 and len(skipped) == 1
        with pytest.raises(DataError, match="routing labels"):
            find_images(tmp_path, routed_only=True)


@pytest.mark.ray
def test_every_image_is_looked_at_once(ray_cluster, tmp_path):
    """Equal pictures become one row that needs the experts of all; what cannot be used is told, a picture that is none kept."""
    paths = [draw(tmp_path / f"{index}.png", seed) for index, seed in enumerate((5, 6, 5, 7, 6))]
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    gone = str(tmp_path / "gone.png")
    needs = [["sam"], None, ["deplot"], [], ["vary"], ["sam"], ["sam"]]
    images = image_table([*paths, str(bad), gone], needs)
    store = FeatureStore(tmp_path / "store", create=True)
    for _ in range(2):
        found = inspect(images, store, progress=False)
        assert found.readable["image"].to_pylist() == [paths[0], paths[1], paths[3]]
        assert found.readable["experts"].to_pylist() == [["deplot", "sam"], None, []]
        assert [row["path"] for row in found.refused] == [str(bad), gone]
        assert "not an image" in found.refused[0]["reason"] and "cannot be read" in found.refused[1]["reason"]
        [kept] = store.quarantined()
        assert kept["image"] == str(bad) and kept["sha256"] and kept["expert"] is None
    assert len(set(found.readable["key"].to_pylist())) == 3

"""The first look at pictures, and what it leaves in the store's quarantine, without Ray."""

import hashlib
import os

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mova_core.data import Sample, split_usable
from mova_core.features import FeatureStore
from mova_core.images import ImageRef
from mova_core.io.isolated import ProcessDied
from pipelines.precompute import inspect_images as module
from pipelines.precompute.inspect_images import SEEN, inspect_images, look_at, update_quarantine


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "store", create=True)


def quarantine(store: FeatureStore, images: list[str], unreadable: dict[str, str], *broken) -> list[tuple]:
    update_quarantine(store, store.quarantined(), pa.chunked_array([images], pa.string()), unreadable, broken)
    return sorted((row["image"], row["sha256"], row["reason"]) for row in store.quarantined())


def test_a_picture_that_cannot_be_read_is_listed_once_and_leaves_when_it_can(store):
    bad = ("bad.png", "ab" * 32, "0 bytes")
    images = ["bad.png", "gone.png", "away.png"]
    both = {"gone.png": "cannot be read (No such file)", "away.png": "cannot be read (HTTP 503)"}
    listed = [("away.png", None, both["away.png"]), bad, ("gone.png", None, both["gone.png"])]
    assert quarantine(store, images, both, bad) == listed
    assert quarantine(store, images, both | {"gone.png": "in other words"}, bad) == listed
    assert quarantine(store, images, {"gone.png": "cannot be read"}, bad) == listed[1:]
    assert quarantine(store, ["bad.png"], {}, bad) == listed[1:], "another source tells nothing of gone.png"
    assert quarantine(store, images, {}, bad) == [bad]


def test_every_stage_leaves_out_a_picture_that_precompute_could_not_read(store, tmp_path):
    gone, there = tmp_path / "gone.png", tmp_path / "there.png"
    there.write_bytes(b"a picture")
    quarantine(store, [str(gone), str(there)], {str(gone): "cannot be read (No such file)"})
    samples = [Sample(id=path.name, images=(ImageRef(path=path),), turns=(("user", "q"),)) for path in (gone, there)]
    usable, left_out = split_usable(samples, store.quarantined())
    assert [sample.id for sample in usable] == ["there.png"]
    assert [sample.id for left in left_out.values() for sample in left] == ["gone.png"]
    gone.write_bytes(b"downloaded since")
    assert len(split_usable(samples, store.quarantined())[0]) == 2


def test_one_picture_may_be_quarantined_for_several_reasons(store, tmp_path):
    """Each row counts, not the last."""
    path = tmp_path / "a.png"
    path.write_bytes(b"a picture")
    image = ImageRef(path=path)
    store.quarantine([{"image": str(path), "sha256": key, "reason": "r", "expert": "sam"} for key in (image.key, None)])
    sample = Sample(id="a", images=(ImageRef(path=path),), turns=(("user", "q"),))
    assert split_usable([sample], store.quarantined())[0] == []


def look(*paths) -> dict[str, tuple[bytes | None, str | None]]:
    nothing = {name: pa.nulls(len(paths), SEEN.field(name).type) for name in ("version", "key", "error")}
    rows = inspect_images(pa.table({"row": np.arange(len(paths)), "image": list(map(str, paths)), **nothing}))
    return {path.name: (row["key"], row["error"]) for path, row in zip(paths, rows.to_pylist(), strict=True)}


def test_each_picture_gets_its_key_or_its_reason(tmp_path):
    good, text, gone, pipe = (tmp_path / name for name in ("good.png", "text.png", "gone.png", "pipe.png"))
    Image.new("RGB", (9, 9)).save(good)
    text.write_text("no picture")
    os.mkfifo(pipe)
    seen = look(good, text, gone, pipe)
    assert seen["good.png"] == (hashlib.sha256(good.read_bytes()).digest(), None)
    assert seen["text.png"][0] and str(seen["text.png"][1]).startswith("not an image in a known format")
    assert seen["gone.png"] == (None, "cannot be read (No such file or directory)")
    assert seen["pipe.png"] == (None, "cannot be read (it is a named pipe, not a file)")


def test_a_picture_that_ends_the_process_which_decodes_it_is_told_after_a_second_try(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("a.png", "poison.png", "unlucky.png")]
    for number, path in enumerate(paths):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path)
    calls: list[str] = []

    def dying(image: str, data: bytes = b""):
        calls.append(image)
        if image.endswith("poison.png") or (image.endswith("unlucky.png") and calls.count(image) == 1):
            raise ProcessDied("ended its process (signal 11)")
        return look_at(image, data)

    monkeypatch.setattr(module, "isolated", lambda *arguments: dying)
    seen = look(*paths)
    assert seen["a.png"][1] is None and seen["unlucky.png"][1] is None
    assert seen["poison.png"] == (
        hashlib.sha256(paths[1].read_bytes()).digest(),
        "broken image (reading it ended its process (signal 11))",
    )

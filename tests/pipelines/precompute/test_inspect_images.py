"""What the first look at pictures leaves in the store's quarantine, without Ray."""

import pyarrow as pa
import pytest

from mova_core.data import Sample, split_usable
from mova_core.features import FeatureStore
from mova_core.images import ImageRef
from pipelines.precompute.inspect_images import update_quarantine


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

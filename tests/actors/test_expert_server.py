import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from actors.expert_server import ExpertServer
from mova_core.experts import Features
from mova_core.features import FeatureStore
from mova_core.images import ImageError, ImageRef


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    paths = [folder / f"{index}.png" for index in range(5)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(path)
    (folder / "bad.png").write_bytes(paths[0].read_bytes()[:200])
    return [*paths, folder / "bad.png"]


def shard_of(shelf, pictures):
    images = [ImageRef(path=str(path)) for path in pictures]
    shard = shelf.plan([image.key for image in images], 100)[0]
    paths = {image.key: image.path for image in images}
    return {"shard": shard.id, "keys": list(shard.keys), "paths": [paths[key] for key in shard.keys]}


def computed(result) -> Features:
    assert isinstance(result, Features), result
    return result


def test_features_of_good_pictures_beside_a_bad_one(pictures):
    server = ExpertServer("biomedclip", size="mini", batch_size=2)
    results = server.features([ImageRef(path=str(path)) for path in pictures])
    assert [isinstance(result, ImageError) for result in results] == [False] * 5 + [True]
    alone = computed(server.features([ImageRef(path=str(pictures[3]))])[0])
    assert alone.tokens.shape == (16, 64) and alone.grid == (4, 4)
    torch.testing.assert_close(alone.tokens, computed(results[3]).tokens, atol=1e-5, rtol=0)


def test_a_shard_is_stored_once_and_references_go_on(pictures, tmp_path):
    server = ExpertServer(
        "sam", size="mini", batch_size=2, store=str(FeatureStore(tmp_path / "store", create=True).path)
    )
    assert server.store is not None
    shelf = server.store.add_expert(server.description)
    row = shard_of(shelf, pictures)
    references = server(pa.Table.from_pylist([row])).to_pylist()
    assert {ref["key"] for ref in references} == set(row["keys"])
    assert [ref["image"] for ref in references if ref["error"]] == [str(pictures[-1])]

    store = FeatureStore(tmp_path / "store")
    assert store.stat()["experts"]["sam"]["features"] == 5
    assert [(bad["image"], bad["expert"]) for bad in store.quarantined()] == [(str(pictures[-1]), "sam")]
    [stored] = store.fetch([ImageRef(path=str(pictures[0]))], [["sam"]])
    again = computed(server.features([ImageRef(path=str(pictures[0]))])[0])
    torch.testing.assert_close(stored["sam"].tokens, again.tokens, atol=1e-5, rtol=0)

    shards = sorted((tmp_path / "store").rglob("*.safetensors"))
    assert server(pa.Table.from_pylist([row])).num_rows == 6, "a shard that is there is told of, not made again"
    assert sorted((tmp_path / "store").rglob("*.safetensors")) == shards


def test_without_a_store_it_says_so():
    with pytest.raises(ValueError, match="given no store"):
        ExpertServer("sam", size="mini")(pa.table({"shard": []}))

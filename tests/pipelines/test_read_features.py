import numpy as np
import pyarrow as pa
import pytest
import torch

from mova_core.experts import Features
from mova_core.features import FeatureStore, MissingFeatures
from pipelines.read_features import features_of, read_features


@pytest.mark.ray
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_row_comes_equal(ray_cluster, tmp_path, monkeypatch, dtype):
    store = FeatureStore(tmp_path / "store", create=True)
    partition = store.add_expert({"expert": "sam", "dtype": dtype, "weights": "w"})
    keys = [f"{number:02x}" * 31 + "00" for number in range(50)]
    grids = [(3, 4 + number % 2) for number in range(50)]
    features = {key: Features(torch.randn(grid[0] * grid[1], 8), grid) for key, grid in zip(keys, grids, strict=True)}
    for half in (keys[:20], keys[20:]):
        partition.write(partition.shard_id(half), {key: features[key] for key in half})
    monkeypatch.setattr("pipelines.read_features.BLOCK_BYTES", 12 * 192)

    def of(dataset) -> dict[str, Features]:
        tables = [ray_table for ray_table in dataset.iter_batches(batch_size=None, batch_format="pyarrow")]
        return {
            key: one for table in tables for key, one in zip(table["key"].to_pylist(), features_of(table), strict=True)
        }

    wanted = dict(zip(keys, store.partition("sam").read(keys), strict=True))
    whole = read_features(store, "sam")
    assert whole.count() == 50
    for got, chosen in ((of(whole), keys), (of(read_features(store, "sam", keys[5:8])), keys[5:8])):
        assert sorted(got) == sorted(chosen)
        for key, (tokens, grid) in got.items():
            assert torch.equal(tokens, wanted[key].tokens) and grid == wanted[key].grid

    def norms(rows: pa.Table) -> pa.Table:
        norm = [one.tokens.float().norm().item() for one in features_of(rows)]
        return pa.table({"key": rows["key"], "norm": norm})

    found = {row["key"]: row["norm"] for row in whole.map_batches(norms, batch_format="pyarrow").take_all()}
    assert all(np.isclose(found[key], wanted[key].tokens.float().norm().item(), rtol=1e-5) for key in keys)


def test_missing_features_are_reported_before_anything_is_read(tmp_path):
    store = FeatureStore(tmp_path / "store", create=True)
    store.add_expert({"expert": "sam", "dtype": "float32", "weights": "w"})
    with pytest.raises(MissingFeatures, match="sam: 1"):
        read_features(store, "sam", ["ab" * 32])
    with pytest.raises(ValueError, match="no image with features of sam"):
        read_features(store, "sam")

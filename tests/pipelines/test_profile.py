import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.nodes import PlanError
from cluster.pools import PoolSpec
from mova_core.experts.cost import ProfileError, read_profiles
from mova_core.features import FeatureStore
from pipelines.precompute.listing import image_table
from pipelines.precompute.run import precompute
from pipelines.profile import profile
from tests.pipelines.cli.json_page import check

HERE = PoolSpec(expert="profile")


@pytest.mark.ray
def test_an_expert_is_measured_and_its_pool_planned_by_that(ray_cluster, tmp_path):
    run: dict[str, Any] = {"size": "mini", "progress": False}
    [measured] = profile(["biomedclip"], tmp_path / "p.json", place=HERE, seconds=1.0, **run)
    assert read_profiles(tmp_path / "p.json") == [measured]
    check("profile", json.loads(json.dumps([asdict(measured)])))
    assert (measured.expert, measured.dtype) == ("biomedclip", "float32") and measured.threads >= 1
    assert measured.device.startswith("cpu ") and measured.batches[0].batch == 1
    assert all(one.images_per_second > 1 for one in measured.batches)
    assert all((one.peak_bytes or 0) > 100 << 20 for one in measured.batches), "a process with PyTorch in it"

    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    done = precompute(
        image_table([tmp_path / "0.png"]), tmp_path / "store", experts=["biomedclip"], profiles=[measured], **run
    )
    assert done.computed == {"biomedclip": 1} and FeatureStore(tmp_path / "store").stat()["experts"]
    [one] = measured.batches[:1]
    hungry = type(measured)(**{**vars(measured), "batches": [type(one)(**{**vars(one), "peak_bytes": 1 << 50})]})
    with pytest.raises(PlanError, match=r"pool biomedclip: 1 actors take 1048576\.0 GiB as profiled"):
        precompute(
            image_table([tmp_path / "0.png"]), tmp_path / "store", experts=["biomedclip"], profiles=[hungry], **run
        )


@pytest.mark.ray
def test_no_such_place_and_no_such_file(ray_cluster, tmp_path):
    with pytest.raises(PlanError, match="no node has a A100"):
        profile(["biomedclip"], tmp_path / "p.json", place=PoolSpec(expert="profile", gpu=1, accelerator="A100"))
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(ProfileError, match=r"p\.json is no profile"):
        profile(["biomedclip"], tmp_path / "p.json", place=HERE, size="mini", progress=False)

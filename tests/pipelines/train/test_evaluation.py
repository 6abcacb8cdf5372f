"""The loss of held-out samples: that of each sample alone, and nothing of the training changes by it."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from mova_core.data import DataError
from mova_core.features import FeatureStore
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.train.batches import StageSamples
from pipelines.train.config import TrainConfig
from pipelines.train.data import check_data, held_out_config
from pipelines.train.evaluation import HeldOut
from pipelines.train.parallelize import parallelize
from tests.pipelines.train.test_loop import loss_row_by_row, places  # noqa: F401  # a fixture


def test_the_loss_of_held_out_samples(places, tmp_path):  # noqa: F811
    config = TrainConfig(
        stage="sft", output=str(tmp_path / "out"), batch_size=2, workers=1, eval_data=places["data"], **places
    )
    held_out = check_data(config).held_out
    assert held_out is not None and len(held_out.rows) == 7
    model = MoVAForConditionalGeneration.from_pretrained(places["model"], dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    processor, store = MoVAProcessor.from_pretrained(places["model"]), FeatureStore(places["store"])
    with open(places["data"]) as file:
        records = [json.loads(line) for line in file]
    with torch.no_grad():
        wanted = float(loss_row_by_row(model.eval(), processor, store, records, range(7), "token"))
    parallel = parallelize(model.train(), learning_rate=1e-3)
    model.base_encoder.eval()  # as a frozen part may be
    samples = StageSamples(held_out_config(config), held_out.samples, store, processor, model.config.pool)

    def state() -> list[Any]:
        modes = [module.training for module in model.modules()]
        gradients = [parameter.grad is None for parameter in model.parameters()]
        return [modes, gradients, torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]

    before = state()
    for size in (3, 1):
        evaluation = HeldOut(samples, parallel, size=size)
        assert evaluation.loss() == pytest.approx(wanted, rel=1e-5)
        assert evaluation.loss() == evaluation.loss(), "the same each time"
    assert state() == before


def test_every_needs_held_out_samples(places, tmp_path):  # noqa: F811
    config: dict[str, Any] = {"stage": "sft", "output": str(tmp_path / "out"), "batch_size": 2, **places}
    with pytest.raises(DataError, match=r"--eval-every 5 needs --eval-data"):
        check_data(TrainConfig(eval_every=5, **config))
    with pytest.raises(DataError, match=r"nothing.json"):
        check_data(TrainConfig(eval_data=str(tmp_path / "nothing.json"), **config))

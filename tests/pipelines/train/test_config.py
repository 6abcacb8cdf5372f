"""Settings of a training run: one source of defaults, readable before torch and Ray are imported."""

import subprocess
import sys
from dataclasses import replace
from typing import Any, get_args

import pytest

from pipelines.train.config import LABEL_STAGES, STAGES, Stage, TrainConfig

PLACES: dict[str, Any] = {"model": "model", "data": "data.json", "store": "store", "output": "out"}


def test_defaults_are_those_of_the_stage():
    assert tuple(STAGES) == get_args(Stage) and set(LABEL_STAGES) < set(STAGES)
    for stage, defaults in STAGES.items():
        config = TrainConfig(stage=stage, **PLACES)
        assert (config.learning_rate, config.batch_size) == (defaults.learning_rate, defaults.batch_size)
    assert (STAGES["pretrain"].learning_rate, STAGES["pretrain"].batch_size) == (2e-4, 1024), "the paper's stage 1"
    assert (STAGES["sft"].learning_rate, STAGES["sft"].batch_size) == (2e-5, 128), "the paper's stage 2"
    changed = TrainConfig(stage="sft", learning_rate=0.5, batch_size=3, **PLACES)
    assert (changed.learning_rate, changed.batch_size) == (0.5, 3)


@pytest.mark.parametrize("module", ["pipelines.train.config"])
def test_defaults_are_shown_without_torch_and_ray(module):
    script = f"import sys, {module}; assert not {{'torch', 'ray', 'transformers'}} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_run_resumes_whatever_machines_it_has(tmp_path):
    from pipelines.train.run import identity

    places: dict[str, Any] = {name: str(tmp_path / name) for name in ("model", "data", "store", "output")}
    config = TrainConfig(stage="sft", **places)
    settings: dict[str, Any]
    for settings in ({"workers": 7}, {"gpu": True}, {"loader_processes": 3}, {"checkpoint_every": 9}):
        assert identity(replace(config, **settings)) == identity(config)
    for settings in ({"seed": 1}, {"batch_size": 7}, {"epochs": 2.0}, {"data": "x"}, {"max_length": 9}):
        assert identity(replace(config, **settings)) != identity(config)


def test_the_gradient_is_that_of_all_tokens_whatever_the_ranks():
    """One rank without any answer token, others with few and with many; DDP averages what the ranks compute."""
    import torch
    import torch.nn.functional as F

    from mova_core.processing import IGNORE
    from pipelines.train.loop import weighted_loss

    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    words, targets = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 5
    [expected] = torch.autograd.grad(F.cross_entropy(words @ weights, targets), weights)
    gradients: list[torch.Tensor] = []
    for start, end in ((0, 2), (2, 12), (12, 12)):
        padded = F.pad(targets[start:end], (0, 3), value=IGNORE)
        loss = F.cross_entropy(F.pad(words[start:end], (0, 0, 0, 3)) @ weights, padded, ignore_index=IGNORE)
        gradients += torch.autograd.grad(weighted_loss(loss, end - start, 12, 3), weights)
    assert loss.isnan() and torch.allclose(torch.stack(gradients).mean(0), expected, atol=1e-7)
    loss = F.cross_entropy(words @ weights, torch.full((12,), IGNORE), ignore_index=IGNORE)
    assert not torch.autograd.grad(weighted_loss(loss, 0, 0, 3), weights)[0].any(), "a step in which no rank has any"

"""Settings that contradict each other or need a package are refused in one line, without torch and Ray."""

import subprocess
import sys
from typing import Any

import pytest

from mova_core.data import DataError
from pipelines.train import settings
from pipelines.train.config import TrainConfig

PLACES: dict[str, Any] = {"model": "model", "data": "data.json", "store": "store", "output": "out"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shard_size": 2}, "--shard-size 2 needs --strategy fsdp"),
        ({"shard_size": 2, "strategy": "fsdp", "workers": 3}, "--workers 3 is no multiple of --shard-size 2"),
        ({"shard_size": 2, "strategy": "fsdp", "min_workers": 1}, "--shard-size 2 needs a fixed number of --workers"),
        (
            {"workers": 8, "min_workers": 2, "batch_size": 16, "micro_batch": 1},
            r"--batch-size 16 is no multiple of 3, which --workers 2\.\.8 allows: give a larger --micro-batch than 1",
        ),
        ({"best": True}, "--best needs --eval-data, a file of held-out samples"),
        ({"freeze": ("adapter",)}, "--freeze adapter: the parts are base, text, llm"),
        ({"part_rates": {"clip": 1e-6}}, "--lr-part clip: the parts are base, text, adapter, llm"),
        (
            {"stage": "router", "freeze": ("base",)},
            "router trains a router alone: --freeze and --lr-part are of pretrain",
        ),
        ({"stage": "light-router", "part_rates": {"llm": 1.0}}, "light-router trains a router alone"),
        ({"stage": "pretrain", "part_rates": {"llm": 1e-6}}, "--lr-part llm=1e-06: llm does not learn in this run"),
        ({"freeze": ("text",), "part_rates": {"text": 0.5}}, "--lr-part text=0.5: text does not learn in this run"),
    ],
)
def test_what_no_worker_could_train_with_is_refused(given, message):
    with pytest.raises(DataError, match=f"^{message}"):
        settings.check_settings(TrainConfig(**{"stage": "sft", **PLACES, **given}))


def test_settings_that_go_together_pass():
    for given in (
        {"shard_size": 2, "strategy": "fsdp", "workers": 4},
        {"freeze": ("base", "text"), "part_rates": {"llm": 1.0}},
        {"workers": 8, "min_workers": 2, "batch_size": 16, "micro_batch": 2},
    ):
        settings.check_settings(TrainConfig(stage="sft", **PLACES, **given))


def test_a_missing_deepspeed_is_named_before_any_worker_starts(monkeypatch):
    config = TrainConfig(stage="sft", strategy="zero3", **PLACES)
    settings.check_settings(config)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as Python marks a package that cannot be imported
    with pytest.raises(
        DataError, match=r"^--strategy zero3 needs DeepSpeed: pip install 'mova-ray\[deepspeed\]', or take"
    ):
        settings.check_settings(config)


def test_settings_are_checked_without_torch_and_ray():
    script = "import sys, pipelines.train.settings; assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("workers", range(2, 9))
def test_every_worker_divides_its_share_alike(workers):
    """Ranks with another number of micro-batches would wait for each other."""
    config = TrainConfig(stage="sft", **PLACES, batch_size=16, micro_batch=2, workers=workers)
    shares = [len(range(rank, 16, workers)) for rank in range(workers)]
    assert all(config.micro_batches <= share <= 2 * config.micro_batches for share in shares)

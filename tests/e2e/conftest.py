"""One demo run, small enough for a test to wait for, that the tests of whole paths share."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.demo.run import DemoConfig, demo

TINY: dict[str, Any] = {
    "images": 60,
    "language_steps": 16,
    "pretrain_epochs": 0.8,
    "sft_epochs": 0.8,
    "router_epochs": 0.8,
    "workers": 1,  # two learn as one: tests/pipelines/train/test_parallel.py, and test_training_goes_on_from_its_last_checkpoint
}


@pytest.fixture(scope="session")
def ran(ray_cluster, tmp_path_factory):
    """The demo's configuration and its result."""
    config = DemoConfig(folder=str(tmp_path_factory.mktemp("demo")), **TINY)
    return config, demo(config, progress=False)


@pytest.fixture
def demo_folder(ran) -> Path:
    """The folder of that run."""
    return Path(ran[0].folder)

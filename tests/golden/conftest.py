"""The golden numbers: tensors and facts computed with the published code, and its portable filler."""

import json
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[2]
OWN = REPOSITORY / "tests" / "golden" / "data"  # a few megabytes of it; tests of other cases are skipped there


class Golden:
    """Cases under `dir`: golden("dinov2/swiglu") -> (tensors by name, facts); "adapter" is "adapter/adapter"."""

    def __init__(self, folder: Path):
        self.dir = folder
        self.seed = (folder / "seed.txt").read_text().strip()

    @lru_cache(maxsize=8)  # noqa: B019  one fixture per session
    def __call__(self, case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        stem = self.dir / case
        if stem.is_dir():
            stem /= stem.name
        tensors = stem.with_suffix(".safetensors")
        if self.dir == OWN and not stem.with_suffix(".json").exists():
            pytest.skip(f"{case} is not in the project's small copy; name the whole folder in MOVA_GOLDEN")
        facts = json.loads(stem.with_suffix(".json").read_text())
        return (load_file(tensors) if tensors.exists() else {}), facts

    def uniform(self, name: str, shape: tuple[int, ...], lo: float = -1.0, hi: float = 1.0) -> Tensor:
        """The filler: float32 uniform in lo..hi, a pure function of (seed, name, shape)."""
        random = np.random.RandomState(zlib.crc32(f"{self.seed}:{name}".encode()))
        values = lo + (hi - lo) * random.random_sample(int(np.prod(shape)))
        return torch.from_numpy(values.astype(np.float32).reshape(shape))


def pytest_configure(config: pytest.Config) -> None:
    """`golden_dir`: the folder that MOVA_GOLDEN names, else ../shared/golden beside the repository, else ours."""
    named = os.environ.get("MOVA_GOLDEN")
    beside = REPOSITORY.parent / "shared" / "golden"
    config.golden_dir = Path(named).resolve() if named else beside if beside.is_dir() else OWN  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def golden(pytestconfig: pytest.Config) -> Golden:
    """The golden numbers of the folder that `pytest_configure` chose."""
    return Golden(pytestconfig.golden_dir)  # type: ignore[attr-defined]

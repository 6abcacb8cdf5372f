"""Images and quick retries for the tests of reading."""

import io

import numpy as np
import pytest
import tenacity
from PIL import Image

from mova_core.io import filesystem


def encoded(seed: int, side: int = 20) -> bytes:
    """A PNG of random pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def own_cache_and_quick_retries(monkeypatch, tmp_path):
    monkeypatch.setattr(filesystem, "WAIT", tenacity.wait_fixed(0.01))
    monkeypatch.setenv("MOVA_CACHE", str(tmp_path / "cache"))

"""Encoded rows by exact values; tests of whole stores are in test_store.py."""

import numpy as np
import pytest
import torch

from mova_core.experts import Features
from mova_core.features.codec import CODECS, as_stored


def test_a_row_of_int8_holds_scales_then_tokens():
    row, loss = CODECS["int8"].encode(torch.tensor([[127.0, 0.0], [-63.6, 0.0]]))
    assert np.frombuffer(row[:8].tobytes(), np.float32).tolist() == [1.0, 1.0], "a channel of zeros has the scale 1"
    assert np.frombuffer(row[8:].tobytes(), np.int8).tolist() == [127, 0, -64, 0]
    assert loss == pytest.approx(0.4 / (127**2 + 63.6**2) ** 0.5, rel=1e-4)


def test_the_loss_is_of_finite_values_and_zero_for_zeros():
    assert CODECS["bfloat16"].encode(torch.zeros(2, 2))[1] == CODECS["int8"].encode(torch.zeros(2, 2))[1] == 0.0
    _, loss = CODECS["bfloat16"].encode(torch.tensor([[1.0, float("inf")], [float("nan"), 1.001]]))
    assert loss == pytest.approx(0.001 / (1 + 1.001**2) ** 0.5, rel=1e-3), "1.001 becomes 1 in bfloat16"
    with pytest.raises(ValueError, match="int8 has no NaN and no infinity"):
        CODECS["int8"].encode(torch.tensor([[float("nan")]]))


@pytest.mark.parametrize("dtype", CODECS)
def test_as_stored_is_what_reading_gives(dtype):
    features = Features(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), (2, 3))
    codec = CODECS[dtype]
    stored = as_stored(features, dtype)
    assert stored.grid == (2, 3) and torch.equal(stored.tokens, codec.decode(codec.encode(features.tokens)[0], 4))
    assert (stored is features) == (dtype == "float32"), "what is stored exactly stays as it is"
    assert stored.tokens.dtype is (torch.float32 if codec.peak else getattr(torch, dtype))

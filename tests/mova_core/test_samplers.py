"""The order of an epoch. tests/golden compares the groups with those of the published trainer."""

import numpy as np
import pytest
import torch

from mova_core.samplers import epoch_order, even_batches, length_groups, modality_groups

LENGTHS = [int(length) for length in torch.randint(1, 100, (101,), generator=torch.Generator().manual_seed(0))]
SIGNED = [length if index % 3 else -length for index, length in enumerate(LENGTHS)]


def test_groups_are_even_and_of_one_modality():
    order = modality_groups(SIGNED, 4, 2, torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    assert sorted(order) == list(range(101))
    steps = [order[start : start + 8] for start in range(0, 96, 8)]
    assert all(len({SIGNED[index] > 0 for index in step}) == 1 for step in steps[:-2])
    assert sorted(length_groups(LENGTHS, 4, 2)) == list(range(101))
    first, second = even_batches(sorted(range(8), key=lambda i: -LENGTHS[i]), LENGTHS, 2)
    assert len(first) == len(second) == 4
    assert abs(sum(LENGTHS[i] for i in first) - sum(LENGTHS[i] for i in second)) <= max(LENGTHS[:8])
    with pytest.raises(ValueError, match="length 0"):
        modality_groups([1, 0], 1, 1)


@pytest.mark.parametrize("lengths", [None, SIGNED], ids=["shuffled", "grouped"])
def test_an_epochs_order_is_decided_by_seed_and_epoch(lengths):
    first = epoch_order(101, 7, 0, lengths=lengths, batch_size=8)
    assert first.dtype == np.int64 and sorted(first.tolist()) == list(range(101))
    torch.manual_seed(1)  # torch's global generator decides nothing
    assert np.array_equal(first, epoch_order(101, 7, 0, lengths=lengths, batch_size=8))
    for seed, epoch in ((7, 1), (8, 0)):
        assert not np.array_equal(first, epoch_order(101, seed, epoch, lengths=lengths, batch_size=8))
    assert np.array_equal(epoch_order(101, 7, 3, shuffle=False, lengths=lengths), np.arange(101))


def test_a_grouped_batch_has_one_modality_and_the_published_members():
    order = epoch_order(101, 7, 0, lengths=SIGNED, batch_size=8).tolist()
    batches = [order[start : start + 8] for start in range(0, 96, 8)]
    assert all(len({SIGNED[index] > 0 for index in batch}) == 1 for batch in batches[:-2])
    assert all(sorted(batch, key=lambda index: -abs(SIGNED[index])) == batch for batch in batches[:-2]), "descending"
    # The published trainer on 2 and 4 ranks takes the same samples at each step, dealt in another way.
    for ranks in (2, 4):
        one, many = (
            modality_groups(
                SIGNED, 8 // world, world, torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
            )
            for world in (1, ranks)
        )
        for start in range(0, 101, 8):
            assert sorted(one[start : start + 8]) == sorted(many[start : start + 8])


def test_lengths_must_fit_the_samples():
    with pytest.raises(ValueError, match="2 lengths for 3 samples"):
        epoch_order(3, 0, 0, lengths=[1, 2])

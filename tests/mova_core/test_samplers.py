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


def test_the_order_of_a_seed_never_changes():
    """A run that resumes with a later version must not repeat some samples and leave others out."""
    signed = [5, -3, 8, 1, -9, 4, -2, 7, 6, -1]
    both = [epoch_order(10, 7, epoch, lengths=signed, batch_size=2).tolist() for epoch in (0, 1)]
    assert both == [[8, 5, 4, 9, 7, 3, 0, 1, 2, 6], [2, 8, 4, 6, 0, 5, 1, 3, 7, 9]]
    alone = epoch_order(10, 7, 0, lengths=[abs(length) for length in signed], batch_size=4).tolist()
    assert alone == [4, 7, 8, 1, 2, 0, 5, 3, 6, 9]
    assert epoch_order(10, 7, 0, lengths=signed).tolist() == [6, 3, 2, 9, 4, 5, 7, 8, 0, 1]
    assert epoch_order(10, 7, 0).tolist() == [8, 0, 7, 1, 3, 6, 2, 4, 5, 9]


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


def test_samples_are_dealt_to_the_batch_with_the_smallest_sum():
    assert even_batches(range(6), [9, 8, 7, 3, 2, 1], 2) == [[0, 3, 4], [1, 2, 5]], "sums 9 8, 15, 12, 14, 16"
    assert even_batches(range(4), [9, 1, 1, 1], 2) == [[0, 3], [1, 2]], "a full batch takes no more"
    assert even_batches(range(5), [9, 8, 7, 3, 2], 2) == [[0, 2, 4], [1, 3]], "round-robin where sizes differ"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_samples_of_one_modality_are_grouped_by_length_alone():
    wanted = length_groups(LENGTHS, 4, 2, generator(1)).tolist()
    assert modality_groups(LENGTHS, 4, 2, generator(1)).tolist() == wanted
    assert modality_groups([-length for length in LENGTHS], 4, 2, generator(1)).tolist() == wanted


def test_the_shortest_sample_has_the_modality_of_its_sign():
    order = modality_groups([1, -5, 1, -5, 1, -5, 1, -5], 2, 1, generator(1), generator(2))
    assert [sorted(position % 2 for position in order[start : start + 2]) for start in (0, 2)] in (
        [[0, 0], [1, 1]],
        [[1, 1], [0, 0]],
    )


def test_lengths_must_fit_the_samples():
    with pytest.raises(ValueError, match="2 lengths for 3 samples"):
        epoch_order(3, 0, 0, lengths=[1, 2])

"""The order of training samples. `epoch_order` decides it for every reader.

`length_groups` and `modality_groups` return the order of the published trainer for the same random generators (golden
tests). In supervised fine-tuning the published trainer groups samples by modality and length, so that no rank of a step
waits for a rank with longer samples, and no step mixes samples with and without images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def epoch_order(
    count: int,
    seed: int,
    epoch: int,
    *,
    shuffle: bool = True,
    lengths: Sequence[int] | None = None,
    batch_size: int = 1,
) -> np.ndarray:
    """Positions of all samples in the order of one epoch, (count,) int64; independent of the number of ranks.

    Args:
        count: samples.
        seed, epoch: of the random order.
        shuffle: False gives ascending positions in every epoch.
        lengths: of the samples, negative for samples without images (`Sample.length`): a batch then has samples of one
            modality and of similar length. None: plain shuffling.
        batch_size: samples per batch over all ranks, the size of a group.

    Raises:
        ValueError: a length is zero, or there are not as many lengths as samples.
    """
    if lengths is not None and len(lengths) != count:
        raise ValueError(f"{len(lengths)} lengths for {count} samples: give one for each")
    if not shuffle:
        return np.arange(count)
    if lengths is None:
        return np.random.default_rng([seed, epoch]).permutation(count)
    import torch

    states = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64)
    states >>= np.uint64(1)  # torch takes signed seeds
    generators = [torch.Generator().manual_seed(int(state)) for state in states]
    # World size 1: a group is the batch of all ranks, so the number of ranks changes no step. The published trainer has
    # the same groups and deals each to its ranks in another way.
    return np.array(modality_groups(lengths, batch_size, 1, *generators), np.int64)


def length_groups(lengths: Sequence[int], batch_size: int, world_size: int, generator: Any = None) -> list[int]:
    """A random order of samples in which the ranks of a step have similar sums of lengths.

    Random groups of world_size * batch_size samples are sorted by descending length and dealt to the ranks so that the
    sums are about equal. For the same generator this is the published trainer's order.

    Args:
        lengths: positive.
        batch_size: samples per rank and step.
        world_size: ranks.
        generator: a torch.Generator; None takes torch's global one.

    Returns:
        Positions: for each step world_size runs of batch_size, one per rank.
    """
    import torch  # not at the top: a data file is checked before torch starts

    group_size = world_size * batch_size
    order = torch.randperm(len(lengths), generator=generator).tolist()
    dealt: list[int] = []
    for start in range(0, len(order), group_size):
        group = sorted(order[start : start + group_size], key=lambda position: lengths[position], reverse=True)
        dealt += [position for batch in even_batches(group, lengths, world_size) for position in batch]
    return dealt


def even_batches(positions: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Deals positions into `count` batches of equal size, each position to the batch with the smallest sum of lengths.

    Where the batches cannot have equal sizes, positions are dealt round-robin.
    """
    if len(positions) % count:
        return [list(positions[start::count]) for start in range(count)]
    size = len(positions) // count
    batches: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for position in positions:
        not_full = (index for index in range(count) if len(batches[index]) < size)
        smallest = min(not_full, key=sums.__getitem__)
        batches[smallest].append(position)
        sums[smallest] += lengths[position]
    return batches


def modality_groups(
    lengths: Sequence[int],
    batch_size: int,
    world_size: int,
    generator: Any = None,
    modality_generator: Any = None,
) -> list[int]:
    """`length_groups` within each modality, then the steps of both in random order.

    No step mixes samples with and without images, except the last: it has the samples left over of each modality.

    Args:
        lengths: negative for samples without images, as `Sample.length`.
        batch_size, world_size: as `length_groups`.
        generator: of the order of the steps.
        modality_generator: of the order within a modality; None takes torch's global one, as the published trainer does.

    Raises:
        ValueError: a length is zero.
    """
    import torch

    if not all(lengths):
        raise ValueError("a sample of length 0 belongs to neither modality: leave it out")
    modalities = [
        [position for position, length in enumerate(lengths) if (length > 0) == has_pictures]
        for has_pictures in (True, False)
    ]
    if not all(modalities):
        return length_groups([abs(length) for length in lengths], batch_size, world_size, generator)
    group_size = world_size * batch_size
    whole_steps: list[list[int]] = []
    rest: list[int] = []
    for members in modalities:
        member_lengths = [abs(lengths[position]) for position in members]
        order = length_groups(member_lengths, batch_size, world_size, modality_generator)
        steps = [
            [members[index] for index in order[start : start + group_size]]
            for start in range(0, len(order), group_size)
        ]
        whole_steps += steps[:-1]
        rest += steps[-1]
    steps = [whole_steps[index] for index in torch.randperm(len(whole_steps), generator=generator).tolist()]
    return [position for step in [*steps, sorted(rest)] for position in step]

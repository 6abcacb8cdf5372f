"""The order of training samples. `epoch_order` decides it for every reader.

`length_groups` and `modality_groups` return the order of the published trainer for the same random generators (golden
tests). In supervised fine-tuning the published trainer groups samples by modality and length, so that no rank of a step
waits for a rank with longer samples, and no step mixes samples with and without images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Lengths = Sequence[int] | np.ndarray


def epoch_order(
    count: int,
    seed: int,
    epoch: int,
    *,
    shuffle: bool = True,
    lengths: Lengths | None = None,
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
    return modality_groups(lengths, batch_size, 1, *generators)


def length_groups(lengths: Lengths, batch_size: int, world_size: int, generator: Any = None) -> np.ndarray:
    """A random order of samples in which the ranks of a step have similar sums of lengths.

    Random groups of world_size * batch_size samples are sorted by descending length and dealt to the ranks so that the
    sums are about equal. For the same generator this is the published trainer's order.

    Args:
        lengths: positive.
        batch_size: samples per rank and step.
        world_size: ranks.
        generator: a torch.Generator; None takes torch's global one.

    Returns:
        Positions, int64: for each step world_size runs of batch_size, one per rank.
    """
    import torch  # not at the top: a data file is checked before torch starts

    lengths, group_size = np.asarray(lengths), world_size * batch_size
    order = torch.randperm(len(lengths), generator=generator).numpy()
    for start in range(0, len(order), group_size):
        group = order[start : start + group_size]
        group[:] = group[np.argsort(-lengths[group], kind="stable")]
        if world_size > 1:
            group[:] = np.concatenate(even_batches(group.tolist(), lengths, world_size))
    return order


def even_batches(positions: Sequence[int], lengths: Lengths, count: int) -> list[list[int]]:
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
    lengths: Lengths,
    batch_size: int,
    world_size: int,
    generator: Any = None,
    modality_generator: Any = None,
) -> np.ndarray:
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

    lengths, group_size = np.asarray(lengths), world_size * batch_size
    if not lengths.all():
        raise ValueError("a sample of length 0 belongs to neither modality: leave it out")
    modalities = [np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)]
    if not all(map(len, modalities)):
        return length_groups(np.abs(lengths), batch_size, world_size, generator)
    whole_steps: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for members in modalities:
        order = members[length_groups(np.abs(lengths[members]), batch_size, world_size, modality_generator)]
        whole = (len(order) - 1) // group_size * group_size  # the last step, full or not, is left over
        whole_steps.append(order[:whole].reshape(-1, group_size))
        rest.append(order[whole:])
    steps = np.concatenate(whole_steps)[torch.randperm(sum(map(len, whole_steps)), generator=generator).numpy()]
    return np.concatenate([steps.ravel(), np.sort(np.concatenate(rest))])

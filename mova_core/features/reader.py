"""The parallel read path: features at known places of shards, into a buffer or as mapped memory, checked as they come.

Reading is split over threads because one thread neither keeps a disk busy nor hides a server's latency, and because
checksums (xxh3, 12 GB/s a core) and copies release the interpreter's lock.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mova_core.features.codec import checksum
from mova_core.features.errors import DamagedFeature, damage_in_words
from mova_core.features.index import FeatureLocation
from mova_core.features.storage import StorageBackend

if TYPE_CHECKING:
    from torch import Tensor

BYTES_CHANGED = "its bytes have changed"
_ALIGNMENT = 64  # bytes: features in a buffer begin at multiples, so that any dtype can be viewed there
# Bytes under which a batch is read on the caller's own thread: another thread would not be awake before it is done.
_SMALL_BATCH = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_locations(
    storage: StorageBackend, locations: Sequence[FeatureLocation], out: Tensor | None, verify: bool
) -> list[np.ndarray]:
    """The bytes of features: uint8, 1-D, one array per location.

    Args:
        storage: of the partition.
        locations: where the features lie.
        out: see `FeaturePartition.read`.
        verify: check the xxh3 of each feature.

    Raises:
        DamagedFeature: a feature whose bytes are gone or changed.
        OSError: a read that failed for another reason.
        ValueError: an `out` that cannot take the features.
    """
    owned_by_mapping = out is None and storage.mapped
    contents: list[Any] = [None] * len(locations) if owned_by_mapping else _destinations(locations, out)
    if len(locations) > 1:
        storage.prefetch([(f"shards/{location.file}", location.offset, location.length) for location in locations])
    runs = _merge_neighbours(locations, storage.coalesce_gap)
    touched = sum(
        location.length for location, content in zip(locations, contents, strict=True) if verify or content is not None
    )
    share = len(runs) if storage.mapped and touched < _SMALL_BATCH else -(-len(runs) // storage.readers)
    tasks = [
        partial(_read_runs, storage, locations, contents, runs[at : at + share], verify)
        for at in range(0, len(runs), share or 1)
    ]
    waiting = [(task, _thread_pool(os.getpid(), storage.readers).submit(task)) for task in tasks[1:]]
    try:
        for task in tasks[:1]:
            task()
        for task, future in reversed(waiting):
            if future.cancel():  # no thread was free for this task so far: the caller does the work
                task()
            else:
                future.result()
    finally:
        if waiting:  # after an error other threads may still be writing into `out`
            wait([future for _, future in waiting if not future.cancel()])
    return contents


def _read_runs(
    storage: StorageBackend,
    locations: Sequence[FeatureLocation],
    contents: list[Any],
    runs: Sequence[Sequence[int]],
    verify: bool,
) -> None:
    """Reads each run with one request, and puts every feature's bytes into its place of `contents`."""
    for run in runs:
        file, begin = locations[run[0]].file, locations[run[0]].offset
        end = locations[run[-1]].offset + locations[run[-1]].length
        try:
            content = storage.read_range(f"shards/{file}", begin, end - begin, own=contents[run[0]] is None)
        except (FileNotFoundError, EOFError) as error:
            raise DamagedFeature(damage_in_words(error), run[0]) from error
        for position in run:
            location = locations[position]
            part = content[location.offset - begin : location.offset - begin + location.length]
            if verify and checksum(part) != location.xxh3:
                raise DamagedFeature(BYTES_CHANGED, position)
            if contents[position] is None:
                contents[position] = part
            else:
                contents[position][:] = part


def _merge_neighbours(locations: Sequence[FeatureLocation], coalesce_gap: tuple[int, int] | None) -> list[list[int]]:
    """Positions in `locations`, grouped into runs of which each is one request.

    Args:
        locations: where the features lie.
        coalesce_gap: largest gap between two features of a run, and largest run, bytes; None merges nothing.
    """
    largest_gap, largest_run = coalesce_gap or (-1, 0)
    runs: list[list[int]] = []
    file, begin, end = "", 0, 0
    for position in sorted(range(len(locations)), key=lambda position: locations[position][:2]):
        location = locations[position]
        near = location.file == file and 0 <= location.offset - end <= largest_gap
        if near and location.offset + location.length - begin <= largest_run:
            runs[-1].append(position)
        else:
            runs.append([position])
            file, begin = location.file, location.offset
        end = location.offset + location.length
    return runs


def _destinations(locations: Sequence[FeatureLocation], out: Tensor | None) -> list[np.ndarray]:
    """Memory for each feature: parts of `out`, or of a new array, one after another at multiples of 64 bytes."""
    starts = [0, *accumulate(location.length + -location.length % _ALIGNMENT for location in locations)]
    if out is None:  # one large array: numpy puts it on huge pages, which halves the time of a copy
        memory = np.empty(starts[-1] + _ALIGNMENT - 1, np.uint8)
        memory = memory[-memory.ctypes.data % _ALIGNMENT :]
    elif str(out.dtype) == "torch.uint8" and out.ndim == 1 and out.is_contiguous() and len(out) >= starts[-1]:
        memory = out.numpy()
    else:
        raise ValueError(f"out must be a contiguous 1-D uint8 tensor of at least {starts[-1]} bytes")
    return [memory[at : at + location.length] for location, at in zip(locations, starts, strict=False)]


def in_parallel(
    storage: StorageBackend, act: Callable[[Item], Result], items: Sequence[Item], width: int | None = None
) -> Iterator[Result]:
    """`act` of each item, in order, by the reading threads; `width` items at a time, by default twice the threads."""
    if len(items) < 2:
        yield from map(act, items)
        return
    pool = _thread_pool(os.getpid(), storage.readers)
    rest = iter(items)
    waiting = deque(pool.submit(act, item) for item in islice(rest, width or 2 * storage.readers))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(act, item) for item in islice(rest, 1))
        yield result


@cache
def _thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The reading threads of a process: threads do not survive a fork, so a DataLoader worker starts its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="mova-store")

"""The shards of one expert that have to be computed, and which worker computes which.

Workers draw blocks of shards from this queue when they are ready for more. So pools of unequal speed share the work without a
forecast, actors can join at any time, and a pool shrinks by drawing nothing more: no shard is cut off or computed twice.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

CHUNK_ROWS = 4096  # rows of the image table per object in Ray's object store: half a megabyte at 120 bytes a row


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some shards of an expert, as a worker gets them."""

    number: int
    shard_rows: int  # pictures per shard; the last shard of an expert may have fewer
    positions: np.ndarray  # (N,) of the pictures in the run's image table, shard after shard
    chunks: Mapping[int, Any]  # position // CHUNK_ROWS -> Ray reference to those rows of the image table


def rows_at(chunks: Mapping[int, pa.Table], positions: np.ndarray) -> pa.Table:
    """The rows at ascending positions of the image table of which these are chunks."""
    numbers = positions // CHUNK_ROWS
    return pa.concat_tables(
        chunks[number].take(pa.array(positions[numbers == number] - number * CHUNK_ROWS))
        for number in np.unique(numbers).tolist()
    )


class ShardQueue:
    """Blocks of shards: pending, then assigned to a worker, then finished. One thread at a time may use it.

    Args:
        positions: (N,) of the pictures to compute, in the run's image table.
        shard_rows: pictures per shard.
        block_shards: shards per block.
        chunks: position // CHUNK_ROWS -> Ray reference to those rows of the image table (`key`, `image`).
    """

    def __init__(self, positions: np.ndarray, shard_rows: int, block_shards: int, chunks: Mapping[int, Any]):
        self.positions, self.shard_rows, self.block_rows = positions, shard_rows, shard_rows * block_shards
        self.chunks = chunks
        # Random order: two runs on one store would otherwise compute the same shards at the same time.
        numbers = list(range(-(-len(positions) // self.block_rows)))
        random.shuffle(numbers)
        self.pending: dict[int, None] = dict.fromkeys(numbers)  # an ordered set
        self.assigned: dict[int, tuple[str, str]] = {}  # block -> (ticket, worker)

    @property
    def unfinished(self) -> int:
        """Blocks pending or assigned."""
        return len(self.pending) + len(self.assigned)

    def take(self, ticket: str, worker: str) -> Block | None:
        """The next block for a worker; None where none is pending.

        A ticket that a worker died with gets its block again, because Ray retries the call on the restarted actor.
        """
        number = next((number for number, (holder, _) in self.assigned.items() if holder == ticket), None)
        if number is None:
            if not self.pending:
                return None
            number = next(iter(self.pending))
            del self.pending[number]
        self.assigned[number] = ticket, worker
        positions = self.positions[number * self.block_rows : (number + 1) * self.block_rows]
        needed = np.unique(positions // CHUNK_ROWS).tolist()
        return Block(
            number=number,
            shard_rows=self.shard_rows,
            positions=positions,
            chunks={chunk: self.chunks[chunk] for chunk in needed},
        )

    def finish(self, number: int) -> None:
        """Removes a block whose shards are all in the store, whoever computed them."""
        self.pending.pop(number, None)
        self.assigned.pop(number, None)

    def held_by(self, workers: Iterable[str]) -> list[int]:
        """Blocks assigned to any of these workers."""
        chosen = set(workers)
        return [number for number, (_, worker) in self.assigned.items() if worker in chosen]

    def release(self, workers: Iterable[str]) -> None:
        """Makes the blocks of workers that died pending again."""
        for number in self.held_by(workers):
            del self.assigned[number]
            self.pending[number] = None

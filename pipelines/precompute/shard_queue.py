"""The shards of one expert that have to be computed, and which worker computes which.

Workers draw blocks of shards from this queue when they are ready for more. So pools of unequal speed share the work without a
forecast, actors can join at any time, and a pool shrinks by drawing nothing more: no shard is cut off or computed twice.

A picture can end the process that computes it: a crash in a library, a lost device, more memory than there is. The queue
counts how often workers died with a block. After `DEATHS` of them the block is a suspect: a worker computes it alone, one
picture after the other, and says before each which it is. The picture that ends `DEATHS` such workers is refused; the rest
of its shard is stored.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

WAIT: Literal["wait"] = "wait"  # what `take` returns to a worker that has to ask again in a moment
DEATHS = 2  # one may be chance: a node that went, a process that was killed
BLIND_DEATHS = 6  # with one block, at no picture: the block is given up
UNPROVEN = 8  # shards, and then pictures alone, that ended processes where none was ever computed: the expert is broken
CHUNK_ROWS = 4096  # rows of the image table per object in Ray's object store: half a megabyte at 120 bytes a row


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some shards of an expert, as a worker gets them."""

    number: int
    shard_rows: int  # pictures per shard; the last shard of an expert may have fewer
    positions: np.ndarray  # (N,) of the pictures in the run's image table, shard after shard
    chunks: Mapping[int, Any]  # position // CHUNK_ROWS -> Ray reference to those rows of the image table
    alone: bool = False  # a suspect: nothing else in the process, one picture after the other
    refused: Mapping[str, str] = field(default_factory=dict)  # key in hex -> why the picture is not computed


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
        self.given_up: list[str] = []  # why blocks are neither pending nor assigned nor finished
        self.broken: str | None = None  # why the expert cannot compute anything
        self.proven = False  # whether a worker has computed any picture
        self.refused: dict[str, str] = {}  # key in hex -> reason
        self._deaths: Counter[int] = Counter()  # block -> workers that died with it
        self._blind_deaths: Counter[int] = Counter()  # of these, the ones that died at no picture
        self._picture: dict[str, str] = {}  # worker -> key of the picture that it computes alone
        self._picture_deaths: Counter[str] = Counter()
        self._dead: set[str] = set()  # workers whose death was counted
        self._worker_of: dict[str, str] = {}  # ticket -> the last worker that drew with it
        self._silent: dict[str, list[int]] = {}  # worker -> blocks that others got because it did not report
        self._suspects: set[int] = set()

    @property
    def unfinished(self) -> int:
        """Blocks pending or assigned."""
        return len(self.pending) + len(self.assigned)

    def take(self, ticket: str, worker: str) -> Block | Literal["wait"] | None:
        """The next block for a worker; None where none is pending, `WAIT` where the worker must finish another one first.

        A ticket that a worker died with gets its block again, because Ray retries the call on the restarted actor.
        """
        before = self._worker_of.get(ticket, worker)
        self._worker_of[ticket] = worker
        if before != worker:  # Ray retries a call only when its process has ended
            self.died(before)
        own = next((number for number, (holder, _) in self.assigned.items() if holder == ticket), None)
        if self.broken or (own is None and not self.pending):
            return None
        others = [number for number in self.held_by([worker]) if number != own]
        if self._suspects.intersection(others):
            return WAIT
        if own is None:
            own = self._next_pending(busy=bool(others))
        elif others and own in self._suspects:
            return WAIT
        if own is None:
            return WAIT
        self.pending.pop(own, None)
        self.assigned[own] = ticket, worker
        return self._block(own)

    def _next_pending(self, busy: bool) -> int | None:
        """Suspects come last, when nothing else waits for them; where workers only died so far, first."""
        suspects = [number for number in self.pending if number in self._suspects]
        others = [number for number in self.pending if number not in self._suspects]
        if not self.proven:  # other blocks than those that workers died with: does the expert compute any?
            choice = suspects or others
            return None if suspects and busy else min(choice, key=self._deaths.__getitem__, default=None)
        return others[0] if others else None if busy else suspects[0]

    def _block(self, number: int) -> Block:
        positions = self.positions[number * self.block_rows : (number + 1) * self.block_rows]
        needed = np.unique(positions // CHUNK_ROWS).tolist()
        return Block(
            number=number,
            shard_rows=self.shard_rows,
            positions=positions,
            chunks={chunk: self.chunks[chunk] for chunk in needed},
            alone=number in self._suspects,
            refused=dict(self.refused),
        )

    def begin(self, worker: str, picture: str) -> None:
        """A worker begins to compute a picture (key in hex) of a block that it has alone."""
        self._picture[worker] = picture

    def died(self, worker: str, reason: str = "") -> None:
        """Counts the death of a worker, once; its blocks stay assigned to it until its tickets come again.

        Args:
            reason: what the worker said of it; empty where it said nothing.
        """
        blocks = self.held_by([worker]) + self._silent.pop(worker, [])
        if worker in self._dead or not blocks:
            return
        self._dead.add(worker)
        self._deaths.update(blocks)
        picture = self._picture.pop(worker, None)
        if picture is None:
            self._blind_deaths.update(blocks)
        else:
            self._picture_deaths[picture] += 1
            if self._picture_deaths[picture] >= DEATHS:
                said = reason or "crashed, or took more memory than there is"
                self.refused[picture] = f"the process that computes it {said} ({DEATHS} times, alone)"
        for number in list(blocks):
            if self._blind_deaths[number] >= BLIND_DEATHS:
                self.finish(number)
                self.given_up.append(f"{BLIND_DEATHS} processes ended with the same shard, at no single picture")
        self._suspects |= {number for number in blocks if self._deaths[number] >= DEATHS}
        if not self.proven:
            self._doubt_expert()
            self.release([worker])  # no ticket has computed anything, so it may go on with another block

    def _doubt_expert(self) -> None:
        """Nothing was computed so far, and workers died: are pictures bad, or is the expert?"""
        blocks = -(-len(self.positions) // self.block_rows)
        if len(self._deaths) >= min(UNPROVEN, blocks):
            self._suspects |= self._deaths.keys()
            if len(self._picture_deaths) >= UNPROVEN:
                self.broken = f"its process ended at each of {UNPROVEN} pictures, and it computed none"

    def finish(self, number: int) -> None:
        """Removes a block whose shards are all in the store, whoever computed them."""
        self.pending.pop(number, None)
        _, worker = self.assigned.pop(number, ("", ""))
        self._picture.pop(worker, None)

    def held_by(self, workers: Iterable[str]) -> list[int]:
        """Blocks assigned to any of these workers."""
        chosen = set(workers)
        return [number for number, (_, worker) in self.assigned.items() if worker in chosen]

    def release(self, workers: Iterable[str], silent: bool = False) -> None:
        """Makes the blocks of workers that ended pending again.

        Args:
            silent: the workers only do not report: they count as dead when their tickets come again from other workers.
        """
        for worker in workers:
            for number in self.held_by([worker]):
                if silent:
                    self._silent.setdefault(worker, []).append(number)
                del self.assigned[number]
                self.pending[number] = None

"""Pictures that end the process which computes them: found, refused, and the rest computed; without Ray."""

import random
from collections.abc import Callable

import numpy as np
import pytest

from pipelines.precompute.shard_queue import BLIND_DEATHS, DEATHS, UNPROVEN, WAIT, Block, ShardQueue

ROWS = 4  # pictures per block


def key(position: int) -> str:
    return f"{position:064x}"


class Workers:
    """Actors as Ray runs them: each makes two calls at once, and a new process gets the tickets of one that died.

    Args:
        kills: of a position in the queue: whether that picture ends the process.
    """

    def __init__(self, pictures: int, kills: Callable[[int], bool], actors: int = 1):
        self.queue = ShardQueue(np.arange(pictures), shard_rows=ROWS, block_shards=1, chunks={0: "rows"})
        self.kills, self.computed, self.deaths = kills, set[int](), 0
        self.names = [f"actor{number}-0" for number in range(actors)]
        self.tickets = [[f"{name} ticket {number}" for number in range(pictures // ROWS)] for name in self.names]

    def run(self) -> None:
        for _ in range(2000):
            if not any(self.tickets) or self.queue.broken:
                return
            for number in range(len(self.names)):
                self.step(number)
        raise AssertionError("the run has no end")

    def step(self, number: int) -> None:
        calls = self.tickets[number][:2]
        taken = {ticket: self.queue.take(ticket, self.names[number]) for ticket in calls}
        for ticket, block in taken.items():
            if block is None:
                self.tickets[number].remove(ticket)
            elif isinstance(block, Block):
                assert not block.alone or [held for held in taken.values() if isinstance(held, Block)] == [block]
                if not self.survives(self.names[number], block):
                    self.deaths += 1
                    self.names[number] = f"actor{number}-{self.deaths}"
                    return
                self.queue.finish(block.number)
                self.tickets[number].remove(ticket)

    def survives(self, worker: str, block: Block) -> bool:
        pictures = [position for position in block.positions.tolist() if key(position) not in block.refused]
        for position in pictures:
            if block.alone:
                self.queue.begin(worker, key(position))
            if self.kills(position):
                return False
            if block.alone:
                self.queue.proven = True
        self.queue.proven = True
        self.computed.update(pictures)
        return True


@pytest.mark.parametrize("actors", [1, 3])
@pytest.mark.parametrize("bad", [{17}, {0, 1, 2, 3}, {2, 18, 19, 39}, set(range(8, 24))])
def test_only_the_pictures_that_end_the_process_are_refused(bad, actors):
    for seed in range(20):  # of the queue's order
        random.seed(seed)
        workers = Workers(40, bad.__contains__, actors)
        workers.run()
        assert workers.computed == set(range(40)) - bad, seed
        assert set(workers.queue.refused) == {key(position) for position in bad}
        assert workers.queue.unfinished == 0 and not workers.queue.given_up and workers.queue.broken is None
        assert all("crashed" in reason for reason in workers.queue.refused.values())


def test_one_bad_picture_costs_four_processes():
    workers = Workers(40, {17}.__contains__)
    workers.run()
    assert workers.deaths <= 2 * DEATHS


def test_workers_that_die_by_chance_cost_no_picture():
    rng = np.random.default_rng(4)
    workers = Workers(400, lambda position: rng.random() < 0.01, actors=2)
    workers.queue.proven = True
    workers.run()
    assert workers.deaths >= 3 and not workers.queue.refused and workers.computed == set(range(400))


def test_an_expert_that_every_picture_ends_is_broken():
    workers = Workers(4000, lambda position: True)
    workers.run()
    assert workers.queue.broken == f"its process ended at each of {UNPROVEN} pictures, and it computed none"
    assert workers.deaths <= 2 * UNPROVEN and workers.queue.take("new", "worker") is None


def test_a_shard_that_ends_processes_at_no_picture_is_given_up_and_the_others_computed():
    """For example where writing the shard crashes."""
    workers = Workers(40, lambda position: False)
    survives = workers.survives
    workers.survives = lambda worker, block: block.number != 5 and survives(worker, block)  # type: ignore[method-assign]
    workers.queue.begin = lambda worker, picture: None  # type: ignore[method-assign]
    workers.run()
    assert workers.computed == set(range(40)) - {20, 21, 22, 23} and len(workers.queue.given_up) == 1
    assert workers.deaths <= BLIND_DEATHS + 1 and not workers.queue.refused


def test_what_a_process_said_before_it_ended_is_the_reason():
    queue = ShardQueue(np.arange(ROWS), shard_rows=ROWS, block_shards=1, chunks={0: "rows"})
    queue.proven = True
    for death in range(2 * DEATHS):
        block = queue.take("ticket", f"process {death}")
        assert isinstance(block, Block) and block.alone == (death >= DEATHS)
        if block.alone:
            queue.begin(f"process {death}", key(2))
        queue.died(f"process {death}", "hangs")
    assert queue.refused == {key(2): "the process that computes it hangs (2 times, alone)"}


def test_a_worker_with_a_suspect_gets_nothing_else():
    queue = ShardQueue(np.arange(3 * ROWS), shard_rows=ROWS, block_shards=1, chunks={0: "rows"})
    queue.proven = True
    for death in range(DEATHS):
        queue.take("suspect", f"process {death}")
    block = queue.take("suspect", "process 2")
    assert isinstance(block, Block) and block.alone
    assert queue.take("next", "process 2") == WAIT
    other = queue.take("other", "another")
    assert isinstance(other, Block) and not other.alone
    queue.finish(block.number)
    assert isinstance(queue.take("next", "process 2"), Block)


def test_a_worker_that_is_silent_is_not_dead_until_its_ticket_comes_again():
    """Its blocks go to others at once; a picture is blamed only for processes that ended."""
    queue = ShardQueue(np.arange(ROWS), shard_rows=ROWS, block_shards=1, chunks={0: "rows"})
    queue.proven = True
    for death in range(DEATHS + 1):
        queue.take("ticket", f"process {death}")
    queue.release([f"process {DEATHS}"])
    for number in range(3 * DEATHS):
        block = queue.take(f"ticket {number}", f"slow {number}")
        assert isinstance(block, Block) and block.alone
        queue.begin(f"slow {number}", key(2))
        queue.release([f"slow {number}"], silent=True)
    assert not queue.refused and not queue.given_up
    for number in range(DEATHS):
        queue.take(f"ticket {number}", f"again {number}")
    assert set(queue.refused) == {key(2)}


def test_a_worker_that_is_ended_in_good_order_counts_for_nothing():
    queue = ShardQueue(np.arange(ROWS), shard_rows=ROWS, block_shards=1, chunks={0: "rows"})
    for number in range(10):
        block = queue.take(f"ticket {number}", f"worker {number}")
        assert isinstance(block, Block) and not block.alone
        queue.release([f"worker {number}"])

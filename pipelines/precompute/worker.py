"""The actor that Ray Data runs for a precompute: an expert's server that draws shards from the run's queue."""

import contextlib
import signal
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import ray

from pipelines.precompute.shard_queue import WAIT, Block, rows_at

HEARTBEAT_SECONDS = 1.0
ASK_AGAIN_SECONDS = 0.2


class ShardWorker:
    """Computes shards of one expert into the store. Two threads may call at once: one block is written while the next is
    computed.

    Args:
        run: handle of the `RunStatusActor`.
        execution: name of the Ray Data execution that this actor belongs to.
        server: arguments of `ExpertServer`.
    """

    def __init__(self, run: Any, execution: str, server: Mapping[str, Any]):
        self.run, self.name = run, uuid.uuid4().hex
        self._first_at = self._last_at = self._ready_at = 0.0  # seconds since 1970, by this node's clock
        self.server: Any = None
        context = ray.get_runtime_context()
        handle = context.current_actor
        # An execution that has been told to end leaves its late actors without weights: they answer every ticket with nothing.
        if not ray.get(run.register.remote(self.name, execution, context.get_node_id(), handle)):
            return
        del handle  # a handle kept here would keep the actor alive for ever
        threading.Thread(target=_heartbeat, args=(weakref.ref(self),), name="heartbeat", daemon=True).start()
        from actors.expert_server import ExpertServer  # a refused worker does not wait for torch

        self.server = ExpertServer(**server)
        self._ready_at = time.time()

    def __call__(self, tickets: pa.Table) -> Iterator[pa.Table]:
        """Computes a block of shards per ticket, as long as there are any.

        Args:
            tickets: column `ticket`, unique names.

        Yields:
            One row per shard, as `ExpertServer.__call__` does.
        """
        for ticket in tickets["ticket"].to_pylist():
            if (block := self._take(ticket)) is None:
                continue
            self._first_at = self._first_at or time.time()
            for shard in self._shards(block):
                yield from self._computed(shard, block)
                self._last_at = time.time()
            self.run.finish.remote(self.name, block.number, self.load())

    def _take(self, ticket: str) -> Block | None:
        if self.server is None:
            return None
        while (block := ray.get(self.run.take.remote(self.name, ticket))) == WAIT:
            time.sleep(ASK_AGAIN_SECONDS)
        return block  # type: ignore[no-any-return]

    def _computed(self, shard: pa.Table, block: Block) -> Iterator[pa.Table]:
        from actors.expert_server import DeviceLost  # loaded with the server

        try:
            yield from self.server(shard, block.refused, self._begin if block.alone else None)
        except DeviceLost as error:
            _end_process(self.run, self.name, f"lost its device ({error})")

    def _begin(self, picture: str) -> None:
        """Tells the queue which picture this process computes next, and waits until it knows."""
        ray.get(self.run.begin.remote(self.name, picture))

    def _shards(self, block: Block) -> Iterator[pa.Table]:
        """The shards of a block, as tables of one row: `shard`, `keys`, `images`."""
        partition = self.server.store.partition(self.server.name, self.server.fingerprint)
        numbers = list(block.chunks)
        tables = dict(zip(numbers, ray.get([block.chunks[number] for number in numbers]), strict=True))
        for start in range(0, len(block.positions), block.shard_rows):
            images = rows_at(tables, block.positions[start : start + block.shard_rows])
            keys = images["key"].to_pylist()
            row = {"shard": partition.shard_id([key.hex() for key in keys]), "keys": keys}
            yield pa.Table.from_pylist([row | {"images": images["image"].to_pylist()}])

    def load(self) -> dict[str, Any]:
        """What `ExpertServer.load` returns, and when this worker began its first block and wrote its last shard."""
        load = {} if self.server is None else self.server.load()
        ready = bool(self._ready_at)
        times = {
            "first_at": self._first_at,
            "last_at": self._last_at,
            "up": time.time() - self._ready_at if ready else 0.0,
        }
        return load | times | {"ready": ready}


def _end_process(run: Any, name: str, reason: str) -> None:
    """Ends this process as a crash would, so that Ray starts the actor again in a new one."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(run.dying.remote(name, reason), timeout=HEARTBEAT_SECONDS * 10)
    signal.raise_signal(signal.SIGKILL)


def _heartbeat(reference: "weakref.ref[ShardWorker]") -> None:
    """Reports the load of a worker until it is garbage-collected, which is when Ray Data lets its actor end.

    Ends the process where a batch hangs: Python cannot stop a thread.
    """
    while (worker := reference()) is not None:
        run, name = worker.run, worker.name
        run.heartbeat.remote(name, worker.load())
        if worker.server is not None and (late := worker.server.overdue()):
            _end_process(run, name, late)
        del worker
        time.sleep(HEARTBEAT_SECONDS)
    with contextlib.suppress(ray.exceptions.RayError):
        run.leave.remote(name)

"""The executions of one precompute: each expert's pools side by side on one cluster, until no feature is missing."""

import gc
import random
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray._private.state import available_resources_per_node  # what Ray tells of single nodes

from actors.expert_server import ExpertServer
from cluster.nodes import PlanError
from cluster.pools import ROUNDING, PoolSpec
from mova_core.features import FeaturePartition, StoreError
from pipelines.errors import root_cause
from pipelines.precompute.progress import ExpertLog, RunLog
from pipelines.precompute.status_actor import LoadReporter, place, resized
from pipelines.ray_data import Execution, executions_stopped

TICK = 1.0  # seconds between two looks at everything
BLOCKS = 1024  # per pool: enough that no actor waits for another, few enough for the driver
BLOCKS_PER_ACTOR = 32
CALLS = 2  # shards at once in an actor: one is written while the other is computed
RESTART = 300.0  # seconds that an execution waits for an actor that died and starts again, ...
RESTART_ELSEWHERE = 30.0  # ... and if its node may be gone, so that it may find no other place
LONG = 120.0  # seconds of work left from which it pays to divide it anew among an expert's pools


@dataclass(kw_only=True, eq=False)
class ExpertWorkload:
    """What one expert computes in a run."""

    expert: str
    partition: FeaturePartition | None  # None: not in the store yet
    images: pa.Table  # `key` and `image` of all wanted, those there already too
    rows: int  # pictures per shard
    feature_bytes: int
    arguments: dict[str, Any]  # of its ExpertServer
    pools: tuple[PoolSpec, ...] = ()
    absent: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # positions in `images`

    def look(self, failed: Mapping[str, Any] = {}) -> int:
        """Asks the store what is absent, but for images that `failed`; returns how many that is."""
        keys = binary(self.images["key"])
        self.absent = np.arange(len(keys)) if self.partition is None else self.partition.missing_positions(keys)
        if failed:
            out = np.array([bytes.fromhex(key) for key in failed], "S32")
            self.absent = self.absent[~np.isin(keys[self.absent], out)]
        return len(self.absent)

    def shards(self) -> pa.Table:
        """The absent as work: one row per shard with its id `shard`, and the `keys` and `images` of its pictures."""
        todo = self.images
        if len(self.absent) < len(todo):
            todo = todo.take(pa.array(self.absent))
        todo = todo.combine_chunks()
        keys = binary(todo["key"])
        assert self.partition is not None
        cuts = [*range(0, len(todo), self.rows), len(todo)]
        ids = [self.partition.shard_id(keys[a:b]) for a, b in pairwise(cuts)]
        offsets = pa.array(cuts, pa.int64())
        columns = {"keys": _only_chunk(todo["key"]), "images": _only_chunk(todo["image"])}
        lists = {name: pa.LargeListArray.from_arrays(offsets, column) for name, column in columns.items()}
        return pa.table({"shard": pa.array(ids, pa.string()), **lists})


def binary(keys: pa.ChunkedArray) -> np.ndarray:
    """A column of sha256 keys as an array of dtype S32, without a copy where it is of one piece."""
    column = _only_chunk(keys)
    start = column.offset * 32
    return np.frombuffer(column.buffers()[1] or b"", np.uint8)[start : start + 32 * len(column)].view("S32")


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


@dataclass(kw_only=True, eq=False)
class Pool:
    """A pool with its part of an expert's shards. It waits for room until it has an execution."""

    spec: PoolSpec
    blocks: list[pa.Table]
    execution: Execution | None = None
    ended: "Future[Exception | None] | None" = None
    nodes: int = 0  # of the cluster as it began
    stuck_since: float | None = None

    @property
    def most(self) -> int:
        """The most actors that have something to do."""
        going = self.execution.size + self.execution.waiting if self.execution else len(self.blocks)
        return min(self.spec.max_size, len(self.blocks), going)


def divide(shards: pa.Table, pools: Sequence[PoolSpec]) -> list[Pool]:
    """Shards among the pools of an expert, by the rate predicted for each, else by the most actors each may have.

    In any order: two runs at once on one store would compute the same ones at the same time, once one has caught up.
    """
    rates = [pool.rate or 0.0 for pool in pools]
    if not all(rates):
        rates = [float(pool.max_size) for pool in pools]
    cuts = [0, *(round(len(shards) * part / sum(rates)) for part in np.cumsum(rates))]
    divided = []
    for spec, begin, end in zip(pools, cuts, cuts[1:], strict=False):
        size = -(-(end - begin) // max(BLOCKS, BLOCKS_PER_ACTOR * spec.max_size)) or 1
        blocks = [shards.slice(at, min(size, end - at)) for at in range(begin, end, size)]
        random.shuffle(blocks)
        if blocks:
            divided.append(Pool(spec=spec, blocks=blocks))
    return divided


class ExpertRun:
    """One expert in a run: rounds of work, each divided among its pools, until nothing is missing."""

    def __init__(self, work: ExpertWorkload, log: ExpertLog):
        self.work, self.log = work, log
        self.pools: list[Pool] = []
        self.error: Exception | None = None
        self.ended = False
        self._done: set[str] = set()  # shards of this round
        self._shards = work.shards()
        self._missing = len(work.absent)
        self._again = False  # ended at a shard boundary, to go on otherwise
        self._divide()

    def _divide(self) -> None:
        if self._done:
            there = pa.array(list(self._done), pa.string())
            self._shards = self._shards.filter(pc.invert(pc.is_in(self._shards["shard"], value_set=there)))
            self._done = set()
        self.pools = divide(self._shards, self.work.pools)
        self.log.pools = [str(pool) for pool in self.work.pools]

    def account(self, row: Mapping[str, Any]) -> None:
        """A shard is done. Called from the threads of its pools."""
        self._done.add(row["shard"])
        self.log.computed += row["stored"]
        self.log.bytes += row["bytes"]
        self.log.failed.update((failed["key"], failed) for failed in row["failed"])

    def again(self) -> None:
        """Ends its executions at a shard boundary and divides what is left anew, among the pools it has then."""
        self._again = True
        for pool in self.pools:
            if pool.execution is not None:
                pool.execution.end()
        self.pools = [pool for pool in self.pools if pool.execution is not None]

    def resize(self, pools: tuple[PoolSpec, ...]) -> None:
        """Takes other sizes: at once where pools grow, else at the next shard boundary."""
        self.work.pools = pools
        self.log.pools = [str(pool) for pool in pools]
        specs = {place(spec): spec for spec in pools}
        if any(pool.execution and pool.execution.size > specs[place(pool.spec)].max_size for pool in self.pools):
            self.again()
        else:
            for pool in self.pools:
                pool.spec = specs[place(pool.spec)]

    def collect(self, log: RunLog) -> None:
        """Takes executions that ended; when all have, goes on with what is missing, or ends."""
        for pool in [pool for pool in self.pools if pool.ended is not None and pool.ended.done()]:
            assert pool.ended is not None
            self.pools.remove(pool)
            self.error = self.error or pool.ended.result()
            if self.pools and not self.error and not self._again and self._unbalanced():
                self.again()
        if self.pools:
            return
        if self._again and not self.error:
            self._again = False
            self._divide()
            if self.pools:
                return
        before, self._missing = self._missing, self.work.look(self.log.failed)
        if not self._missing:
            self.error, self.ended = None, True
        elif self._missing < before and not isinstance(self.error, StoreError):  # whoever made room runs it again
            reason = f": {self.error}" if self.error else ""
            log.say(f"{self.work.expert}: {self._missing:,} features are still missing, going on with those{reason}")
            self.error, self._again, self._done, self._shards = None, False, set(), self.work.shards()
            self._divide()
        else:
            self.error = self.error or RuntimeError(
                f"{self._missing} features are missing, and another round made none"
            )
            self.ended = True

    def _unbalanced(self) -> bool:
        """Whether its other pools have so much left that this expert should divide it anew."""
        waiting = sum(pool.execution.waiting for pool in self.pools if pool.execution is not None)
        left, rate = waiting / max(1, sum(len(pool.blocks) for pool in self.pools)), self.log.rate
        return bool(rate) and (self.log.total - self.log.done) * left / rate > LONG


class FreeResources:
    """What the nodes have for more actors, but for one CPU in all that stays free for reading tasks (ray#44687).

    Args:
        empty: as if nothing ran on them.
    """

    def __init__(self, empty: bool = False) -> None:
        free = available_resources_per_node()
        self.nodes = []
        for node in ray.nodes():
            has = node["Resources"] if empty else free.get(node["NodeID"])
            if node["Alive"] and has is not None:
                kinds = {key.removeprefix("accelerator_type:") for key in has if key.startswith("accelerator_type:")}
                share = {"cpu": has.get("CPU", 0.0), "gpu": has.get("GPU", 0.0), "memory": has.get("memory", 0.0)}
                self.nodes.append((share, kinds))
        self.cpus = sum(share["cpu"] for share, _ in self.nodes) - 1

    def take(self, pool: PoolSpec, actors: int) -> int:
        """Takes room for up to so many actors; returns for how many there was."""
        for taken in range(actors):
            fitting = (
                share
                for share, kinds in self.nodes
                if (not pool.accelerator or pool.accelerator in kinds)
                and all(share[kind] + ROUNDING >= held for kind, held in pool.holds.items() if held)
                and (not pool.cpus or self.cpus + ROUNDING >= pool.cpus)
            )
            if (share := max(fitting, key=lambda share: share["cpu"], default=None)) is None:
                return taken
            self.cpus -= pool.cpus
            for kind, held in pool.holds.items():
                share[kind] -= held
        return actors


def check_nodes(pools: Sequence[PoolSpec]) -> None:
    """Whether single nodes can hold the least actors of an expert's pools; `fit_pools` looks at all of them together.

    Raises:
        PlanError: they cannot, even if nothing else ran there.
    """
    room = FreeResources(empty=True)
    for pool in sorted(pools, key=lambda pool: (-pool.gpu, -pool.cpus)):
        if (actors := room.take(pool, pool.min_size)) < pool.min_size:
            holds = " and ".join(f"{held:g} {kind}" for kind, held in pool.holds.items() if held)
            raise PlanError(
                f"pool {pool}: each actor holds {holds}, and no more than {actors} of {pool.min_size} find that "
                f"on one of {len(room.nodes)} nodes: lower the size, cpu= or gpu= of --pool {pool.expert}"
            )


class PrecomputeScheduler:
    """Runs the work of several experts as one: who starts, who grows, who goes on.

    Args:
        board: what other processes look at and write to.
    """

    def __init__(self, store: str, work: Sequence[ExpertWorkload], log: RunLog, board: Any):
        self.store, self.log, self.board = store, log, board
        self.experts = {one.expert: ExpertRun(one, log.experts[one.expert]) for one in work if len(one.absent)}
        self._changed = threading.Event()
        self._waited = 0.0

    def all(self) -> dict[str, Exception]:
        """Runs it; an expert that fails does not stop the others. Returns what failed."""
        most = sum(len(expert.work.pools) for expert in self.experts.values())
        threads = ThreadPoolExecutor(max(1, most), thread_name_prefix="precompute")
        try:
            while running := [expert for expert in self.experts.values() if not expert.ended]:
                for expert in running:
                    expert.collect(self.log)
                    if expert.ended and not expert.error and expert.work.partition is not None:
                        # What neither this run computed nor failed, another one did meanwhile.
                        expert.log.reused = expert.log.total - expert.log.computed - len(expert.log.failed)
                        expert.work.partition.snapshot()
                self._share(threads)
                self._exchange()
                self._changed.wait(TICK)
                self._changed.clear()
        finally:
            with executions_stopped():
                threads.shutdown(cancel_futures=True)  # whoever closes Ray next must find nothing that uses it
            self._count()
        return {name: expert.error for name, expert in self.experts.items() if expert.error is not None}

    def _exchange(self) -> None:
        """Tells the board and the log how things stand, and takes from the board what is asked for."""
        self._count()
        self.log.sample()
        try:
            loads, asked = ray.get(self.board.exchange.remote(self.log.now()))
        except ray.exceptions.RayActorError:  # it is started again
            return
        for name, servers in loads.items():
            self.log.experts[name].servers.update(servers)
        for text in asked:
            spec = PoolSpec.parse(text)
            expert = self.experts.get(spec.expert)
            if expert is None or expert.ended:
                self.log.say(f"resize {text}: {spec.expert} has nothing left to compute")
                continue
            try:
                pools = resized(expert.work.pools, spec, ray.cluster_resources())
            except PlanError as error:
                self.log.say(f"resize {text} refused: {error}")
                continue
            self.log.say(f"resize {text}")
            expert.resize(pools)

    def _count(self) -> None:
        for expert in self.experts.values():
            executions = [pool.execution for pool in expert.pools if pool.execution is not None]
            expert.log.actors = sum(one.actors for one in executions)
            expert.log.queue = sum(
                len(pool.blocks) if pool.execution is None else pool.execution.waiting for pool in expert.pools
            )

    def _pools(self) -> Iterator[tuple[ExpertRun, Pool]]:
        return ((expert, pool) for expert in self.experts.values() for pool in expert.pools)

    def _share(self, threads: ThreadPoolExecutor) -> None:
        """Starts pools that find room for their least size, in order; what room is left goes to those with most to do."""
        room = FreeResources()
        going = []
        for expert, pool in self._pools():
            if pool.execution is not None:
                self._unstick(pool, len(room.nodes))
                # Those that end for want of work leave their room.
                coming = pool.execution.size - pool.execution.actors if pool.execution.waiting else 0
                room.take(pool.spec, max(coming, pool.execution.starting))
                going.append((expert, pool))
        waiting = [(expert, pool) for expert, pool in self._pools() if pool.execution is None]
        starting = []
        for expert, pool in waiting:
            least = min(pool.spec.min_size, len(pool.blocks))
            if room.take(pool.spec, least) == least:
                pool.execution, pool.nodes = self._execution(expert, pool, least), len(room.nodes)
                starting.append((expert, pool))
        if len(starting) == len(waiting):  # else what is free is kept for who waits
            self._grow(room, [*going, *starting])
        for expert, pool in starting:
            assert pool.execution is not None
            expert.log.started += pool.execution.size
            pool.ended = threads.submit(self._follow, expert, pool.execution)
        if waiting and not starting and not going:
            for expert, _ in waiting:
                try:
                    check_nodes(expert.work.pools)
                except PlanError as error:  # since nodes have gone
                    expert.error, expert.ended, expert.pools = error, True, []
            self._waited += TICK
            if self._waited % 60 < TICK:
                names = ", ".join(dict.fromkeys(expert.work.expert for expert, _ in waiting))
                self.log.say(f"{names}: the cluster has no room now, waiting for it")

    def _unstick(self, pool: Pool, nodes: int) -> None:
        """An actor that waits for a place to start again keeps its blocks for ever; the next round has them elsewhere."""
        assert pool.execution is not None
        if not pool.execution.stuck:
            pool.stuck_since = None
        elif pool.stuck_since is None:
            pool.stuck_since = self.log.seconds
        elif self.log.seconds - pool.stuck_since > (RESTART_ELSEWHERE if nodes < pool.nodes else RESTART):
            pool.execution.give_up(
                f"{pool.execution.restarting} actors of {pool.spec.expert} died and found no place to start again"
            )

    def _grow(self, room: FreeResources, pools: list[tuple[ExpertRun, Pool]]) -> None:
        def to_do(expert: ExpertRun, pool: Pool) -> float:
            """Seconds to go, or blocks per actor where no rate is known yet."""
            assert pool.execution is not None
            left = pool.execution.waiting / pool.execution.size
            return left if expert.log.eta is None else expert.log.eta * pool.execution.waiting / len(pool.blocks)

        growing = [(expert, pool) for expert, pool in pools if pool.ended is None or not pool.ended.done()]
        while growing:
            growing = [(expert, pool) for expert, pool in growing if pool.execution and pool.execution.size < pool.most]
            growing.sort(key=lambda one: to_do(*one), reverse=True)
            for expert, pool in list(growing):  # one more for each in turn
                assert pool.execution is not None
                if room.take(pool.spec, 1):
                    pool.execution.size += 1
                    if pool.ended is not None:
                        expert.log.started += 1
                else:
                    growing.remove((expert, pool))

    def _execution(self, expert: ExpertRun, pool: Pool, size: int) -> Execution:
        spec = pool.spec
        return Execution(
            ExpertServer,
            pool.blocks,
            arguments={
                **expert.work.arguments,
                "expert": spec.expert,
                "batch_size": spec.batch,
                "store": self.store,
                "watch": LoadReporter(self.board, spec.expert),
                "device": "cuda" if spec.gpu else "cpu",
                "memory_share": min(1.0, spec.gpu or 1.0),
            },
            size=size,
            batch_size=max(len(block) for block in pool.blocks),
            calls=CALLS,
            cpus=spec.cpus,
            gpus=spec.gpu,
            memory=spec.memory,
            accelerator=spec.accelerator,
        )

    def _follow(self, expert: ExpertRun, execution: Execution) -> Exception | None:
        """One execution, on a thread of its own; returns what ended it early."""
        failure: Exception | None = None
        try:
            for row in execution.rows():
                expert.account(row)
                expert.log.last = self.log.seconds
        except Exception as error:
            failure = _without_frames(error)
        gc.collect()
        self._changed.set()
        return failure


def _without_frames(error: Exception) -> Exception:
    """What an execution failed of. Frames hold its actors, and those the room that others wait for."""
    told, cause = traceback.format_exc(), root_cause(error)
    cause.add_note(told)
    cause.__traceback__ = cause.__cause__ = cause.__context__ = None
    return cause if isinstance(cause, Exception) else RuntimeError(str(cause))

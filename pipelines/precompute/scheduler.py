"""The scheduler of a precompute: which pools run, grow, shrink and restart on one cluster, until no feature is missing.

Each pool of an expert is one Ray Data execution, and one more each time the pool grows. Their actors draw shards from the
expert's queue in the run's status actor (`shard_queue.py`), so an execution needs to know nothing of the others.
"""

import contextlib
import enum
import gc
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from cluster.allocation import ExpertDemand, PoolDemand, allocate
from cluster.packing import FreeResources
from cluster.pools import PlanError, PoolSpec
from cluster.session import stderr_dropped
from mova_core.features import StoreError
from pipelines.errors import root_cause
from pipelines.precompute.progress import ExpertLog, RunLog
from pipelines.precompute.status_actor import RunView, WorkerView, device_of, resized
from pipelines.precompute.worker import ShardWorker
from pipelines.precompute.workload import ExpertWorkload
from pipelines.ray_data import run_actor_pool

TICK = 1.0  # seconds between two rounds of the scheduler
CALLS = 2  # blocks at once in an actor: one is written while the next is computed
LOST = 10.0  # seconds without a heartbeat after which an actor counts as dead; actors send one per second
RELEASE = 30.0  # seconds without a heartbeat after which other actors compute a dead actor's blocks
RESTART = 300.0  # seconds that an execution waits for its dead actors to be restarted, ...
RESTART_ELSEWHERE = 30.0  # ... and where the node of one is gone, so that no other node may have room for it
STOP = 15.0  # seconds that executions get to end when the run ends


class State(enum.Enum):
    """Of an expert in a run, and of an execution."""

    WAITING = "waiting"  # for free CPUs and GPUs
    RUNNING = "running"
    DRAINING = "draining"  # (executions) finishes the blocks it holds, and draws no more
    DONE = "done"
    FAILED = "failed"


TRANSITIONS: Mapping[State, tuple[State, ...]] = {
    State.WAITING: (State.RUNNING, State.DONE, State.FAILED),
    State.RUNNING: (State.WAITING, State.DRAINING, State.DONE, State.FAILED),
    State.DRAINING: (State.DONE, State.FAILED),
    State.DONE: (),
    State.FAILED: (),
}


def enter(current: State, new: State) -> State:
    """The one place where a state changes.

    Raises:
        RuntimeError: no such transition: a defect of the scheduler.
    """
    if new is not current and new not in TRANSITIONS[current]:
        raise RuntimeError(f"no transition from {current.value} to {new.value}")
    return new


@dataclass(kw_only=True, eq=False)
class Execution:
    """One Ray Data execution: a fixed number of actors of one pool, followed by a thread of the driver."""

    spec: PoolSpec
    size: int  # actors
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: State = State.WAITING
    error: Exception | None = None
    thread: threading.Thread | None = None
    workers: dict[str, WorkerView] = field(default_factory=dict)
    stuck_since: float | None = None

    @property
    def alive(self) -> list[str]:
        """Workers that hold their share of a node: loading, computing or idle."""
        return [name for name, worker in self.workers.items() if not worker.left and worker.age < LOST]

    @property
    def dead(self) -> list[str]:
        """Workers that ended without saying so, while there was work for them."""
        return [name for name, worker in self.workers.items() if not worker.idle and worker.age >= LOST]

    @property
    def actors(self) -> int:
        """Workers that are ready to compute."""
        return sum(bool(self.workers[name].load.get("ready")) for name in self.alive)

    @property
    def starting(self) -> int:
        """Actors that Ray has still to start, or to restart, on a node not known yet."""
        ended = sum(worker.left or (worker.idle and worker.age >= LOST) for worker in self.workers.values())
        return max(0, self.size - len(self.alive) - ended)

    @property
    def over(self) -> bool:
        return self.state in (State.DONE, State.FAILED)


class ExpertRun:
    """One expert in a run: rounds of work until nothing is missing.

    Args:
        run: handle of the status actor.
    """

    def __init__(self, work: ExpertWorkload, log: ExpertLog, run: Any):
        self.work, self.log, self.run = work, log, run
        self.executions: list[Execution] = []
        self.state = State.WAITING
        self.error: Exception | None = None
        self.pending = 0  # blocks no worker has drawn
        self._holders: frozenset[str] = frozenset()  # workers that hold blocks
        self._failed: set[Any] = set()  # devices of the pools that failed in this round
        self._given_up: Sequence[str] = ()  # why blocks of this round are computed no more
        self._missing = len(work.missing)
        self.log.pools = [str(pool) for pool in work.pools]
        self._start_round()

    def _start_round(self) -> None:
        self.error, self._failed, self._given_up = None, set(), ()
        chunks = self.work.images.chunks(self.work.missing)
        block_shards = self.work.block_shards()
        queue = (self.work.missing, self.work.shard_rows, block_shards, chunks)
        ray.get(self.run.start_queue.remote(self.work.expert, *queue))
        self.pending = -(-len(self.work.missing) // (self.work.shard_rows * block_shards))

    @property
    def over(self) -> bool:
        return self.state in (State.DONE, State.FAILED)

    def of_pool(self, spec: PoolSpec) -> list[Execution]:
        return [execution for execution in self.executions if device_of(execution.spec) == device_of(spec)]

    def size(self, spec: PoolSpec) -> int:
        """Actors of a pool that draw shards, or will when they have started."""
        return sum(execution.size for execution in self.of_pool(spec) if execution.state is State.RUNNING)

    def demand(self) -> ExpertDemand:
        """What `allocate` needs to know of this expert."""
        starting = sum(execution.starting for execution in self.executions if execution.state is State.RUNNING)
        return ExpertDemand(pending=self.pending, starting=starting, seconds=self.log.eta)

    def waiting_pools(self) -> list[PoolSpec]:
        """Pools without an actor that have work and may start."""
        if self.over or not self.pending:
            return []
        return [spec for spec in self.work.pools if not self.of_pool(spec) and device_of(spec) not in self._failed]

    def record(self, row: Mapping[str, Any]) -> None:
        """Counts a shard that is in the store. Called from the threads of the executions."""
        with self.log.lock:
            self.log.computed += row["stored"]
            self.log.bytes += row["bytes"]
            self.log.failed.update((failed["key"], failed) for failed in row["failed"])

    def begin(self, execution: Execution) -> None:
        ray.get(self.run.open.remote(execution.name, self.work.expert))
        execution.state = enter(execution.state, State.RUNNING)
        self.state = enter(self.state, State.RUNNING)
        self.executions.append(execution)
        self.log.started += execution.size

    def drain(self, execution: Execution) -> None:
        """Ends an execution at its next shard boundary."""
        execution.state = enter(execution.state, State.DRAINING)
        execution.stuck_since = time.monotonic()
        self.run.drain.remote(execution.name)

    def resize(self, pools: tuple[PoolSpec, ...]) -> None:
        """Takes other sizes: a pool that grows does so with the scheduler's next round; one that shrinks drains executions,
        the youngest first, and grows again to its new size."""
        self.work.pools = pools
        self.log.pools = [str(pool) for pool in pools]
        for spec in pools:
            for execution in reversed(self.of_pool(spec)):
                execution.spec = spec
                if execution.state is State.RUNNING and self.size(spec) > spec.max_size:
                    self.drain(execution)

    def update(self, view: RunView, log: RunLog) -> None:
        """Takes what the status actor knows, and what came of the executions that ended."""
        known = self.work.expert in view.queues  # else Ray has restarted the status actor, which has lost the queue
        self.pending, assigned = view.queues.get(self.work.expert, (0, 0))
        self._holders = view.assigned.get(self.work.expert, frozenset())
        if reason := view.broken.get(self.work.expert):
            for execution in self.executions:
                self.run.abort.remote(execution.name)
            self.executions.clear()
            self.fail(RuntimeError(reason))
            return
        given_up = view.given_up.get(self.work.expert, ())
        for reason in given_up[len(self._given_up) :]:
            log.event(f"{self.work.expert}: a shard is given up: {reason}")
        self._given_up = given_up
        for execution in list(self.executions):
            execution.workers = {name: row for name, row in view.workers.items() if row.execution == execution.name}
            if execution.thread is None or not execution.thread.is_alive():
                self._ended(execution)
            else:
                self._detect_lost_actors(execution, log)
        if self.over or self.executions or self.state is State.WAITING:
            return
        if known and not self.error and self.pending + assigned:
            self.state = enter(self.state, State.WAITING)  # shrunk, or an execution was given up: the queue goes on
        else:
            self._end_round(log, lost_queue=not known)

    def _ended(self, execution: Execution) -> None:
        self.executions.remove(execution)
        self.run.close.remote(execution.name)
        if execution.error is not None and execution.state is State.RUNNING:
            self.error = self.error or execution.error
            self._failed.add(device_of(execution.spec))
        execution.state = enter(execution.state, State.FAILED if execution.error else State.DONE)

    def _end_round(self, log: RunLog, lost_queue: bool) -> None:
        """Asks the store what is missing: ends, or goes on with that as long as a round computed anything."""
        before, self._missing = self._missing, self.work.refresh_missing(self.log.failed)
        if not self._missing:
            self.error, self.state = None, enter(self.state, State.DONE)
        elif (self._missing < before and not isinstance(self.error, StoreError)) or lost_queue:
            reason = f": {self.error}" if self.error else ""
            log.event(f"{self.work.expert}: {self._missing:,} features are still missing, going on with those{reason}")
            self.state = enter(self.state, State.WAITING)
            self._start_round()
        else:
            why = f" ({self._given_up[0]})" if self._given_up else ""
            missing = f"{self._missing} features are missing, and another round computed none of them{why}"
            self.fail(self.error or RuntimeError(missing))

    def fail(self, error: Exception) -> None:
        self.error, self.state = error, enter(self.state, State.FAILED)

    def _detect_lost_actors(self, execution: Execution, log: RunLog) -> None:
        """Gives blocks of dead actors to others, and gives up an execution that only waits for dead actors.

        Ray restarts an actor that died, but only where a node has room for it, and Ray Data never moves the call that the
        actor had to another actor. So an execution whose node is gone may wait for ever.
        """
        dead = execution.dead
        if overdue := [name for name in dead if execution.workers[name].age > RELEASE and name in self._holders]:
            self.run.release.remote(overdue)
        works = any(name in self._holders for name in execution.alive) or (execution.alive and self.pending)
        draining = execution.state is State.DRAINING
        if works or not (draining or (dead and execution.starting)):
            execution.stuck_since = None
            return
        execution.stuck_since = execution.stuck_since or time.monotonic()
        up = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        homeless = any(execution.workers[name].node not in up for name in dead)
        if time.monotonic() - execution.stuck_since > (RESTART_ELSEWHERE if homeless or draining else RESTART):
            if dead:
                log.event(f"{self.work.expert}: {len(dead)} actors died and Ray found no place to restart them")
            self.executions.remove(execution)
            self.run.abort.remote(execution.name)


def check_nodes(pools: Sequence[PoolSpec]) -> None:
    """Checks that single nodes can hold the least actors of an expert's pools; `fit_pools` looks at the whole cluster.

    Raises:
        PlanError: they cannot, even if nothing else ran there.
    """
    free = FreeResources.from_live(ray.nodes())
    for pool in sorted(pools, key=lambda pool: (-pool.gpu, -pool.cpus)):
        if (actors := len(free.take_several(pool, pool.min_size))) < pool.min_size:
            holds = " and ".join(f"{held:g} {kind}" for kind, held in pool.holds.items() if held)
            raise PlanError(
                f"pool {pool}: each actor holds {holds}, and no more than {actors} of {pool.min_size} find that "
                f"on one of {len(free)} nodes: lower the size, cpu= or gpu= of --pool {pool.expert}"
            )


class PrecomputeScheduler:
    """Runs the work of several experts as one run.

    Args:
        store: location of the feature store.
        work: of the experts, in the order in which they start.
        run: handle of the status actor.
    """

    def __init__(self, store: str, work: Sequence[ExpertWorkload], log: RunLog, run: Any):
        self.store, self.log, self.run = store, log, run
        self.experts = {
            workload.expert: ExpertRun(workload, log.experts[workload.expert], run)
            for workload in work
            if len(workload.missing)
        }
        self._changed = threading.Event()
        self._waited = 0.0  # seconds without room for any pool

    def run_all(self) -> dict[str, Exception]:
        """Computes everything; an expert that fails does not stop the others. Returns the errors of those that failed."""
        try:
            while any(not expert.over for expert in self.experts.values()):
                self._sync()
                self._start_pools()
                self._changed.wait(TICK)
                self._changed.clear()
        finally:
            self._stop()
        return {name: expert.error for name, expert in self.experts.items() if expert.error is not None}

    def _sync(self) -> None:
        """One exchange with the status actor, and what follows from it."""
        try:
            view: RunView = ray.get(self.run.sync.remote(self.log.status()))
        except ray.exceptions.RayActorError:  # Ray restarts the actor
            return
        experts = {execution.name: expert for expert in self.experts.values() for execution in expert.executions}
        for name, worker in view.workers.items():
            if worker.load.get("ready") and worker.execution in experts:
                experts[worker.execution].log.workers[name] = dict(worker.load)
        for expert in self.experts.values():
            if not expert.over:
                expert.update(view, self.log)
                if expert.state is State.DONE and expert.work.partition is not None:
                    # Another run computed what this one neither computed nor failed on.
                    expert.log.reused = expert.log.total - expert.log.computed - len(expert.log.failed)
                    expert.work.partition.snapshot()
            expert.log.actors = sum(execution.actors for execution in expert.executions)
            expert.log.pending = 0 if expert.over else expert.pending
        self.log.sample()
        for text in view.resizes:
            self._resize(text)

    def _resize(self, text: str) -> None:
        spec = PoolSpec.parse(text)
        expert = self.experts.get(spec.expert)
        if expert is None or expert.over:
            self.log.event(f"resize {text}: {spec.expert} has nothing left to compute")
            return
        try:
            pools = resized(expert.work.pools, spec, ray.cluster_resources())
        except PlanError as error:
            self.log.event(f"resize {text} refused: {error}")
            return
        self.log.event(f"resize {text}")
        expert.resize(pools)

    def _executions(self) -> Iterator[Execution]:
        return (execution for expert in self.experts.values() for execution in expert.executions)

    def _start_pools(self) -> None:
        """Starts pools and grows those that run, where there is room (see `cluster/allocation.py`)."""
        pools: list[tuple[ExpertRun, PoolDemand]] = []
        for expert in self.experts.values():
            demand = expert.demand()
            may_start = expert.waiting_pools()
            for spec in expert.work.pools:
                if (size := expert.size(spec)) or spec in may_start:
                    pools.append((expert, PoolDemand(spec=spec, expert=demand, size=size)))
        if not any(expert.pending and pool.size < pool.spec.max_size for expert, pool in pools):
            return  # most rounds: asking Ray for its nodes costs the driver and its GCS milliseconds each second
        executions = list(self._executions())
        free = FreeResources.from_live(
            ray.nodes(),
            [(execution.workers[name].node, execution.spec) for execution in executions for name in execution.alive],
            [execution.spec for execution in executions for _ in range(execution.starting)],
            ray.available_resources(),
        )
        waiting = [expert for expert, pool in pools if not pool.size]  # before `allocate` counts what it adds
        seats = allocate(free, [pool for _, pool in pools])
        for (expert, pool), seated in zip(pools, seats, strict=True):
            if seated:
                self._start(expert, pool.spec, len(seated))
        if waiting and not any(seats) and not any(self._executions()):
            self._wait_for_room(waiting)

    def _wait_for_room(self, waiting: Sequence[ExpertRun]) -> None:
        for expert in dict.fromkeys(waiting):
            try:
                check_nodes(expert.work.pools)
            except PlanError as error:  # nodes have left the cluster since the run began
                expert.fail(error)
        self._waited += TICK
        if self._waited % 60 < TICK:
            names = ", ".join(dict.fromkeys(expert.work.expert for expert in waiting))
            self.log.event(f"{names}: the cluster has no room now, waiting for it")

    def _start(self, expert: ExpertRun, spec: PoolSpec, size: int) -> None:
        execution = Execution(spec=spec, size=size)
        expert.begin(execution)
        # A ticket per block that is pending: the actors may have to compute all of them.
        tickets = [pa.table({"ticket": [f"{execution.name}-{number}"]}) for number in range(max(size, expert.pending))]
        rows = run_actor_pool(
            ShardWorker,
            tickets,
            arguments={
                "run": self.run,
                "execution": execution.name,
                "server": {
                    **expert.work.arguments,
                    "expert": spec.expert,
                    "batch_size": spec.batch,
                    "store": self.store,
                    "device": "cuda" if spec.gpu else "cpu",
                    "memory_share": min(1.0, spec.gpu or 1.0),
                },
            },
            size=size,
            calls=CALLS,
            cpus=spec.cpus,
            gpus=spec.gpu,
            memory=spec.memory,
            accelerator=spec.accelerator,
        )
        follow = threading.Thread(
            target=self._follow, args=(rows, expert.record, execution), name=f"precompute-{spec.expert}", daemon=True
        )
        execution.thread = follow
        follow.start()

    def _follow(
        self, rows: Iterator[dict[str, Any]], record: Callable[[Mapping[str, Any]], None], execution: Execution
    ) -> None:
        """Consumes one execution, on a thread of its own."""
        try:
            for row in rows:
                record(row)
        except Exception as error:
            execution.error = _without_frames(error)
        del rows
        gc.collect()  # Ray Data's executor holds its actors' handles in reference cycles: free the actors' CPUs now
        self._changed.set()

    def _stop(self) -> None:
        """Ends the executions of this run, and waits for their threads: Ray must not be closed while they use it."""
        executions = list(self._executions())
        # None where the run is complete. Else Ray prints for each actor that is killed that its task failed.
        with stderr_dropped() if executions else contextlib.nullcontext():
            for execution in executions:
                self.run.abort.remote(execution.name)
            deadline = time.monotonic() + STOP
            for execution in executions:
                if execution.thread is not None:
                    execution.thread.join(max(0.0, deadline - time.monotonic()))
        for expert in self.experts.values():
            expert.log.actors = expert.log.pending = 0


def _without_frames(error: Exception) -> Exception:
    """The cause of an error, without its frames: these hold the execution's actors, and so their CPUs and GPUs."""
    text, cause = traceback.format_exc(), root_cause(error)
    cause.add_note(text)
    cause.__traceback__ = cause.__cause__ = cause.__context__ = None
    return cause if isinstance(cause, Exception) else RuntimeError(str(cause))

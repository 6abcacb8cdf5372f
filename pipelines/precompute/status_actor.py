"""The status actor of a precompute run: workers draw their shards from it and report their load, the driver reports its
progress, and other processes on the cluster read the status and ask for other pools. It ends with its driver, however that ends.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.pools import PlanError, PoolSpec, fit_pools
from pipelines.precompute.shard_queue import Block, ShardQueue

NAMESPACE = "mova"
PREFIX = "precompute:"
ANSWER_SECONDS = 30.0  # longest wait for an answer of a status actor


class RunError(ValueError):
    """No such run, or none of its experts; the message says which there are."""


@dataclass(kw_only=True)
class Worker:
    """An actor of a Ray Data execution, as the status actor knows it."""

    execution: str
    expert: str
    node: str  # Ray's node id
    handle: Any  # None once the worker has nothing left to do: a handle would keep the actor alive
    load: dict[str, Any] = field(default_factory=dict)  # as last reported
    seen: float = field(default_factory=time.monotonic)
    left: bool = False  # the actor ended in good order


@dataclass(frozen=True, kw_only=True)
class WorkerView:
    """What the driver sees of a worker."""

    execution: str
    node: str
    load: Mapping[str, Any]
    age: float  # seconds since the last report
    idle: bool  # has found the queue empty, or ended
    left: bool


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What the driver sees of a run."""

    workers: Mapping[str, WorkerView]
    queues: Mapping[str, tuple[int, int]]  # expert -> blocks pending, blocks assigned
    assigned: Mapping[str, frozenset[str]]  # expert -> workers that hold blocks
    broken: Mapping[str, str]  # expert -> why it computes nothing more in this run
    given_up: Mapping[str, Sequence[str]]  # expert -> why blocks of it are computed no more
    resizes: Sequence[str]  # pools that other processes ask for, as `PoolSpec.parse` reads them


class RunStatusActor:
    """The class of the actor. Ray runs its methods one at a time."""

    def __init__(self, job: str, store: str) -> None:
        self.workers: dict[str, Worker] = {}
        self.queues: dict[str, ShardQueue] = {}
        self.executions: dict[str, str] = {}  # those that may draw shards -> their expert
        self.resizes: list[str] = []
        self.progress: dict[str, Any] = {"job": job, "store": store, "seconds": 0.0, "experts": {}}

    # For workers

    def register(self, name: str, execution: str, node: str, handle: Any) -> bool:
        """A worker that starts; False where its execution has been told to end."""
        if execution not in self.executions:
            return False
        self.workers[name] = Worker(execution=execution, expert=self.executions[execution], node=node, handle=handle)
        return True

    def heartbeat(self, name: str, load: dict[str, Any]) -> None:
        if (worker := self.workers.get(name)) is not None:
            worker.load, worker.seen = load, time.monotonic()
            if load.get("computed") and worker.expert in self.queues:
                self.queues[worker.expert].proven = True

    def take(self, name: str, ticket: str) -> Block | Literal["wait"] | None:
        """The next block for a worker; None where it has nothing left to do, `WAIT` where it must ask again in a moment."""
        worker = self.workers.get(name)
        if worker is None:
            return None
        expert = self.executions.get(worker.execution)
        if expert is not None and (block := self.queues[expert].take(ticket, name)) is not None:
            return block
        if not any(queue.held_by([name]) for queue in self.queues.values()):
            worker.handle = None
        return None

    def finish(self, name: str, block: int, load: dict[str, Any]) -> None:
        """A block is in the store."""
        self.heartbeat(name, load)
        if (worker := self.workers.get(name)) is not None and worker.expert in self.queues:
            self.queues[worker.expert].finish(block)

    def begin(self, name: str, picture: str) -> None:
        """A worker begins to compute a picture (key in hex) of a suspect block."""
        if (worker := self.workers.get(name)) is not None and worker.expert in self.queues:
            self.queues[worker.expert].begin(name, picture)

    def dying(self, name: str, reason: str) -> None:
        """A worker that is about to end its own process."""
        for queue in self.queues.values():
            queue.died(name, reason)

    def leave(self, name: str) -> None:
        """A worker that ends in good order."""
        if (worker := self.workers.get(name)) is not None:
            worker.left, worker.handle = True, None

    # For the driver

    def start_queue(
        self, expert: str, positions: np.ndarray, shard_rows: int, block_shards: int, chunks: dict[int, Any]
    ) -> None:
        """Gives an expert work, as `ShardQueue` takes it, in place of what it had before."""
        self.queues[expert] = ShardQueue(positions, shard_rows, block_shards, chunks)

    def open(self, execution: str, expert: str) -> None:
        """Lets the workers of an execution draw shards."""
        self.executions[execution] = expert

    def drain(self, execution: str) -> None:
        """The workers of an execution finish the blocks they hold and draw no more."""
        self.executions.pop(execution, None)

    def abort(self, execution: str) -> None:
        """Kills the workers of an execution and makes their blocks pending again."""
        self.drain(execution)
        names = [name for name, worker in self.workers.items() if worker.execution == execution]
        for name in names:
            handle, self.workers[name].handle = self.workers[name].handle, None
            if handle is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(handle, no_restart=True)
        self.close(execution)

    def close(self, execution: str) -> None:
        """An execution is over: drops the handles of its workers, and makes blocks they still held pending again."""
        self.drain(execution)
        names = [name for name, worker in self.workers.items() if worker.execution == execution]
        for name in names:
            self.workers[name].handle, self.workers[name].left = None, True
        for queue in self.queues.values():
            queue.release(names)

    def release(self, names: Sequence[str]) -> None:
        """Makes the blocks of workers that do not report pending again."""
        for queue in self.queues.values():
            queue.release(names, silent=True)

    def sync(self, progress: dict[str, Any]) -> RunView:
        """Takes the driver's progress, and returns what it has to know."""
        self.progress = progress
        resizes, self.resizes = self.resizes, []
        now = time.monotonic()
        return RunView(
            workers={
                name: WorkerView(
                    execution=worker.execution,
                    node=worker.node,
                    load=worker.load,
                    age=now - worker.seen,
                    idle=worker.handle is None,
                    left=worker.left,
                )
                for name, worker in self.workers.items()
            },
            queues={expert: (len(queue.pending), len(queue.assigned)) for expert, queue in self.queues.items()},
            assigned={
                expert: frozenset(worker for _, worker in queue.assigned.values())
                for expert, queue in self.queues.items()
            },
            broken={expert: queue.broken for expert, queue in self.queues.items() if queue.broken},
            given_up={expert: list(queue.given_up) for expert, queue in self.queues.items() if queue.given_up},
            resizes=resizes,
        )

    # For other processes

    def resize(self, pools: list[str]) -> None:
        """Asks for pools as `PoolSpec.parse` reads them."""
        self.resizes += pools

    def status(self) -> dict[str, Any]:
        """The driver's last progress."""
        return self.progress


def start_status_actor(job: str, store: str) -> Any:
    """The status actor of a new run into a store.

    Raises:
        RunError: a run of that name is under way.
    """
    if job in running():
        raise RunError(f"a run named {job} is under way on this cluster: give another --name")
    # On the driver's node, so that no other node's death ends it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": PREFIX + job, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1}
    return ray.remote(RunStatusActor).options(**options, scheduling_strategy=here).remote(job, store)


def running() -> list[str]:
    """Names of the runs on this cluster."""
    names = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["name"].removeprefix(PREFIX)
        for actor in names
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(PREFIX)
    )


def status_actor_of(job: str) -> Any:
    """The status actor of a run.

    Raises:
        RunError: there is none of that name.
    """
    try:
        return ray.get_actor(PREFIX + job, namespace=NAMESPACE)
    except ValueError:
        names = ", ".join(running())
        raise RunError(
            f"no precompute named {job} runs on this cluster: it has ended, or runs elsewhere "
            + (f"(running here: {names})" if names else "(none runs here; RAY_ADDRESS chooses the cluster)")
        ) from None


@contextlib.contextmanager
def _ended(job: str) -> Iterator[None]:
    """Says in our words that a run ended between two calls."""
    try:
        yield
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        raise RunError(f"run {job} has ended") from None


def status(job: str | None = None) -> list[dict[str, Any]]:
    """How far a run is, or all of them: job, store, seconds, and per expert what `RunLog.status` returns.

    Raises:
        RunError: no run of that name.
    """
    progress = []
    for name in [job] if job else running():
        # Where all runs are asked for, one that ends meanwhile is left out.
        with contextlib.nullcontext() if job else contextlib.suppress(RunError), _ended(name):
            progress.append(ray.get(status_actor_of(name).status.remote(), timeout=ANSWER_SECONDS))
    return progress


def resize(job: str, pools: list[str]) -> dict[str, list[str]]:
    """Asks a run for other pools: `sam=12`, or `sam=2..8,gpu=1,accelerator=A100` where the expert has several pools.

    Returns:
        Expert -> the pools that it will have within a second or two.

    Raises:
        PlanError: a pool the cluster cannot hold, or the expert has several pools and the text fits none or more than one.
        RunError: no such run, or an expert it does not compute.
    """
    with _ended(job):
        actor = status_actor_of(job)
        experts: dict[str, Any] = ray.get(actor.status.remote(), timeout=ANSWER_SECONDS)["experts"]
        new: dict[str, list[str]] = {}
        for text in pools:
            if (name := PoolSpec.parse(text).expert) not in experts:
                raise RunError(f"{job} computes no {name} ({', '.join(experts) or 'the pictures are still inspected'})")
            current = [PoolSpec.parse(pool) for pool in new.get(name, experts[name]["pools"])]
            new[name] = [str(pool) for pool in resized(current, PoolSpec.parse(text), ray.cluster_resources())]
        ray.get(actor.resize.remote(pools), timeout=ANSWER_SECONDS)
    return new


def device_of(pool: PoolSpec) -> tuple[str | None, float, float]:
    """What tells two pools of an expert apart: accelerator, GPUs and CPUs per actor."""
    return pool.accelerator, pool.gpu, pool.cpus


def resized(pools: Sequence[PoolSpec], wanted: PoolSpec, resources: Mapping[str, float]) -> tuple[PoolSpec, ...]:
    """An expert's pools after one of them, on the same device as `wanted` or the only one, takes the size of `wanted`.

    Raises:
        PlanError: the expert has several pools or none on that device, or the cluster cannot hold them.
    """
    any_device = not wanted.gpu and not wanted.accelerator and wanted.cpu is None
    chosen = list(pools) if any_device else [pool for pool in pools if device_of(pool) == device_of(wanted)]
    if len(chosen) != 1:
        names = " and ".join(str(pool) for pool in pools)
        raise PlanError(f"{wanted.expert} has the pools {names}: say which, with the same gpu= and accelerator=")
    new = replace(chosen[0], min_size=wanted.min_size, max_size=wanted.max_size)
    return fit_pools({wanted.expert: [new if pool is chosen[0] else pool for pool in pools]}, resources)[wanted.expert]

"""The board of a precompute run: an actor without a CPU where its servers and its driver tell how far they are, and where
other processes on the cluster look, and ask for other pools. It ends with its driver, however that ends."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.nodes import PlanError
from cluster.pools import PoolSpec, fit_pools

NAMESPACE = "mova"
PREFIX = "precompute:"


class RunError(ValueError):
    """No such run, or none of its experts; the message says which there are."""


class RunStatusActor:
    """What the actor holds."""

    def __init__(self, job: str, store: str) -> None:
        self.loads: dict[str, dict[str, dict[str, Any]]] = {}  # expert -> server -> the last it told
        self.asked: list[str] = []
        self.progress: dict[str, Any] = {"job": job, "store": store, "seconds": 0.0, "experts": {}}

    def tell(self, expert: str, load: dict[str, Any]) -> None:
        """A server's load."""
        self.loads.setdefault(expert, {})[load["server"]] = load | {"told": time.time()}

    def exchange(self, progress: dict[str, Any]) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
        """The driver's progress, for what servers told and the pools asked for since."""
        self.progress = progress | {"told": time.time()}
        asked, self.asked = self.asked, []
        return self.loads, asked

    def resize(self, pools: list[str]) -> None:
        """Asks for pools as `PoolSpec.parse` reads them."""
        self.asked += pools

    def status(self) -> dict[str, Any]:
        """The driver's last progress."""
        return self.progress


class LoadReporter:
    """Tells a board the loads of one expert's servers; travels to them."""

    def __init__(self, board: Any, expert: str):
        self.board, self.expert = board, expert

    def __call__(self, load: dict[str, Any]) -> None:
        self.board.tell.remote(self.expert, load)


def start_status_actor(job: str, store: str) -> Any:
    """The board of a new run into a store.

    Raises:
        RunError: a run of that name is under way.
    """
    if job in running():
        raise RunError(f"a run named {job} is under way on this cluster: give another --name")
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )  # dies with no other node
    options = {"name": PREFIX + job, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1}
    return ray.remote(RunStatusActor).options(**options, scheduling_strategy=here).remote(job, store)


def running() -> list[str]:
    """Names of the runs on this cluster."""
    names = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        one["name"].removeprefix(PREFIX)
        for one in names
        if one["namespace"] == NAMESPACE and one["name"].startswith(PREFIX)
    )


def status_actor_of(job: str) -> Any:
    """The board of a run.

    Raises:
        RunError: there is none of that name.
    """
    try:
        return ray.get_actor(PREFIX + job, namespace=NAMESPACE)
    except ValueError:
        there = ", ".join(running())
        raise RunError(
            f"no precompute named {job} runs on this cluster "
            + (f"(running: {there})" if there else "(none does): set RAY_ADDRESS to the cluster it runs on")
        ) from None


def status(job: str | None = None) -> list[dict[str, Any]]:
    """How far a run is, or all of them: job, store, seconds, and per expert what `RunLog.now` tells."""
    boards = [status_actor_of(name) for name in ([job] if job else running())]
    return list(ray.get([board.status.remote() for board in boards], timeout=30))


def resize(job: str, pools: list[str]) -> dict[str, list[str]]:
    """Asks a run for other pools, `sam=12` or with the place of one of several, `sam=2..8,gpu=1,accelerator=A100`.

    Returns:
        Expert -> the pools that it takes up within a second or two.

    Raises:
        PlanError: a pool the cluster cannot hold, or one of several and it is not said which.
        RunError: no such run, or an expert it does not compute.
    """
    board = status_actor_of(job)
    told: dict[str, Any] = ray.get(board.status.remote(), timeout=30)["experts"]
    new: dict[str, list[str]] = {}
    for text in pools:
        if (name := PoolSpec.parse(text).expert) not in told:
            raise RunError(f"{job} computes no {name} ({', '.join(told) or 'it is still looking at its pictures'})")
        there = [PoolSpec.parse(pool) for pool in new.get(name, told[name]["pools"])]
        new[name] = [str(pool) for pool in resized(there, PoolSpec.parse(text), ray.cluster_resources())]
    ray.get(board.resize.remote(pools), timeout=30)
    return new


def place(pool: PoolSpec) -> tuple[str | None, float, float]:
    """What makes two pools of an expert different."""
    return pool.accelerator, pool.gpu, pool.cpus


def resized(pools: Sequence[PoolSpec], asked: PoolSpec, resources: Mapping[str, float]) -> tuple[PoolSpec, ...]:
    """An expert's pools with the sizes asked for: of the one at that place, or of the only one.

    Raises:
        PlanError: it has several, or none at that place, or the cluster cannot hold them.
    """
    anywhere = not asked.gpu and not asked.accelerator and asked.cpu is None
    chosen = list(pools) if anywhere else [pool for pool in pools if place(pool) == place(asked)]
    if len(chosen) != 1:
        there = " and ".join(str(pool) for pool in pools)
        raise PlanError(f"{asked.expert} has the pools {there}: say which, with the same gpu= and accelerator=")
    new = replace(chosen[0], min_size=asked.min_size, max_size=asked.max_size)
    return fit_pools({asked.expert: [new if pool is chosen[0] else pool for pool in pools]}, resources)[asked.expert]

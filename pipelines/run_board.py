"""The board of a precompute run: an actor without a CPU where its servers and its driver tell how far they are, and where
other processes on the cluster look, and ask for other pools. It ends with its driver, however that ends."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "mova"
PREFIX = "precompute:"


class RunError(ValueError):
    """No such run, or it cannot do what was asked; the message says which there are."""


class Board:
    """What the actor holds."""

    def __init__(self) -> None:
        self.loads: dict[str, dict[str, dict[str, Any]]] = {}  # expert -> server -> the last it told
        self.asked: list[str] = []
        self.progress: dict[str, Any] = {}

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


class Teller:
    """Tells a board the loads of one expert's servers; travels to them."""

    def __init__(self, board: Any, expert: str):
        self.board, self.expert = board, expert

    def __call__(self, load: dict[str, Any]) -> None:
        self.board.tell.remote(self.expert, load)


def put_up(job: str) -> Any:
    """The board of a new run.

    Raises:
        RunError: a run of that name is under way.
    """
    if job in running():
        raise RunError(f"a run named {job} is under way on this cluster: give another --name")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # dies with no other node
    options = {"name": PREFIX + job, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1}
    return ray.remote(Board).options(**options, scheduling_strategy=here).remote()


def running() -> list[str]:
    """Names of the runs on this cluster."""
    names = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        one["name"].removeprefix(PREFIX)
        for one in names
        if one["namespace"] == NAMESPACE and one["name"].startswith(PREFIX)
    )


def board_of(job: str) -> Any:
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
    boards = [board_of(name) for name in ([job] if job else running())]
    return [told for told in ray.get([board.status.remote() for board in boards], timeout=30) if told]


def resize(job: str, pools: list[str], check: Callable[[str], Any]) -> Mapping[str, Any]:
    """Asks a run for other pools; it takes them up within a second or two. Returns its progress.

    Args:
        pools: `sam=12`, `sam=2..8` or with a place, `sam=2,gpu=1,accelerator=A100`.
        check: raises for a text that is no pool, gives its `expert`.

    Raises:
        RunError: no such run, or an expert it does not compute.
    """
    board = board_of(job)
    told: dict[str, Any] = ray.get(board.status.remote(), timeout=30)
    for pool in pools:
        if (name := check(pool).expert) not in told.get("experts", {}):
            raise RunError(f"{job} computes no {name} ({', '.join(told.get('experts', {})) or 'it is still starting'})")
    ray.get(board.resize.remote(pools), timeout=30)
    return told

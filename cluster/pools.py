"""Pools of actors: sizes and devices per expert, read from text or YAML, and limited to what a cluster has."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.nodes import ACCELERATOR_RESOURCE, PlanError, profiles_on, read_yaml

if TYPE_CHECKING:
    from mova_core.experts.cost import Profile

ROUNDING = 1e-6  # ten times 0.1 GPU is one GPU


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """Size and device of one expert's pool of actors. CPUs and GPUs are per actor and may be fractions."""

    expert: str
    min_size: int = 1
    max_size: int = 1
    cpu: float | None = None  # default: 1 without a GPU, else a quarter, so that reading tasks find a core
    gpu: float = 0.0
    accelerator: str | None = None  # Ray's accelerator-type label, e.g. "A100"
    batch: int | None = None  # most images per forward pass; None: from a profile, else measured by each actor
    memory: int = 0  # bytes of the node's memory that one actor without a GPU takes; 0: not known
    rate: float | None = None  # images/s of all its actors as `mova plan` predicts; None: not planned

    @property
    def cpus(self) -> float:
        """CPUs one actor holds."""
        return self.cpu if self.cpu is not None else (0.25 if self.gpu else 1.0)

    @property
    def holds(self) -> dict[str, float]:
        """What Ray reserves for one actor: CPUs, GPUs and bytes of the node's memory."""
        return {"cpu": self.cpus, "gpu": self.gpu, "memory": self.memory}

    def __str__(self) -> str:
        """The text that `parse` reads, without the rate."""
        size = f"{self.min_size}" if self.min_size == self.max_size else f"{self.min_size}..{self.max_size}"
        options = [
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in _options(self).items()
            if key != "rate"
        ]
        return ",".join([f"{self.expert}={size}", *options])

    @classmethod
    def parse(cls, text: str) -> "PoolSpec":
        """Reads `sam=1..4,gpu=0.5,cpu=1,accelerator=A100,batch=8` (after the size every part is optional).

        Raises:
            PlanError: the text is not of that form.
        """
        head, *options = text.split(",")
        name, _, size = (part.strip() for part in head.partition("="))
        pairs = [[part.strip() for part in option.partition("=")[::2]] for option in options]
        return cls._validated(f"--pool {text}", name, size, dict(pairs))

    @classmethod
    def _validated(cls, where: str, name: str, size: str, options: Mapping[str, Any]) -> "PoolSpec":
        """A pool from unchecked values; errors begin with `where`."""
        sized = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", size)
        if not sized or not re.fullmatch(r"[\w.:-]+", name):
            raise PlanError(f"{where}: {FORM}")
        low, high = int(sized[1]), int(sized[2] or sized[1])
        if not 1 <= low <= high:
            raise PlanError(f"{where}: the size must be at least 1 and MIN at most MAX, got {low}..{high}")
        values: dict[str, Any] = {}
        for key, value in options.items():
            try:
                values[key] = OPTIONS[key](value)
            except (KeyError, ValueError, TypeError):
                raise PlanError(f"{where}: {FORM}") from None
            if key != "accelerator" and not values[key] >= (1 if key == "batch" else 0):
                raise PlanError(f"{where}: {key} is too small")
        return cls(expert=name, min_size=low, max_size=high, **values)


FORM = "write NAME=SIZE or NAME=MIN..MAX, then gpu=, cpu=, accelerator=, batch=, rate= as needed"
OPTIONS: Mapping[str, Callable[[Any], Any]] = {
    "gpu": float,
    "cpu": float,
    "accelerator": str,
    "batch": int,
    "rate": float,
}


def _options(pool: PoolSpec) -> dict[str, Any]:
    """The options of a pool that differ from their defaults; `cpu=0` does, because its default is a whole CPU."""
    return {key: value for key in OPTIONS if (value := getattr(pool, key)) != getattr(PoolSpec, key)}


def read_pools(path: str | os.PathLike[str]) -> list[PoolSpec]:
    """The pools of a YAML file: a list of `{expert: sam, size: 2..8, gpu: 0.5, accelerator: A100, batch: 16}`.

    Every key but `expert` may be left out. An expert may have several pools, one per accelerator and share of a GPU.

    Raises:
        PlanError: the file is not there or cannot be read, or an entry is no pool; the message names the entry.
    """
    rows = read_yaml(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "expert" in row for row in rows):
        raise PlanError(f"{path}: write a list of pools, each {{expert: NAME, size: MIN..MAX, gpu: ..., batch: ...}}")
    return [
        PoolSpec._validated(
            f"{path}, pool {number}",
            str(row["expert"]),
            str(row.get("size", 1)),
            {key: value for key, value in row.items() if key not in ("expert", "size")},
        )
        for number, row in enumerate(rows, start=1)
    ]


def write_pools(path: str | os.PathLike[str], pools: Iterable[PoolSpec]) -> None:
    """Writes pools as `read_pools` reads them."""
    import yaml

    rows = []
    for pool in pools:
        rows.append({"expert": pool.expert, "size": f"{pool.min_size}..{pool.max_size}", **_options(pool)})
    Path(path).write_text(yaml.safe_dump(rows, sort_keys=False, default_flow_style=None, width=120))


def plan_pools(experts: Sequence[str], requested: Iterable[str | PoolSpec] = ()) -> dict[str, tuple[PoolSpec, ...]]:
    """The pools of each expert, in the order of `experts`: the requested ones, else one actor on a CPU.

    An expert may have several pools, each on another accelerator or share of a GPU.

    Raises:
        PlanError: a requested pool is malformed, given twice, or for an expert that is not computed.
    """
    pools: dict[str, list[PoolSpec]] = {name: [] for name in experts}
    for spec in (PoolSpec.parse(pool) if isinstance(pool, str) else pool for pool in requested):
        if spec.expert not in pools:
            raise PlanError(f"--pool {spec.expert}: no such expert in this run ({', '.join(experts)})")
        if any((pool.accelerator, pool.gpu) == (spec.accelerator, spec.gpu) for pool in pools[spec.expert]):
            raise PlanError(f"--pool {spec.expert} is given twice for {_device(spec)}: keep one")
        pools[spec.expert].append(spec)
    return {name: tuple(specs) or (PoolSpec(expert=name),) for name, specs in pools.items()}


def _device(pool: PoolSpec) -> str:
    """The device of one actor of a pool, in words."""
    return f"{pool.gpu:g} of a {pool.accelerator or 'GPU'}" if pool.gpu else pool.accelerator or "the CPU"


def know_memory(
    pools: Mapping[str, Sequence[PoolSpec]], profiles: "Iterable[Profile]"
) -> dict[str, tuple[PoolSpec, ...]]:
    """Adds to pools without a GPU the memory that their expert took on CPUs, at the batch that the pool will run.

    Args:
        profiles: of the size and dtype that the pools run.
    """
    profiles = list(profiles)

    def peak_bytes(pool: PoolSpec) -> int:
        on_cpus = profiles_on(None, pool.expert, profiles)
        measured = [profile.at(pool.batch) if pool.batch else profile.best() for profile in on_cpus]
        return max((batch.peak_bytes or 0 for batch in measured), default=0)

    return {
        name: tuple(pool if pool.gpu else replace(pool, memory=peak_bytes(pool)) for pool in specs)
        for name, specs in pools.items()
    }


def fit_pools(
    pools: Mapping[str, Sequence[PoolSpec]], resources: Mapping[str, float]
) -> dict[str, tuple[PoolSpec, ...]]:
    """Pools with sizes that the cluster can hold: all pools of one expert fit together, with a CPU left for reading tasks.

    Ray Data hangs without an error where its actors hold every CPU (ray#44687), so a run checks this before it starts.
    Pools of different experts wait for each other where they do not fit together.

    Args:
        resources: as `ray.cluster_resources()` returns them.

    Raises:
        PlanError: the smallest sizes of an expert's pools do not fit (the message says by how much), or no node has
            their accelerator.
    """
    return {name: _fit(name, specs, resources) for name, specs in pools.items()}


def _fit(name: str, pools: Sequence[PoolSpec], resources: Mapping[str, float]) -> tuple[PoolSpec, ...]:
    for pool in pools:
        if pool.accelerator and ACCELERATOR_RESOURCE + pool.accelerator not in resources:
            prefix = ACCELERATOR_RESOURCE
            kinds = sorted(key.removeprefix(prefix) for key in resources if key.startswith(prefix))
            raise PlanError(
                f"pool {name}: no node has a {pool.accelerator} (this cluster has {', '.join(kinds) or 'no GPU'})"
            )
    free = {"cpu": resources.get("CPU", 0.0) - 1, "gpu": resources.get("GPU", 0.0)}
    free["memory"] = resources.get("memory", float("inf"))
    have = f"{free['cpu'] + 1:g} CPUs and {free['gpu']:g} GPUs"
    actors = sum(pool.min_size for pool in pools)
    need = {kind: sum(pool.min_size * share for pool in pools if (share := pool.holds[kind])) for kind in free}
    if need["memory"] > free["memory"]:
        raise PlanError(
            f"pool {name}: {actors} actors take {need['memory'] / 2**30:.1f} GiB as profiled, but the "
            f"cluster has {free['memory'] / 2**30:.1f} GiB: lower the size or batch= of --pool {name}, or add a node"
        )
    if any(need[kind] > free[kind] + ROUNDING for kind in ("cpu", "gpu")):
        raise PlanError(
            f"pool {name}: {actors} actors hold {need['cpu']:g} CPUs and {need['gpu']:g} GPUs and one CPU must stay free "
            f"for reading tasks, but the cluster has {have}: lower the size, cpu= or gpu= of --pool {name}, or add a node"
        )
    free = {kind: free[kind] - need[kind] for kind in free}
    fitted = []
    for pool in pools:
        added = pool.max_size - pool.min_size
        for kind, share in pool.holds.items():
            if share and added * share > free[kind] + ROUNDING:
                added = int(free[kind] / share + ROUNDING)
        free = {kind: free[kind] - added * share for kind, share in pool.holds.items()}
        fitted.append(replace(pool, max_size=pool.min_size + added))
    return tuple(fitted)

"""Where the expert pools run: what a user asks for per expert, and whether this cluster can give it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mova_core.experts.profile import Profile


class PlanError(ValueError):
    """A pool that cannot be had; the message names it and what to change."""


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """Size and place of one expert's pool of actors. CPUs and GPUs are per actor and may be fractions."""

    expert: str
    min_size: int = 1
    max_size: int = 1
    cpu: float | None = None  # default: 1 without a GPU; a quarter beside one, so that reading tasks find a core
    gpu: float = 0.0
    accelerator: str | None = None  # Ray's accelerator-type label, e.g. "A100"
    batch: int | None = None  # most pictures per forward pass; None: from a profile, else measured by each actor
    memory: int = 0  # bytes of the node's memory that one actor without a GPU takes; 0: not known

    @property
    def cpus(self) -> float:
        """CPUs one actor holds."""
        return self.cpu if self.cpu is not None else (0.25 if self.gpu else 1.0)

    @classmethod
    def parse(cls, text: str) -> "PoolSpec":
        """Reads `sam=1..4,gpu=0.5,cpu=1,accelerator=A100,batch=8` (after the size every part is optional).

        Raises:
            PlanError: the text is not of that form.
        """
        form = f"--pool {text}: write NAME=SIZE or NAME=MIN..MAX, then gpu=, cpu=, accelerator=, batch= as needed"
        head, *options = text.split(",")
        sized = re.fullmatch(r"\s*([\w.:-]+)\s*=\s*(\d+)(?:\.\.(\d+))?\s*", head)
        if not sized:
            raise PlanError(form)
        name, low, high = sized[1], int(sized[2]), int(sized[3] or sized[2])
        if not 1 <= low <= high:
            raise PlanError(f"--pool {text}: the size must be at least 1 and MIN at most MAX, got {low}..{high}")
        values: dict[str, Any] = {}
        kinds = {"gpu": float, "cpu": float, "batch": int, "accelerator": str}
        for option in options:
            key, _, value = (part.strip() for part in option.partition("="))
            try:
                values[key] = kinds[key](value)
            except (KeyError, ValueError):
                raise PlanError(form) from None
            if key != "accelerator" and values[key] < (1 if key == "batch" else 0):
                raise PlanError(f"--pool {text}: {key} is too small")
        return cls(expert=name, min_size=low, max_size=high, **values)


def plan_pools(experts: Sequence[str], asked: Iterable[str | PoolSpec] = ()) -> dict[str, PoolSpec]:
    """One pool per expert, in the order of `experts`: what was asked for, else one actor on a CPU.

    Raises:
        PlanError: a pool is malformed, given twice, or for an expert that is not computed.
    """
    pools = {name: PoolSpec(expert=name) for name in experts}
    given = set()
    for spec in (PoolSpec.parse(pool) if isinstance(pool, str) else pool for pool in asked):
        if spec.expert not in pools:
            raise PlanError(f"--pool {spec.expert}: no such expert in this run ({', '.join(experts)})")
        if spec.expert in given:
            raise PlanError(f"--pool {spec.expert} is given twice: keep one")
        given.add(spec.expert)
        pools[spec.expert] = spec
    return pools


def know_memory(pools: Mapping[str, PoolSpec], profiles: "Iterable[Profile]") -> dict[str, PoolSpec]:
    """Pools without a GPU with the memory that their expert took on any such CPU, at the batch they will run.

    Args:
        profiles: of the size and dtype that the pools run.
    """
    known: dict[str, int] = {}
    for profile in profiles:
        pool = pools.get(profile.expert)
        if pool is not None and not pool.gpu and profile.device.startswith("cpu"):
            peak = (profile.at(pool.batch) if pool.batch else profile.best()).peak_bytes or 0
            known[pool.expert] = max(known.get(pool.expert, 0), peak)
    return {name: replace(pool, memory=known.get(name, 0)) for name, pool in pools.items()}


def fit_pools(pools: Mapping[str, PoolSpec], resources: Mapping[str, float]) -> dict[str, PoolSpec]:
    """Pools cut to what the cluster has, each able to run by itself with one CPU left for reading tasks.

    Ray Data hangs without an error where its actors hold every CPU (ray#44687), so this is checked before a run.

    Args:
        resources: as `ray.cluster_resources()` tells them.

    Raises:
        PlanError: the smallest allowed pool of an expert does not fit; says by how much.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    fitted = {}
    for name, pool in pools.items():
        if pool.accelerator and f"accelerator_type:{pool.accelerator}" not in resources:
            have = sorted(
                key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")
            )
            raise PlanError(
                f"pool {name}: no node has a {pool.accelerator} (this cluster has {', '.join(have) or 'no GPU'})"
            )
        fits_cpu = (cpus - 1) / pool.cpus if pool.cpus else float("inf")
        fits_memory = resources.get("memory", float("inf")) / pool.memory if pool.memory else float("inf")
        fits = min(fits_cpu, gpus / pool.gpu if pool.gpu else float("inf"), fits_memory)
        if fits_memory < pool.min_size:
            raise PlanError(
                f"pool {name}: {pool.min_size} actors take {pool.min_size * pool.memory / 2**30:.1f} GiB as profiled, but the "
                f"cluster has {resources['memory'] / 2**30:.1f} GiB: lower the size or batch= of --pool {name}, or add a node"
            )
        if fits < pool.min_size:
            need = f"{pool.min_size * pool.cpus:g} CPUs and {pool.min_size * pool.gpu:g} GPUs"
            raise PlanError(
                f"pool {name}: {pool.min_size} actors hold {need} and one CPU must stay free for reading tasks, but the "
                f"cluster has {cpus:g} CPUs and {gpus:g} GPUs: lower the size, cpu= or gpu= of --pool {name}, or add a node"
            )
        fitted[name] = replace(pool, max_size=min(pool.max_size, int(min(fits, pool.max_size))))
    return fitted

"""Profile: how fast each expert is and what memory it takes, per batch size, on one kind of device of the cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from actors.expert_server import ExpertServer
from cluster.nodes import ACCELERATOR_LABEL
from cluster.pools import PoolSpec, fit_pools
from mova_core.experts import expert_module
from mova_core.experts.cost import Profile, write_profiles
from pipelines.progress_bar import progress_bar


class ProfileActor:
    """Measures one expert in a process of its own, whose memory peak is that expert's.

    The expert is loaded by the method, not by a constructor: of a constructor that fails, Ray tells only a text. The label of
    the node is added to what was measured: `mova plan` knows the GPU by that label.
    """

    def measure(self, expert: str, **settings: Any) -> Profile:
        measured = ExpertServer(expert, **settings).measured()
        label: Any = ray.get_runtime_context().get_node_labels().get(ACCELERATOR_LABEL)  # a str, typed as a list
        return measured if measured.device.startswith("cpu") else replace(measured, accelerator=label)


def profile(
    experts: Sequence[str],
    output: str | Path,
    *,
    place: PoolSpec,
    weights: Mapping[str, str] | None = None,
    size: str = "full",
    dtype: str = "float32",
    seconds: float = 60.0,
    progress: bool = True,
) -> list[Profile]:
    """Measures one expert after the other, each in an actor of its own, and writes what it found. Needs a Ray session.

    Args:
        output: JSON file; profiles of other experts, sizes, dtypes and devices that it holds stay.
        place: CPUs, GPUs and accelerator of the actor.
        weights, size, dtype: as `precompute` takes them.
        seconds: time to spend on each expert, about, beside loading it.

    Raises:
        PlanError: the cluster has no such place.
        ProfileError: the file is there and is not one of profiles.
    """
    fit_pools({place.expert: [place]}, ray.cluster_resources())
    write_profiles(output, [])  # fails now, not after the measuring, where it cannot be written
    actors = ray.remote(ProfileActor).options(
        num_cpus=place.cpus, num_gpus=place.gpu, accelerator_type=place.accelerator
    )
    measured: list[Profile] = []
    with progress_bar(len(experts), "profile", "experts", progress) as bar:
        for name in experts:
            actor: Any = actors.remote()
            pending = actor.measure.remote(
                name,
                weights=(weights or {}).get(name),
                size=size,
                dtype=dtype,
                device="cuda" if place.gpu else "cpu",
                measure_seconds=seconds,
                memory_share=min(1.0, place.gpu or 1.0),
                module=expert_module(name),
            )
            try:
                measured.append(ray.get(pending))
            finally:
                ray.kill(actor)
            write_profiles(output, measured[-1:])
            bar.update()
    return measured

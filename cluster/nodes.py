"""The machines of a cluster: as Ray reports them, or as a file describes a cluster that need not exist."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mova_core.experts.cost import Profile

GIB = 2**30
ACCELERATOR_LABEL = "ray.io/accelerator-type"  # node label that Ray sets on a machine with GPUs
ACCELERATOR_RESOURCE = "accelerator_type:"  # prefix of the resource that says the same, for `accelerator_type=`


class PlanError(ValueError):
    """Pools that no machine can hold, or an unreadable file of pools or machines; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A number of identical machines."""

    count: int = 1
    cpus: float  # of each machine
    memory: int  # bytes that Ray may give to actors, of each machine
    accelerator: str | None = None  # Ray's accelerator-type label of the GPUs, e.g. "A100"
    gpus: int = 0  # of each machine
    gpu_memory: int | None = None  # bytes of one GPU; None: not known


def profiles_on(accelerator: str | None, expert: str, profiles: "Iterable[Profile]") -> "list[Profile]":
    """The profiles of an expert that were measured on one kind of device.

    `mova profile` records the label of the node it measured on. A profile measured without Ray has only the driver's
    name of the GPU: a label fits it whose words stand in it, as A100 in "NVIDIA A100-SXM4-40GB" or GeForce-RTX-4090 in
    "NVIDIA GeForce RTX 4090".

    Args:
        accelerator: Ray's accelerator-type label; None for CPUs.
    """

    def matches(profile: "Profile") -> bool:
        if accelerator is None or profile.device.startswith("cpu"):
            return accelerator is None and profile.device.startswith("cpu")
        if profile.accelerator is not None:
            return profile.accelerator == accelerator
        return f" {accelerator} ".replace("-", " ") in f" {profile.device} ".replace("-", " ")

    return [profile for profile in profiles if profile.expert == expert and matches(profile)]


def read_cluster(path: str | os.PathLike[str]) -> list[NodeType]:
    """The machines of a YAML file, a list of

        - {count: 4, cpus: 64, memory_gib: 256, accelerator: A100, gpus: 8, gpu_memory_gib: 40}
        - {count: 10, cpus: 32, memory_gib: 128}

    Raises:
        PlanError: the file is not there or cannot be read, or an entry is no machine; the message names the entry.
    """
    rows = read_yaml(path)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise PlanError(f"{path}: write a list of machines, each {{count: 4, cpus: 64, memory_gib: 256, ...}}")
    return [_machines(f"{path}, machine {number}", row) for number, row in enumerate(rows, start=1)]


def _machines(where: str, row: Mapping[str, Any]) -> NodeType:
    allowed = {"count", "cpus", "memory_gib", "accelerator", "gpus", "gpu_memory_gib"}
    if unknown := sorted(map(str, set(row) - allowed)):
        raise PlanError(f"{where}: no such key {', '.join(unknown)}; there are {', '.join(sorted(allowed))}")
    try:
        nodes = NodeType(
            count=int(row.get("count", 1)),
            cpus=float(row["cpus"]),
            memory=int(float(row["memory_gib"]) * GIB),
            accelerator=None if row.get("accelerator") is None else str(row["accelerator"]),
            gpus=int(row.get("gpus", 0)),
            gpu_memory=None if row.get("gpu_memory_gib") is None else int(float(row["gpu_memory_gib"]) * GIB),
        )
    except KeyError as error:
        raise PlanError(f"{where}: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}: {error}") from None
    if nodes.count < 1 or not (nodes.cpus >= 0 and nodes.memory >= 0 and nodes.gpus >= 0):
        raise PlanError(f"{where}: count must be at least 1 and nothing below 0")
    if bool(nodes.gpus) != bool(nodes.accelerator):
        raise PlanError(f"{where}: gpus: and accelerator: (e.g. A100) go together")
    return nodes


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """The content of a YAML (or JSON) file.

    Raises:
        PlanError: the file is not there, cannot be read or cannot be parsed.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is no YAML: {error}") from None


def live_node(row: Mapping[str, Any]) -> NodeType | None:
    """The machine of one row of `ray.nodes()`; None where the node is dead or has neither CPU nor GPU for actors."""
    total = row["Resources"]
    if not row["Alive"] or not total.get("CPU", 0.0) + total.get("GPU", 0.0):
        return None
    # Ray sets both; a test cluster or an older Ray may have only the resource.
    labels = (key.removeprefix(ACCELERATOR_RESOURCE) for key in total if key.startswith(ACCELERATOR_RESOURCE))
    return NodeType(
        cpus=total.get("CPU", 0.0),
        memory=int(total.get("memory", 0.0)),
        accelerator=row.get("Labels", {}).get(ACCELERATOR_LABEL) or next(labels, None),
        gpus=int(total.get("GPU", 0.0)),
    )


def group_identical(rows: Iterable[Mapping[str, Any]]) -> list[NodeType]:
    """The living machines among `ray.nodes()`, identical ones as one kind.

    Memory is cut to whole GiB, because identical machines differ by a few MiB. GPUs without an accelerator-type label
    are left out: no profile can name them.
    """
    counts: Counter[NodeType] = Counter()
    for row in rows:
        if (node := live_node(row)) is None:
            continue
        labelled = node.accelerator is not None and node.gpus > 0
        memory = node.memory // GIB * GIB
        kind = replace(node, memory=memory) if labelled else NodeType(cpus=node.cpus, memory=memory)
        counts[kind] += 1
    return [replace(kind, count=count) for kind, count in counts.items()]


def running_nodes() -> list[NodeType]:
    """The machines of the cluster this process is connected to; one node of each kind is asked for its GPUs' memory."""
    import ray

    @ray.remote(num_cpus=0, max_calls=1)  # the process ends after the call, and frees CUDA's context on the GPU
    def gpu_memory() -> int | None:
        import torch

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None

    nodes = group_identical(ray.nodes())
    kinds = sorted({node.accelerator for node in nodes if node.accelerator})
    memories = ray.get([gpu_memory.options(accelerator_type=kind).remote() for kind in kinds])
    memory_of = dict(zip(kinds, memories, strict=True))
    return [replace(node, gpu_memory=memory_of.get(node.accelerator or "")) for node in nodes]

"""Spreads a learner over the ranks by a strategy: DDP, FSDP2 with everything sharded, or DeepSpeed's ZeRO.

All give the losses of one process (tests/pipelines/train/test_parallel.py), because in training the adapter runs every expert, if
need be on zero pictures (`MoVAdapter`).
"""

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from pipelines.train.config import Precision, Strategy, part_of
from pipelines.train.parallel import Parallel


def parallelize(
    learner: nn.Module,
    *,
    strategy: Strategy = "ddp",
    precision: Precision = "float32",
    checkpoint_activations: bool = False,
    shard_size: int = 0,
    device: torch.device | None = None,
    learning_rate: float,
    part_rates: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
) -> Parallel:
    """Spreads a learner over the ranks of the default process group. Without one, it stays whole.

    Args:
        learner: has its weights, the same on every rank, and says which parameters learn.
        precision: of the computation; master weights, moments and the reduction of gradients are float32.
        checkpoint_activations: keep no activations inside the layers of a transformers model; the backward pass computes them
            a second time.
        shard_size: of "fsdp": ranks that share one copy of the model, a divisor of their number; 0: all.
        learning_rate, part_rates, weight_decay: as `parameter_groups` takes them.
    """
    device = device or torch.device("cpu")
    learner.to(device)
    if checkpoint_activations and isinstance(learner, PreTrainedModel):
        # transformers 5.23 renamed it. Non-reentrant: in the reentrant form DDP's hooks fire twice.
        enable = getattr(learner, "activation_checkpointing_enable", learner.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    rates = (learning_rate, part_rates or {}, weight_decay)
    if dist.is_initialized() and strategy in ("zero2", "zero3"):
        os.environ.setdefault(
            "DS_ACCELERATOR", device.type
        )  # DeepSpeed reads it when imported; without, it warns on a CPU
        from pipelines.train.parallel_zero import zero_parallel

        return zero_parallel(learner, _adamw(learner, *rates), int(strategy[-1]), precision, device)
    if not dist.is_initialized() or (strategy == "ddp" and dist.get_world_size() == 1):
        wrapped = learner  # DDP would copy every gradient to reduce it with nobody
    elif strategy == "ddp":
        wrapped = DistributedDataParallel(learner, device_ids=[device.index] if device.type == "cuda" else None)
    else:
        wrapped = _sharded(learner, precision, device, shard_size)
    optimizer = _adamw(learner, *rates)  # over what FSDP2 made of the parameters
    return Parallel(learner=learner, wrapped=wrapped, optimizer=optimizer, precision=precision, device=device)


def _adamw(learner: nn.Module, *rates: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(learner, *rates), weight_decay=0.0)


def parameter_groups(
    learner: nn.Module, learning_rate: float, part_rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's parameter groups: a learning rate per part of the model; matrices decay, norms, biases and other vectors do not."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            rate = part_rates.get(part_of(name), learning_rate)
            groups.setdefault((rate, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    # Those of the run's own rate first: its schedule is the one that is shown.
    order = sorted(groups, key=lambda key: key[0] != learning_rate)
    return [{"params": groups[rate, decay], "lr": rate, "weight_decay": decay} for rate, decay in order]


def _sharded(learner: nn.Module, precision: Precision, device: torch.device, shard_size: int) -> nn.Module:
    """FSDP2: a group per layer of every part. Never one per expert: ranks would gather experts in different orders."""
    half: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    world = dist.get_world_size()
    size = shard_size or world
    shape, names = ((world,), ("shard",)) if size == world else ((world // size, size), ("replicate", "shard"))
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(**half if precision == "bfloat16" else {}),
    }
    if precision == "bfloat16":
        _halve_frozen(learner)
    for layer in layers(learner):
        fully_shard(layer, **options)
    fully_shard(learner, **options)
    for module in learner.modules():  # evaluation while training calls it
        if isinstance(module, FSDPModule) and callable(getattr(module, "generate", None)):
            register_fsdp_forward_method(cast(nn.Module, module), "generate")
    return learner


def _halve_frozen(learner: nn.Module) -> None:
    """Frozen parameters to bfloat16, which the computation uses in any case, where that loses nothing of what is saved later."""
    for parameter in learner.parameters():
        if not parameter.requires_grad and torch.equal(parameter.bfloat16().to(parameter), parameter):
            parameter.data = parameter.bfloat16()


def layers(learner: nn.Module) -> list[nn.Module]:
    """The repeated layers of all parts: of each `ModuleList` with parameters that lies in no other one."""
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(layer for layer in child if any(True for _ in layer.parameters()))
            else:
                search(child)

    search(learner)
    return found

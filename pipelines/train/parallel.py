"""How a model is spread over the ranks of a run: DDP, or FSDP2 with everything sharded.

The loop holds a `Parallel` and the model knows nothing of it. Both strategies give the losses of one process (tests/pipelines/
train/test_parallel.py), because in training the adapter runs every expert, if need be on zero pictures (`MoVAdapter`).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pipelines.train.config import Precision, Strategy


@dataclass(kw_only=True)
class Parallel:
    """A learner on the ranks of the default process group, and its optimizer.

    Attributes:
        learner: takes a batch's tensors and `num_items_in_batch`, and returns an output with `loss`: the sum over this rank's
            items divided by that number.
        wrapped: `learner` as the strategy runs it.
        optimizer: over the trained parameters of `learner`.
    """

    learner: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer
    precision: Precision
    device: torch.device

    @property
    def world(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def backward(self, micro_batches: Sequence[dict[str, Any]], items: Tensor) -> Tensor:
        """Adds the gradients of one optimizer step, reduced over the ranks once, at the last micro-batch.

        Args:
            micro_batches: this rank's share of the step's batch.
            items: what the loss is divided by, summed over all micro-batches and ranks.

        Returns:
            The loss of the step over all ranks, float32 scalar: the same number on every rank.
        """
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, 1):
            with self._reduced(last=number == len(micro_batches)):
                loss = self.loss(batch, items)
                (loss * self.world).backward()  # gradients are averaged over the ranks
            total += loss.detach()
        return self.sum(total)

    def loss(self, batch: dict[str, Any], items: Tensor | int) -> Tensor:
        """The loss of one batch of this rank, summed and divided by `items`: scalar."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.wrapped(**batch, num_items_in_batch=items).loss

    def step(self, clip_norm: float, loss: Tensor) -> Tensor:
        """Clips the gradient to `clip_norm`, updates the parameters and clears the gradients; returns the norm before, scalar.

        Where the norm or `loss`, which `backward` returned, is no finite number, parameters and moments stay.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of FSDP2: a DTensor
        if (norm + loss).isfinite():  # the same numbers on every rank
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        if dist.is_initialized():
            dist.all_reduce(value)
        return value

    def gather(self, items: Sequence[str]) -> list[str]:
        """The texts of all ranks, in the order of the ranks. Every rank must call it."""
        gathered: list[Any] = [list(items)]
        if dist.is_initialized():
            gathered = [None] * self.world
            dist.all_gather_object(gathered, list(items))
        return [item for of_rank in gathered for item in of_rank]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of this rank, those that learn."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """State dict of `model`, the learner or a module with its parameters, as one process would have it.

        Every rank must call it; only rank 0 gets tensors, on its CPU.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(model, options=options))

    def full_moments(self) -> dict[str, Tensor]:
        """AdamW's state by "parameter/key", as one process would have it. Every rank must call it; rank 0 gets tensors."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_optimizer_state_dict(self.learner, self.optimizer, options=options).get("state", {})
        return {f"{name}/{key}": value for name, values in state.items() for key, value in values.items()}

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Takes over what `full_moments` returned to rank 0, also of another strategy or number of ranks.

        Args:
            moments: all of them, on every rank.
        """
        state: dict[str, dict[str, Tensor]] = {}
        for place, value in moments.items():
            name, _, key = place.rpartition("/")
            state.setdefault(name, {})[key] = value
        groups = get_optimizer_state_dict(self.learner, self.optimizer)["param_groups"]
        whole: Any = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(self.learner, self.optimizer, whole, options=StateDictOptions(full_state_dict=True))

    @property
    def _autocast(self) -> bool:
        return self.precision == "bfloat16" and not isinstance(self.wrapped, FSDPModule)

    @contextlib.contextmanager
    def _reduced(self, last: bool) -> Iterator[None]:
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
        elif isinstance(self.wrapped, DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
            return
        yield


def parallelize(
    learner: nn.Module,
    *,
    strategy: Strategy = "ddp",
    precision: Precision = "float32",
    checkpoint_activations: bool = False,
    device: torch.device | None = None,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> Parallel:
    """Spreads a learner over the ranks of the default process group. Without one, it stays whole.

    Args:
        learner: has its weights, the same on every rank, and says which parameters learn.
        precision: of the computation; master weights, moments and the reduction of gradients are float32.
        checkpoint_activations: keep no activations inside the layers of a transformers model; the backward pass computes them
            a second time.
        learning_rate, weight_decay: AdamW's; norms and biases do not decay.
    """
    device = device or torch.device("cpu")
    learner.to(device)
    if checkpoint_activations and isinstance(learner, PreTrainedModel):
        # transformers 5.23 renamed it. Non-reentrant: in the reentrant form DDP's hooks fire twice.
        enable = getattr(learner, "activation_checkpointing_enable", learner.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if not dist.is_initialized():
        wrapped = learner
    elif strategy == "ddp":
        wrapped = DistributedDataParallel(learner, device_ids=[device.index] if device.type == "cuda" else None)
    else:
        wrapped = _sharded(learner, precision, device)
    optimizer = torch.optim.AdamW(decay_groups(learner, weight_decay), lr=learning_rate, weight_decay=0.0)
    return Parallel(learner=learner, wrapped=wrapped, optimizer=optimizer, precision=precision, device=device)


def decay_groups(learner: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay; norms, biases and other vectors do not."""
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _sharded(learner: nn.Module, precision: Precision, device: torch.device) -> nn.Module:
    """FSDP2: a group per layer of every part. Never one per expert: ranks would gather experts in different orders."""
    half: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(**half if precision == "bfloat16" else {}),
    }
    for layer in layers(learner):
        fully_shard(layer, **options)
    fully_shard(learner, **options)
    for module in learner.modules():  # evaluation while training calls it
        if isinstance(module, FSDPModule) and callable(getattr(module, "generate", None)):
            register_fsdp_forward_method(cast(nn.Module, module), "generate")
    return learner


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

"""What the training loop holds of a model on several ranks: backward pass, step, reductions, and its share of a checkpoint.

`parallelize` makes it; the model knows nothing of it.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import set_seed

from pipelines.train.config import Precision


@dataclass(kw_only=True)
class Parallel:
    """A learner on the ranks of the default process group, and its optimizer.

    Attributes:
        learner: takes a batch's tensors and `num_items_in_batch`, and returns an output with `loss`: the sum over this rank's
            items divided by that number.
        wrapped: `learner` as the strategy runs it.
        optimizer: over the trained parameters of `learner`.
        checked: the gradients of the first step were compared, see `check_gradients`.
    """

    learner: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer
    precision: Precision
    device: torch.device
    checked: bool = False

    @property
    def world(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def backward(self, micro_batches: Sequence[dict[str, Any]], items: Tensor, seeds: Sequence[int] = ()) -> Tensor:
        """Adds the gradients of one optimizer step; `_reduced` says when they are reduced over the ranks.

        Args:
            micro_batches: this rank's share of the step's batch.
            items: what the loss is divided by, summed over all micro-batches and ranks.
            seeds: of the random choices in each micro-batch (dropout); without them they go on from where torch is.

        Returns:
            The loss of the step over all ranks, float32 scalar: the same number on every rank.

        Raises:
            RuntimeError: as `check_gradients`, in the first step.
        """
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, 1):
            with self._reduced(last=number == len(micro_batches)):
                if seeds:
                    set_seed(seeds[number - 1])
                loss = self.loss(batch, items)
                self._backward(loss * self.world)  # gradients are averaged over the ranks
            total += loss.detach()
        if not self.checked:
            self.check_gradients()
            self.checked = True
        return self.sum(total)

    def loss(self, batch: dict[str, Any], items: Tensor | int) -> Tensor:
        """The loss of one batch of this rank, summed and divided by `items`: scalar."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.wrapped(**batch, num_items_in_batch=items).loss

    def check_gradients(self) -> None:
        """Compares, over all ranks, the parameters that have a gradient with those that shall learn.

        Gradients are reduced by their order, not by name: where two ranks lack those of different parameters of equal size,
        one would be added to the other without an error (https://github.com/pytorch/pytorch/issues/158719).

        Raises:
            RuntimeError: the two differ on some rank; raised on every rank.
        """
        parameters = dict(self.learner.named_parameters())
        flags = [[value.requires_grad, self.has_gradient(value)] for value in parameters.values()]
        least = torch.tensor(flags, dtype=torch.int32, device=self.device).reshape(-1, 2)
        most = -least
        if dist.is_initialized():
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MIN)
        bounds = torch.cat([least, -most], dim=1).tolist()
        if wrong := [name for name, row in zip(parameters, bounds, strict=True) if len(set(row)) > 1]:
            raise RuntimeError(
                f"{len(wrong)} parameters, {wrong[0]} the first, learn on some workers only or have no gradient: training would "
                "be wrong without a sign of it; report this as a bug, with the settings of the run"
            )

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter of `learner` has a gradient on this rank after the backward pass."""
        return parameter.grad is not None

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
        weights = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
        # Frozen ones may be kept in bfloat16; a file has one dtype.
        return {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in weights.items()}

    def state(self) -> dict[str, Tensor]:
        """What training changes, by name: trained parameters, buffers, and AdamW's moments, as this rank holds them.

        Where a checkpoint is read into these tensors, `load_state` takes them over.
        """
        options = StateDictOptions(ignore_frozen_params=True)
        weights = cast(dict[str, Tensor], get_model_state_dict(self.learner, options=options))
        moments: Any = get_optimizer_state_dict(self.learner, self.optimizer, options=options).get("state", {})
        return {f"weights/{name}": value for name, value in weights.items()} | {
            f"moments/{name}/{key}": value for name, values in moments.items() for key, value in values.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over the tensors that `state` returned, filled from a checkpoint; here they are those of model and optimizer."""

    @property
    def buffers(self) -> frozenset[str]:
        """Names in `state` of what each rank holds whole and changes by itself."""
        return frozenset(f"weights/{name}" for name, _ in self.learner.named_buffers())

    @property
    def _autocast(self) -> bool:
        return self.precision == "bfloat16" and not isinstance(self.wrapped, FSDPModule)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _reduced(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP reduces gradients at the last micro-batch of a step; FSDP2 at each, as until then every rank would hold them whole."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            return self.wrapped.no_sync()
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_all_reduce(last)  # between the copies of HSDP: each rank then holds its share
        return contextlib.nullcontext()

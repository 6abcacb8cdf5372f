"""ZeRO-2 and ZeRO-3 of DeepSpeed, the extra `[deepspeed]`. Imported where a run uses them, as DeepSpeed takes seconds to import.

ZeRO-2 divides gradients and moments among the ranks, ZeRO-3 parameters too. Nothing is compiled: AdamW is PyTorch's.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mova_core.adapter import MoVAdapterBlock
from mova_core.model import quiet_deepspeed
from pipelines.train.config import Precision
from pipelines.train.parallel import Parallel

quiet_deepspeed()

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.utils import (  # noqa: E402
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch names them


@dataclass(kw_only=True)
class ZeroParallel(Parallel):
    """A learner in a DeepSpeed engine.

    Attributes:
        wrapped: the engine.
        reached: parameters that a gradient reached in the first step; the engine takes gradients away at once.
        hooks: what fills `reached`.
        rounded: frozen tensors on the CPU of rank 0 that bfloat16, in which the engine holds them, does not hold exactly.
    """

    wrapped: Any
    reached: set[nn.Parameter] = field(default_factory=set)
    hooks: list[RemovableHandle] = field(default_factory=list)
    rounded: dict[str, Tensor] = field(default_factory=dict)

    def step(self, clip_norm: float, loss: Tensor) -> Tensor:
        zero = self.wrapped.optimizer
        if not loss.isfinite():  # DeepSpeed skips a step whose gradient is no finite number, and looks at no loss
            next(iter(zero.averaged_gradients.values()))[0].fill_(torch.nan)
        zero.clip_grad = clip_norm
        self.wrapped.step()  # clears the gradients too
        norm = self.wrapped.get_global_grad_norm() if self.wrapped.was_step_applied() else torch.inf
        return torch.as_tensor(norm, device=self.device)

    def check_gradients(self) -> None:
        super().check_gradients()
        for hook in self.hooks:
            hook.remove()

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        return parameter in self.reached

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._trained.values())

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        weights = {}
        for name, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter) and value.requires_grad:
                whole = _whole(value)
            else:
                with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
                    whole = value.detach().clone()
            if dist.get_rank() == 0:
                weights[name] = whole.float().cpu() if whole.is_floating_point() else whole.cpu()
        return weights | self.rounded

    def state(self) -> dict[str, Tensor]:
        """As `Parallel.state`, put together on the CPU of every rank: an engine's own tensors are flat pieces of several."""
        step = next(iter(self.optimizer.state.values()))["step"]
        state: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            state[f"weights/{name}"] = _whole(parameter)
            state |= {f"moments/{name}/{key}": _whole(parameter, key) for key in MOMENTS}
            state[f"moments/{name}/step"] = step.clone()
        saved = self.learner.state_dict(keep_vars=True)
        return state | {f"weights/{name}": saved[name] for name, _ in self.learner.named_buffers() if name in saved}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            weights = state[f"weights/{name}"]
            _set(parameter, weights)
            # The engine computes with other tensors than its master weights.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.data.copy_(weights)
            for key in MOMENTS:
                _set(parameter, state[f"moments/{name}/{key}"], key)
        for values in self.optimizer.state.values():
            values["step"].fill_(next(value for name, value in state.items() if name.endswith("/step")))

    def start_moments(self) -> None:
        """Moments of zero, as the first step would make them, so that a checkpoint may be read before it."""
        zero = self.wrapped.optimizer
        three = hasattr(zero, "fp32_partitioned_groups_flat")
        for number, flat in enumerate(
            zero.fp32_partitioned_groups_flat if three else zero.single_partition_of_fp32_groups
        ):
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), dtype=torch.float32), **moments}
            if not three:  # ZeRO-2 finds a parameter's part of them by links, which its first step would set
                lazy_init_hp_params_optimizer_state(zero.bit16_groups[number], flat, self.optimizer.state)

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.learner.named_parameters() if parameter.requires_grad}

    @property
    def _autocast(self) -> bool:
        return False

    def _backward(self, loss: Tensor) -> None:
        self.wrapped.backward(loss)

    @contextlib.contextmanager
    def _reduced(self, last: bool) -> Iterator[None]:
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield


def zero_parallel(
    learner: nn.Module, optimizer: Optimizer, stage: int, precision: Precision, device: torch.device
) -> ZeroParallel:
    """Gives a learner, with whole weights on every rank, and an optimizer over its parameters to DeepSpeed.

    Args:
        stage: 2 or 3.
    """
    half = precision == "bfloat16"
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # `Parallel.backward` divides the batches; DeepSpeed only counts with this
        "zero_optimization": {
            "stage": stage,
            # Gradients reduced beside the backward pass have been wrong in several releases:
            # https://github.com/haotian-liu/LLaVA/issues/1231, https://github.com/deepspeedai/DeepSpeed/issues/7188.
            "overlap_comm": False,
            "contiguous_gradients": True,
        },
        "bf16": {"enabled": half},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if stage == 3:
        # Ranks use a block's experts in different orders: its parameters must be gathered together.
        set_z3_leaf_modules(learner, [MoVAdapterBlock], raise_if_not_found=False)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # else DeepSpeed compiles a C++ communicator for shared memory
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # the device's number, as DeepSpeed reads it
    # The engine rounds all weights and makes its float32 master weights of these.
    whole = {name: value.detach().cpu().clone() for name, value in learner.named_parameters()} if half else {}
    engine, *_ = deepspeed.initialize(model=learner, optimizer=optimizer, config=settings, dist_init_required=False)
    parallel = ZeroParallel(learner=learner, wrapped=engine, optimizer=optimizer, precision=precision, device=device)
    parallel.start_moments()
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            parallel.hooks.append(parameter.register_post_accumulate_grad_hook(parallel.reached.add))
        if name not in whole:
            continue
        if parameter.requires_grad:
            _set(parameter, whole[name])
        elif dist.get_rank() == 0 and not torch.equal(whole[name].bfloat16().float(), whole[name]):
            parallel.rounded[name] = whole[name]
    return parallel


def _set(parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
    """Sets this rank's part of a parameter's float32 master weights, or of a moment of it, from the whole tensor."""
    value = value.to(parameter.device)
    if not hasattr(parameter, "ds_id"):
        if moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)
        return
    # ZeRO-3 cuts a padded tensor; DeepSpeed's setters of whole tensors pad none, and fail on an odd number of elements.
    padded = nn.functional.pad(value.flatten(), (0, -value.numel() % dist.get_world_size()))
    mine = padded.chunk(dist.get_world_size())[dist.get_rank()]
    if moment is None:
        safe_set_local_fp32_param(parameter, mine)
    else:
        safe_set_local_optimizer_state(parameter, mine, moment)


def _whole(parameter: nn.Parameter, moment: str | None = None) -> Tensor:
    """A parameter's float32 master weights, or a moment of it, on the CPU. Every rank must call it."""
    value = safe_get_full_fp32_param(parameter) if moment is None else safe_get_full_optimizer_state(parameter, moment)
    shape = getattr(parameter, "ds_shape", parameter.shape)  # of ZeRO-3: what the whole parameter has
    return value.detach().reshape(shape).cpu().clone()

"""`load_expert`: an expert of the registry with weights that fit it exactly, or with a fixed random network."""

import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mova_core.experts.base import ExpertCard, VisionExpert
from mova_core.experts.registry import BASE, EXPERTS, expert_class
from mova_core.experts.weights import WeightsError, mismatch, read_weights

ARCH_WORDS = {"width", "depth", "heads", "mlp_hidden", "channels", "patch_size", "image_size", "pos_grid"}
ARCH_WORDS |= {"window_size", "global_blocks"}

_this_thread = threading.local()


def load_expert(
    name: str,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    size: Literal["full", "mini"] | str = "full",
    arch: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VisionExpert:
    """An expert, frozen and in eval mode. Any number of threads may load experts at once.

    Args:
        name: in the registry.
        weights: a state dict, a local file or folder, or a hub id, in public names, in ours, or a published MoVA
            checkpoint that holds this expert among others. None takes the card's public weights for the full expert;
            for mini, or an arch of your own, a fixed random network, the same in every process.
        size: "full", the published numbers, or "mini".
        arch: overrides on top of the size's arch.
        device, dtype: where and in what the parameters are kept. A file is mapped and goes there tensor by tensor; on
            the CPU, in the file's own dtype, the parameters stay mapped.

    Raises:
        ValueError: unknown name, size or arch word.
        WeightsError: weights not there, torn, or not fitting exactly; missing and unexpected names are listed.
    """
    expert_type = expert_class(name)
    full_arch = _arch(expert_type.card, size, arch or {})
    with _parameters_on_meta():  # nothing is drawn only to be overwritten
        expert = expert_type(full_arch)
    if weights is None and size == "full" and not arch:
        weights = expert_type.card.weights
        if not weights:
            raise WeightsError(f"{name}: its card names no public weights; pass a path or hub id")
    if weights is None:
        state = expert.state_dict() | _draw(expert)
    else:
        state = expert_type.from_public(_read(name, weights), full_arch)
    _check_fit(expert, state, weights if isinstance(weights, (str, os.PathLike)) else "this state dict")
    placed = {}
    for key in expert.state_dict():  # one by one, so that beside a mapped file the host never holds a second copy
        tensor = state.pop(key).detach()
        kept_in = dtype if tensor.is_floating_point() else tensor.dtype
        placed[key] = tensor.to(device, kept_in, copy=isinstance(weights, Mapping))  # the caller's stay the caller's
    if any(buffer.is_meta for buffer in expert.buffers()):  # computed where the parameters are, and not saved
        expert = expert_type(full_arch)
    expert.load_state_dict(placed, assign=True)
    return expert.to(device, dtype).eval().requires_grad_(False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of networks that this thread builds have a shape and no numbers; buffers have numbers.

    `accelerate.init_empty_weights` does the same for all threads: what another thread builds or loads meanwhile loses its
    numbers, and two threads inside at once leave `nn.Module` changed for good.
    """
    _this_thread.builds_on_meta = True
    try:
        yield
    finally:
        _this_thread.builds_on_meta = False


def _move_to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if not getattr(_this_thread, "builds_on_meta", False):
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


# At import, because the hook cannot be added while another thread builds a network: torch iterates over its hooks then.
register_module_parameter_registration_hook(_move_to_meta)  # type: ignore[arg-type]  # declared as returning nothing


def _arch(card: ExpertCard, size: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    if size not in ("full", "mini"):
        raise ValueError(f"unknown size {size!r}; there are full, mini")
    base = dict(getattr(card, size))
    words = ARCH_WORDS | base.keys()
    if unknown := overrides.keys() - words:
        listed = ", ".join(sorted(words))
        raise ValueError(f"{card.name}: unknown arch word {', '.join(sorted(unknown))}; there are {listed}")
    if "width" in overrides and base.get("channels") == base.get("width"):
        base["channels"] = overrides["width"]  # features as wide as the network stay so
    full_arch = base | dict(overrides)
    _check_arch(card, full_arch)
    return full_arch


def _check_arch(card: ExpertCard, arch: Mapping[str, Any]) -> None:
    """Raises ValueError for numbers that no network of this expert can have."""
    for word, value in arch.items():
        if word in ARCH_WORDS - {"global_blocks"} and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{card.name}: {word} must be a whole number from 1, not {value!r}")
    width, heads, channels = (arch.get(word, 1) for word in ("width", "heads", "channels"))
    if width % heads:
        raise ValueError(f"{card.name}: width {width} is not a multiple of heads {heads}")
    if card.full.get("channels") == card.full.get("width") and channels != width:
        raise ValueError(
            f"{card.name}: its features are as wide as its network: channels must be {width}, not {channels}"
        )
    if arch.get("image_size", 1) < arch.get("patch_size", 1):
        raise ValueError(f"{card.name}: image_size {arch['image_size']} is less than a patch of {arch['patch_size']}")


def _read(name: str, weights: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, of a published MoVA checkpoint only this expert's part."""
    tower = f"model.vision_tower.vision_tower_{(BASE, *EXPERTS).index(name)}." if name in (BASE, *EXPERTS) else ""
    if not isinstance(weights, Mapping):
        return read_weights(weights, part=tower)
    part = {key.removeprefix(tower): tensor for key, tensor in weights.items() if key.startswith(tower)}
    return part or dict(weights)


def _draw(expert: VisionExpert) -> dict[str, Tensor]:
    """Random parameters: norms 1 and 0, all else uniform with variance 1/fan_in, so that features stay lively in depth.

    The same bits everywhere: published names, because installed libraries differ in theirs, and uniform numbers,
    because torch's normal ones depend on the processor.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(expert.card.name.encode()))
    drawn = {}
    for name, empty in sorted(expert.to_public(dict(expert.named_parameters()), expert.arch).items()):
        if empty.ndim <= 1:
            drawn[name] = torch.zeros(empty.shape) if name.endswith("bias") else torch.ones(empty.shape)
        else:
            fan_in = empty.numel() // empty.shape[0]
            deviation = max(0.02, fan_in**-0.5)
            drawn[name] = (torch.rand(empty.shape, generator=generator) - 0.5) * (deviation * 12**0.5)
    return expert.from_public(drawn, expert.arch)


def _check_fit(expert: VisionExpert, state: Mapping[str, Tensor], source: object) -> None:
    problem = mismatch(expert.state_dict(), state)
    if problem:
        raise WeightsError(f"{source} does not fit expert {expert.card.name!r} of arch {expert.arch}: {problem}")

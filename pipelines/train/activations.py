"""Bytes that a sample's forward pass keeps for the backward pass, measured on the meta device: real classes, no weights, no data.

Every tensor that autograd saves is seen by `torch.autograd.graph.saved_tensors_hooks`; a storage counts once, parameters and
buffers do not. Attention counts as a fused kernel, which saves queries, keys, values, output and one number per query and head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from mova_core.experts import Features
from pipelines.train.parallelize import layers

TEXT_LENGTH = 64  # tokens of the question that the gate reads; BERT's share of the memory is small at any length


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of one sample.

    Attributes:
        outside: saved outside of the repeated layers (`layers`).
        inside: saved inside them.
        inputs: inputs of the layers, which is what activation checkpointing keeps of them.
        largest: saved inside the layer that saves most: with checkpointing the backward pass computes one layer at a time.
    """

    outside: int
    inside: int
    inputs: int
    largest: int

    def kept(self, checkpointing: bool) -> int:
        """The most that is in memory at once, bytes."""
        return self.outside + (self.inputs + self.largest if checkpointing else self.inside)


def measure_activations(model: Any, length: int, experts: int, dtype: torch.dtype) -> Activations:
    """Activations of a sample with one picture, up to the last hidden states; logits are not among them.

    Args:
        model: a `MoVAForConditionalGeneration` on the meta device, of which each parameter says whether it learns; its
            parameters are cast to `dtype`.
        length: tokens of the sample, the picture's among them.
        experts: how many experts the picture is routed to: those with the most channels.
        dtype: of the computation.
    """
    model.to(dtype).train()
    adapter, pool = model.adapter.config, model.adapter.config.expert_channels
    widest = sorted(pool, key=lambda name: -pool[name])[:experts]
    routing = torch.tensor([[name in widest for name in pool]])
    side = model.config.base_arch["image_size"]
    meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
    features = {
        name: Features(torch.empty(1, adapter.grid**2, pool[name], **meta), (adapter.grid,) * 2) for name in widest
    }
    text = torch.zeros(1, TEXT_LENGTH, dtype=torch.long, device="meta")
    with _MetaForward(routing), _saved(model) as record:
        base = model.encode_base(torch.empty(1, 3, side, side, **meta))
        # The adapter asks for the values of the mask; `_MetaForward` has them.
        visual, _ = model.encode_image(base, {"input_ids": text}, features, routing.to("meta"))
        embeds = torch.empty(1, length, visual.shape[-1], **meta)
        embeds.requires_grad_(visual.requires_grad or model.get_input_embeddings().weight.requires_grad)
        # A mask, as a batch with padding has: it decides how some models lay keys and values out.
        mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")
        model.language_model.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    return record.activations()


class _MetaForward(TorchFunctionMode):
    """Lets the forward pass run where no tensor has values.

    Args:
        routing: answers `Tensor.cpu`, with which the adapter reads the only values that decide shapes.
    """

    def __init__(self, routing: Tensor):
        super().__init__()
        self.routing = routing

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        if func is Tensor.cpu:
            return self.routing
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Saves what a fused kernel saves; without it attention on the meta device saves its maps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> None:  # type: ignore[override]
        raise NotImplementedError("activations are measured by the forward pass alone")


class _Record:
    """Storages by where they were first saved: `None` is outside of all layers."""

    def __init__(self, model: nn.Module):
        self.layer: nn.Module | None = None
        self.saved: dict[nn.Module | None, set[torch.UntypedStorage]] = {None: set()}
        self.inputs: dict[nn.Module, set[torch.UntypedStorage]] = {}
        self.weights = {tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]}

    def save(self, tensor: Tensor) -> Tensor:
        self.saved.setdefault(self.layer, set()).add(tensor.untyped_storage())
        return tensor

    def enter(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.layer = layer
        self.inputs[layer] = {tensor.untyped_storage() for tensor in _tensors([args, kwargs])}

    def leave(self, *_: Any) -> None:
        self.layer = None

    def activations(self) -> Activations:
        outside = self.saved.pop(None) - self.weights
        inside = [saved - self.weights - outside for saved in self.saved.values()]
        learning = [self.inputs[layer] for layer, saved in self.saved.items() if layer is not None and saved]
        return Activations(
            outside=_bytes(outside),
            inside=_bytes(set().union(*inside)),
            inputs=_bytes(set().union(*learning) - outside - self.weights),
            largest=max(map(_bytes, inside), default=0),
        )


@contextmanager
def _saved(model: nn.Module) -> Iterator[_Record]:
    """Records what autograd saves while the body runs the model."""
    record = _Record(model)
    hooks: list[RemovableHandle] = []
    for layer in layers(model):
        hooks.append(layer.register_forward_pre_hook(record.enter, with_kwargs=True))
        hooks.append(layer.register_forward_hook(record.leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(record.save, lambda tensor: tensor):
            yield record
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _bytes(storages: set[torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages)

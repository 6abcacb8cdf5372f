"""Floating-point operations of a training step by part of the model, and the share of a GPU's peak that they use (MFU).

Per position and weight of a matrix product: 2 operations forward, 2 more backward where a gradient flows on to what came
before, and 2 more where the weight learns. So a trained part counts 6 P T for P weights and T positions, a frozen one 2 P T, or
4 P T where a trained part lies before or inside it. Attention adds 4 N^2 D forward and twice that backward per layer, N being
the positions and D the width of all heads, not halved for a causal mask. This is the count of PaLM (arXiv 2204.02311,
appendix B), taken part by part. Only positions that carry something count: no padding, no recomputed activation, the LLM's head
only at answers, an expert's cross-attention only for the pictures routed to it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mova_core.processing import IGNORE

# Dense operations per second in bfloat16, from NVIDIA's data sheets, by a part of the name that CUDA gives the card. The first
# part that fits counts, so a longer name stands before a shorter one.
PEAKS = {
    "B200": 2250e12,
    "B100": 1750e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that a device can do; None on a CPU, for an unknown card, and in float32.

    `PEAKS` holds bfloat16 only: what a card does in float32 depends on whether TF32 is allowed.
    """
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class ModelFlops:
    """Counts the operations of a micro-batch by its shapes, forward and backward.

    Args:
        model: a `MoVAForConditionalGeneration` of which each parameter says whether it learns; only shapes are read, so it may
            be on the meta device.
        light: the light router learns: base and text encoder run without gradients, and neither adapter nor LLM runs.
    """

    def __init__(self, model: Any, light: bool = False):
        config, adapter = model.config, model.adapter.config
        llm, text = config.text_config, adapter.text_encoder
        heads = llm.num_attention_heads
        self.light = light
        self.base_positions = adapter.grid**2
        self.experts = len(adapter.expert_channels)
        self.widths = {  # layers x width of attention
            "llm": llm.num_hidden_layers * heads * (getattr(llm, "head_dim", None) or llm.hidden_size // heads),
            "base": (config.base_arch["depth"] - 1) * config.base_arch["width"],
            "text": text["num_hidden_layers"] * text["hidden_size"],
            "adapter": adapter.blocks * adapter.width,
        }
        learns = {
            part: _learns(model, part) for part in ("base_encoder", "adapter.text_encoder", "adapter", "language_model")
        }
        self.flows = {
            "base": not light and learns["base_encoder"],
            "text": not light and learns["adapter.text_encoder"],
            "adapter": learns["base_encoder"] or learns["adapter"],
            "llm": any(learns.values()),
            "router": True,
        }
        self.weights: dict[str, float] = {}  # kind of position -> operations per such position
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            count = _matrix_weights(module)
            if count:
                kind = "head" if module is head else _kind(name)
                trained = any(weight.requires_grad for weight in module.parameters(recurse=False))
                if "lora_" in name and not trained:
                    continue  # the expert-routing LoRA is off while anything else learns
                part = "llm" if kind == "head" else kind.partition(".")[0]
                each = 2 * (1 + (self.flows[part] and not _reads_data(name)) + trained)
                self.weights[kind] = self.weights.get(kind, 0.0) + each * count

    def of(self, batch: Mapping[str, Any]) -> float:
        """Operations of a micro-batch, the tensors that the model takes, forward and backward."""
        positions, squares = self._positions(batch)
        products = sum(each * positions.get(kind, 0.0) for kind, each in self.weights.items())
        attention = sum(
            4 * self.widths[part] * square * (3 if self.flows[part] else 1) for part, square in squares.items()
        )
        return float(products + attention)

    def _positions(self, batch: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
        """Positions by kind, and per part the sum of the squared lengths of its sequences."""
        mask: Tensor | None = batch.get("text_attention_mask")
        texts = torch.zeros(1) if mask is None else mask.sum(1).float()
        pictures, grid = 0 if mask is None else len(mask), self.base_positions
        shown = len(batch["pixel_values"]) if "pixel_values" in batch else 0
        positions: dict[str, float] = {
            "base": shown * (grid + 1),
            "base.patches": shown * grid,
            "text": float(texts.sum()),
            "router": pictures,
        }
        squares: dict[str, float] = {"base": shown * (grid + 1) ** 2, "text": float(texts.square().sum())}
        if self.light:
            return positions, squares
        routed = batch["routing"].sum(0).tolist() if "routing" in batch else [0] * self.experts
        lengths = batch["attention_mask"].sum(1).float()
        positions |= {f"adapter.expert{index}": rows * grid for index, rows in enumerate(routed)}
        positions |= {
            "adapter": pictures * grid,
            "adapter.pooled": pictures * grid / 4,
            "adapter.picture": pictures,
            "llm": float(lengths.sum()),
            "head": float((batch["labels"][:, 1:] != IGNORE).sum()),
        }
        squares |= {"adapter": (pictures + sum(routed)) * grid**2, "llm": float(lengths.square().sum())}
        return positions, squares


def _learns(model: nn.Module, part: str) -> bool:
    return any(parameter.requires_grad for parameter in model.get_submodule(part).parameters())


def _reads_data(name: str) -> bool:
    """Whether a layer's input is pixels or a stored feature, which need no gradient."""
    return "patch_embedding" in name or (".cross_attn." in name and name.endswith((".k_proj", ".v_proj")))


def _matrix_weights(module: nn.Module) -> int:
    """Weights of a module that is one matrix product; an embedding is looked up and counts none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or isinstance(module, nn.Embedding):
        return 0  # a buffer is a layer that never runs, see `Clip`
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features  # a quantised weight is packed into fewer numbers
    return weight.numel() if weight.ndim > 1 else 0


def _kind(name: str) -> str:
    """The kind of position that a layer of this name computes."""
    if name.startswith("base_encoder."):
        return "base.patches" if "patch_embedding" in name else "base"
    if name.startswith("adapter.text_encoder."):
        return "text"
    if name.startswith("light_router."):
        return "router"
    if not name.startswith("adapter."):
        return "llm"
    if ".cross_attn." in name:
        return f"adapter.expert{name.split('.cross_attn.')[1].split('.')[0]}"
    if ".gate." in name or ".se." in name:  # squeeze-and-excitation works on the mean of all positions
        return "adapter.picture"
    return "adapter.pooled" if name.startswith(("adapter.downsample.2", "adapter.mlp")) else "adapter"

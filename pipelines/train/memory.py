"""The GPU memory of a training run, from shapes alone, before any worker starts.

Per worker: weights, gradients and AdamW's moments, which stay; what the strategy gathers for a moment; and per sample of a
micro-batch the activations (`pipelines/train/activations.py`) and logits. One GB is 10^9 bytes.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from mova_core.adapter import AdapterConfig
from mova_core.config import MoVAConfig
from mova_core.experts import BASE, EXPERTS, expert_card
from mova_core.experts.cost import shapes_of
from mova_core.model import MoVAForConditionalGeneration
from pipelines.train.activations import Activations, measure_activations
from pipelines.train.config import LABEL_STAGES, PARTS, TrainConfig, part_of
from pipelines.train.gpus import Gpus
from pipelines.train.parallelize import layers
from pipelines.train.stages import choose_parameters

# Share of the LLM's positions that predict a token of an answer. With 576 picture tokens it is 0.6 % for a VQA sample, 9 % for
# a caption and 19 % for LLaVA's instructions; a batch of long conversations alone has 32 %.
ANSWER_SHARE = 0.2
# Guesses until a GPU has been measured: context, NCCL's buffers and cuBLAS' workspace; and what the allocator cannot use.
RESERVED, FRAGMENTATION = 3e9, 1.05
FLOAT, MOMENTS = 4, 8  # bytes per parameter: float32, and AdamW's two moments


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of the worker that holds most.

    Attributes:
        parts: part of the model -> its parameters, and those of them that learn.
        weights: parameters and buffers of this worker.
        gradients, moments: of the parameters that learn, of this worker.
        transient: what the strategy adds during a step: see `_transient`.
        experts: weights of vision experts that compute features in the worker.
        optimizer: temporary tensors of the optimizer's step, when no activations are left.
        activations, logits: per sample.
        unchecked_activations: `activations` without activation checkpointing.
    """

    parts: dict[str, tuple[int, int]]
    weights: int
    gradients: int
    moments: int
    transient: int
    experts: int
    optimizer: int
    activations: int
    unchecked_activations: int
    logits: int

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.moments + self.experts

    def needed(self, micro_batch: int) -> float:
        """Peak of a step of `micro_batch` samples at once, with what CUDA takes."""
        step = self.transient + micro_batch * (self.activations + self.logits)
        return (self.state + max(step, self.optimizer)) * FRAGMENTATION + RESERVED

    def largest_micro_batch(self, memory: float, share: int | None = None) -> int:
        """Most samples at once that `memory` bytes hold; 0: none.

        Args:
            share: samples of a step that a worker computes; the result then divides this number.
        """
        if share is not None:
            divisors = [number for number in range(share, 0, -1) if share % number == 0]
            return next((number for number in divisors if self.needed(number) <= memory), 0)
        if self.needed(1) > memory:
            return 0
        room = (memory - RESERVED) / FRAGMENTATION - self.state - self.transient
        return math.floor(room / (self.activations + self.logits))


def plan_memory(config: TrainConfig, model_config: MoVAConfig, answer_share: float = ANSWER_SHARE) -> MemoryPlan:
    """Plans for the longest sample, `config.max_length` tokens with one picture that is routed to as many experts as may be.

    Args:
        config: of any stage but light-router, which trains two small matrices.
        answer_share: share of the positions at which logits are computed.
    """
    shape = asdict(replace(config, strategy="ddp", shard_size=0, workers=1, checkpoint_activations=False))
    model, activations = _measured(json.dumps(model_config.to_dict(), default=str), json.dumps(shape))
    ranks, trained = _ranks(config), [parameter for parameter in model.parameters() if parameter.requires_grad]
    shares = sum(_share(parameter, ranks) for parameter in trained)
    frozen = 2 if _halves_frozen(config, model_config) else FLOAT
    weights = sum(
        _share(parameter, ranks) * (frozen if part_of(name) == "llm" and not parameter.requires_grad else FLOAT)
        for name, parameter in model.named_parameters()
    )
    transient = _transient(model, config)
    return MemoryPlan(
        parts=_parts(model),
        weights=weights + sum(buffer.numel() * FLOAT for buffer in model.buffers()),
        gradients=shares * FLOAT,
        moments=shares * MOMENTS,
        transient=transient,
        experts=_experts(config, model_config),
        optimizer=shares * FLOAT,  # the updates of all parameters at once, torch's default on a GPU
        activations=activations.kept(config.checkpoint_activations),
        unchecked_activations=activations.kept(False),
        logits=_logits(model, config, answer_share),
    )


def full_size(llm: Mapping[str, Any]) -> MoVAConfig:
    """The config of a MoVA with the published adapter, base encoder and seven experts.

    Args:
        llm: what the LLM's config.json holds.
    """
    text_config = AutoConfig.for_model(**llm)
    channels = {name: expert_card(name).full["channels"] for name in EXPERTS}
    adapter = AdapterConfig(expert_channels=channels, out_width=text_config.hidden_size)
    return MoVAConfig(
        text_config=text_config,
        base_arch=expert_card(BASE).full,
        pool=[{"name": name, "channels": count, "description": ""} for name, count in channels.items()],
        adapter=adapter.to_dict(),
    )


def plan_run(config: TrainConfig, model_config: MoVAConfig, gpus: Gpus, auto: bool = False) -> dict[str, Any]:
    """The memory of a run on `gpus`, as `mova train --dry-run --json` prints it (docs/json.md).

    Args:
        auto: choose the largest micro-batch that fits, instead of that of `config`.
    """
    plan, memory = plan_memory(config, model_config), gpus.gigabytes * 1e9
    if auto:
        config = replace(config, micro_batch=plan.largest_micro_batch(memory, config.share) or 1)
    micro_batch = config.at_once
    needed = plan.needed(micro_batch)
    per_gpu = {
        name: getattr(plan, name) for name in ("weights", "gradients", "moments", "experts", "transient", "optimizer")
    }
    per_gpu |= {"activations": micro_batch * plan.activations, "logits": micro_batch * plan.logits, "total": needed}
    return {
        "gpus": asdict(gpus),
        "parts": {name: {"parameters": total, "trained": trained} for name, (total, trained) in plan.parts.items()},
        "strategy": config.strategy,
        "precision": config.precision,
        "checkpoint_activations": config.checkpoint_activations,
        "gigabytes": {name: value / 1e9 for name, value in per_gpu.items()},
        "gigabytes_per_sample": {
            "activations": plan.activations / 1e9,
            "activations_unchecked": plan.unchecked_activations / 1e9,
            "logits": plan.logits / 1e9,
        },
        "micro_batch": micro_batch,
        "micro_batches": config.micro_batches,
        "largest_micro_batch": plan.largest_micro_batch(memory),
        "fits": needed <= memory,
    }


def refusal(config: TrainConfig, model_config: MoVAConfig, plan: Mapping[str, Any]) -> str:
    """One line on a plan of `plan_run` that does not fit, with the two changes that cost least."""
    gpus, samples = Gpus(**plan["gpus"]), plan["micro_batch"]
    at_once = f"{samples} samples" if samples > 1 else "one sample"
    total = plan["gigabytes"]["total"]
    return (
        f"{config.stage} needs {total:.1f} GB per GPU with {at_once} at once, and there are {gpus}: "
        f"{advice(config, model_config, samples)}"
    )


def advice(config: TrainConfig, model_config: MoVAConfig, micro_batch: int) -> str:
    """The two changes of the settings that save memory and cost least time, with their gigabytes."""
    changes = islice(cheaper(config, model_config, micro_batch), 2)
    texts = [f"{option} saves {saved / 1e9:.1f} GB" for option, saved in changes]
    return ", ".join(texts) or "take larger GPUs or a smaller LLM"


def cheaper(config: TrainConfig, model_config: MoVAConfig, micro_batch: int) -> Iterator[tuple[str, float]]:
    """Changes of the settings that save memory, those that cost least time first, each with the bytes that it saves.

    Args:
        micro_batch: samples that a worker computes at once now.
    """
    now = plan_memory(config, model_config).needed(micro_batch)
    share = config.share
    changes: list[tuple[str, dict[str, Any], int]] = []
    if smaller := [samples for samples in range(1, micro_batch) if share % samples == 0]:
        changes.append((f"--micro-batch {smaller[-1]}", {}, smaller[-1]))
    if config.precision == "float32":
        changes.append(("--precision bfloat16", {"precision": "bfloat16"}, micro_batch))
    if not config.checkpoint_activations:
        changes.append(("--checkpoint-activations", {"checkpoint_activations": True}, micro_batch))
    if config.strategy == "ddp" and config.workers > 1:
        changes.append(("--strategy fsdp", {"strategy": "fsdp"}, micro_batch))
    elif config.strategy == "fsdp":
        workers = 2 * config.workers
        changes.append((f"--workers {workers}", {"workers": workers}, min(micro_batch, max(1, share // 2))))
    for text, settings, samples in changes:
        changed = replace(config, **settings)
        saved = now - plan_memory(changed, model_config).needed(samples)
        if saved > 0:
            yield text, saved


def _parts(model: nn.Module) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = dict.fromkeys(PARTS, (0, 0))
    for name, parameter in model.named_parameters():
        part = part_of(name) or "light router"
        total, trained = counts.get(part, (0, 0))
        counts[part] = (total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad)
    return counts


def _ranks(config: TrainConfig) -> int:
    """Workers that share one copy of parameters, gradients and moments."""
    return (config.shard_size or config.workers) if config.strategy == "fsdp" else 1


def _share(parameter: Tensor, ranks: int) -> int:
    """Elements of the largest share of a parameter: FSDP2 divides the first dimension."""
    if parameter.ndim == 0:
        return parameter.numel()
    return math.ceil(parameter.shape[0] / ranks) * math.prod(parameter.shape[1:])


def _halves_frozen(config: TrainConfig, model_config: MoVAConfig) -> bool:
    """Whether the frozen LLM is kept in bfloat16: under FSDP2 where that loses nothing (Vicuna's weights are float16)."""
    dtype = str(model_config.text_config.dtype).removeprefix("torch.")
    return config.strategy == "fsdp" and config.precision == "bfloat16" and dtype == "bfloat16"


def _transient(model: nn.Module, config: TrainConfig) -> int:
    """What a step holds beside state and activations.

    ddp: the buckets in which gradients are reduced; in bfloat16 the cast matrices, which autocast keeps, those of frozen parts
    only without checkpointing. fsdp: all parameters that lie in no layer, and two layers, as wholes in the dtype of the
    computation; gradients of the former, and of one layer with the float32 copy that is reduced.
    """
    size = 2 if config.precision == "bfloat16" else FLOAT
    if config.strategy == "ddp":
        learning = _elements(model.parameters(), trained_only=True)
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        cast = _elements(matrices, trained_only=config.checkpoint_activations) if size == 2 else 0
        return FLOAT * learning * (config.workers > 1) + size * cast
    in_layers = [list(layer.parameters()) for layer in layers(model)]
    whole = {id(parameter) for layer in in_layers for parameter in layer}
    root = [parameter for parameter in model.parameters() if id(parameter) not in whole]
    largest = max(map(_elements, in_layers), default=0)
    learning = max((_elements(layer, trained_only=True) for layer in in_layers), default=0)
    outside = size * (_elements(root) + _elements(root, trained_only=True))
    return outside + 2 * size * largest + (size + FLOAT) * learning


def _elements(parameters: Iterable[Tensor], trained_only: bool = False) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad or not trained_only)


@lru_cache(maxsize=4)
def _measured(model_config: str, config: str) -> tuple[Any, Activations]:
    """The model on the meta device, its parameters chosen, and the activations of a sample, from both configs as JSON.

    Measuring takes seconds, and `cheaper` compares plans that differ in the strategy alone.
    """
    run = TrainConfig(**json.loads(config))
    with torch.device("meta"):
        model = MoVAForConditionalGeneration(MoVAConfig.from_dict(json.loads(model_config)))
    choose_parameters(model, run)
    dtype = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    experts = 0 if run.stage in LABEL_STAGES else min(model.config.max_experts, len(model.config.pool))
    return model, measure_activations(model, run.max_length, experts, dtype)


def _logits(model: Any, config: TrainConfig, answer_share: float) -> int:
    """At the backward pass's begin: logits, their float32 copy, its log-softmax, and the gradients of the first and the last."""
    size = 14 if config.precision == "bfloat16" else 12
    return round(size * answer_share * config.max_length * model.get_output_embeddings().weight.shape[0])


def _experts(config: TrainConfig, model_config: MoVAConfig) -> int:
    if config.features == "store" or config.stage in LABEL_STAGES:
        return 0
    sizes = {"bfloat16": 2, "float16": 2}
    return sum(
        _elements(shapes_of(name, model_config.expert_size).parameters())
        * sizes.get(model_config.feature_dtypes.get(name, ""), FLOAT)
        for name in model_config.experts
    )

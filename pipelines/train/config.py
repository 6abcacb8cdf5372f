"""Settings of a training run, and the four stages with their defaults.

Imports neither torch nor Ray, so that the command line can show the defaults at once.
"""

import re
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from mova_core.io.uris import absolute
from pipelines.data_args import DataArgs

Stage = Literal["pretrain", "sft", "router", "light-router"]
Strategy = Literal["ddp", "fsdp", "zero2", "zero3"]
Precision = Literal["float32", "bfloat16"]
Loss = Literal["token", "sample"]
Unlabelled = Literal["refuse", "random", "none"]
FeaturesFrom = Literal["store", "tiered", "online"]
Part = Literal["base", "text", "adapter", "llm"]
# Prefixes of the parameters' names; the first that fits decides.
PARTS: dict[Part, str] = {
    "base": "base_encoder.",
    "text": "adapter.text_encoder.",
    "adapter": "adapter.",
    "llm": "language_model.",
}
FREEZABLE: tuple[Part, ...] = ("base", "text", "llm")
LABEL_STAGES: tuple[Stage, ...] = ("router", "light-router")  # learn from routing labels and read no expert features


@dataclass(frozen=True, kw_only=True)
class StageDefaults:
    """What a stage trains, and the settings it has unless others are given.

    Attributes:
        summary: one line for the command's help.
        learning_rate: peak of the cosine schedule.
        batch_size: samples per optimizer step, over all workers.
        lora_rank: of the stage's LoRA; 0: none.
    """

    summary: str
    learning_rate: float
    batch_size: int
    lora_rank: int = 0


# Learning rates and batch sizes of pretrain and sft are the paper's (arXiv 2404.13046, implementation details of its
# experiments). The paper names none for the routing LoRA; the light router is not part of the paper.
STAGES: dict[Stage, StageDefaults] = {
    "pretrain": StageDefaults(
        summary="Stage 1: train the MoV-Adapter and the base encoder; the LLM is frozen.",
        learning_rate=2e-4,
        batch_size=1024,
    ),
    "sft": StageDefaults(
        summary="Stage 2: train everything but the experts.",
        learning_rate=2e-5,
        batch_size=128,
    ),
    "router": StageDefaults(
        summary="Train the expert-routing LoRA on routing labels (see `mova label`).",
        learning_rate=2e-4,
        batch_size=128,
        lora_rank=64,
    ),
    "light-router": StageDefaults(
        summary="Train the light router (`mova ask --router light`) on routing labels; fixed pool, no LLM pass.",
        learning_rate=1e-3,
        batch_size=128,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataArgs):
    """One training run. `learning_rate` and `batch_size` default to those of the stage (`STAGES`).

    Attributes:
        stage: what learns.
        model, data, store, images, bad_rows: as `DataArgs`; `model` is the model to start from.
        mix: further data files -> how often an epoch passes over each: 2 twice, 0.5 over the same random half in every epoch.
        routing_samples: labelled samples with one picture that also teach the LLM itself to route (stage sft), as the paper
            mixes in 2,000; with the pool as `shuffle_pool` says.
        unlabelled: what becomes of a sample with a picture and without a routing label, where the stage reads features:
            "refuse" the data, "random", 0 to 3 experts by chance, or "none", no expert.
        features: "store" reads them; "tiered" computes and stores what the store lacks; "online" computes all, in every epoch, and
            uses no store.
        weights: expert -> weights where the public ones are not meant; for experts that this run computes with.
        loss: "token", the mean over all answer tokens of a batch; "sample", the mean over samples of their answers' means.
        output: local folder that the trained model is written to.
        learning_rate: peak of the cosine schedule.
        part_rates: part of the model -> its own peak.
        freeze: parts (`FREEZABLE`) that do not learn although the stage trains them.
        batch_size: samples per optimizer step, over all workers.
        epochs: passes over the data; fractions allowed, at least one step is made.
        warmup: share of the steps in which the learning rate rises from 0.
        weight_decay: of AdamW, on every trained matrix; norms and biases do not decay.
        clip_norm: largest norm of the gradient.
        max_length: tokens of the longest sample; a longer one loses its end.
        seed: decides the order of the samples and every random choice.
        group_by_length: batches of samples of similar length and of one modality, as the published code trains in
            supervised fine-tuning; else plain shuffling.
        checkpoint_every: steps between two checkpoints ("200"), or minutes ("10m").
        export_every: steps between two models that are written beside `output`, as "OUTPUT-step-200"; 0: none.
        eval_data: a data file of held-out samples, or its URL; their features must be in the store.
        eval_every: steps between two evaluations on `eval_data`; 0: one, after the last step.
        log: trackers that receive the lines of `metrics.jsonl`: "tensorboard", "wandb", "mlflow".
        profile_steps: first and last step that torch.profiler traces.
        best: the output is the model with the lowest loss of all evaluations, not the last one.
        micro_batch: samples that a worker computes at once; gradients are accumulated over its share of a batch. 0: its
            whole share at once.
        strategy: "ddp", every worker holds the whole model; "fsdp", parameters, gradients and moments are divided among the
            workers (FSDP2); "zero2" and "zero3", DeepSpeed's: ZeRO-2 divides no parameters. All give the same numbers.
        shard_size: with "fsdp": workers that share one copy of the model (HSDP), best those of one node; 0: all.
        precision: of the computation; parameters and moments are float32.
        checkpoint_activations: compute the layers of LLM, base encoder and adapter a second time in the backward pass instead
            of keeping their activations; the same numbers. Default: with `gpu`.
        workers: Ray Train workers, at most.
        min_workers: with how many of them the run goes on where the cluster has no more; 0: with all.
        shared_output: the folder of `output` is one that all nodes of the cluster see.
        gpu: one GPU per worker, else one CPU.
        loader_processes: reading processes per worker; 0 reads ahead in a thread.
        lora_rank: rank of the expert-routing LoRA (stage router, default 64); or, in sft, of a LoRA that is trained in place of the
            LLM and added to it at the end (default 0: the LLM itself is trained).
        shuffle_pool: model-pool augmentation of routing samples, section 3.3 of the paper (stages router, sft).
        fingerprints: expert -> the fingerprint whose features to read, where the store has several.
    """

    stage: Stage
    output: str
    learning_rate: float = None  # type: ignore[assignment]  # never None after __post_init__
    part_rates: dict[str, float] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    batch_size: int = None  # type: ignore[assignment]  # as learning_rate
    epochs: float = 1.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_length: int = 2048
    mix: dict[str, float] = field(default_factory=dict)
    routing_samples: int = 0
    unlabelled: Unlabelled = "refuse"
    loss: Loss = "token"
    features: FeaturesFrom = "store"
    weights: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    group_by_length: bool = False
    checkpoint_every: str = "200"
    export_every: int = 0
    eval_data: str | None = None
    eval_every: int = 0
    best: bool = False
    log: tuple[str, ...] = ()
    profile_steps: tuple[int, int] | None = None
    micro_batch: int = 0
    strategy: Strategy = "ddp"
    shard_size: int = 0
    precision: Precision = "float32"
    checkpoint_activations: bool = None  # type: ignore[assignment]  # as learning_rate
    workers: int = 2
    min_workers: int = 0
    shared_output: bool = False
    gpu: bool = False
    loader_processes: int = 0
    lora_rank: int = None  # type: ignore[assignment]  # as learning_rate
    shuffle_pool: bool = True
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Paths and URLs that the run reads; its output folder must hold none of them."""
        return tuple(filter(None, (self.model, self.data, *self.mix, self.eval_data, self.store, self.images)))

    @property
    def share(self) -> int:
        """Samples of a step that a worker computes, at most."""
        return ceil(self.batch_size / self.workers)

    @property
    def at_once(self) -> int:
        """Samples that a worker computes at once, at most."""
        return min(self.micro_batch or self.share, self.share)

    @property
    def micro_batches(self) -> int:
        """Into how many parts every worker's share of a batch is divided."""
        return ceil(self.share / self.at_once)

    @property
    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """`checkpoint_every` in steps, or in seconds; the other is None."""
        return parse_interval(self.checkpoint_every)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "output", absolute(self.output))
        object.__setattr__(self, "checkpoint_every", str(self.checkpoint_every))
        if self.eval_data is not None:
            object.__setattr__(self, "eval_data", absolute(self.eval_data))
        object.__setattr__(self, "mix", {absolute(path): weight for path, weight in self.mix.items()})
        for name in ("learning_rate", "batch_size", "lora_rank"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(STAGES[self.stage], name))
        if self.checkpoint_activations is None:
            object.__setattr__(self, "checkpoint_activations", self.gpu)


def parse_interval(text: str) -> tuple[int | None, float | None]:
    """Steps ("200"), or the seconds of a number of minutes ("10m", "0.5m"); the other is None.

    Raises:
        ValueError: the text is neither, or not above 0.
    """
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text), None
    if re.fullmatch(r"\d+(\.\d+)?m", text, re.ASCII) and (minutes := float(text[:-1])) > 0:
        return None, 60 * minutes
    raise ValueError(f"{text}: give a number of steps, as 200, or of minutes, as 10m")


def part_of(parameter: str) -> str:
    """The part of the model that a parameter belongs to, by its name; empty for the light router."""
    return next((part for part, prefix in PARTS.items() if parameter.startswith(prefix)), "")

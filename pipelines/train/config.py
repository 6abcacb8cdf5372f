"""The settings of a training run and the stages it may have. Imports neither torch nor Ray: the command shows the defaults."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.invalid_records import BadRows

Stage = Literal["pretrain", "sft", "router", "light-router"]
OF_LABELS: tuple[Stage, ...] = ("router", "light-router")  # learn from routing labels and read no features


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Learning rates and batch sizes default to the paper's (PAPER table 1.4) in the command."""

    stage: Stage
    model: str  # folder of the model to start from
    data: str  # LLaVA JSON or JSONL
    store: str  # feature store
    output: str  # folder the trained model goes to
    images: str | None = None  # folder the records' images are relative to; default the data file's
    bad_rows: BadRows = "raise"
    learning_rate: float = 2e-4
    batch_size: int = 32  # samples per step, over all workers
    epochs: float = 1.0
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_length: int = 2048  # tokens
    seed: int = 0
    checkpoint_every: int = 200  # steps
    workers: int = 2
    gpu: bool = False
    loader_processes: int = 0  # per worker
    lora_rank: int = 64  # router stage
    shuffle_pool: bool = True  # router stage: model-pool augmentation
    fingerprints: dict[str, str] = field(default_factory=dict)  # expert -> features to take where the store has several

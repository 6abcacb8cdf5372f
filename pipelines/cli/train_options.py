"""The options of `mova train STAGE`, by the field of `TrainConfig` that takes their value."""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from pipelines.cli.options import (
    DATA,
    RUN,
    TRAINING,
    BadRows,
    DataPath,
    ImagesPath,
    ModelPath,
    NameValue,
    Weights,
    name_value,
    path_or_url,
)
from pipelines.cli.paths import (
    output_path,
)
from pipelines.cli.recipe import (
    MicroBatch,
)
from pipelines.train.config import (
    FREEZABLE,
    PARTS,
    FeaturesFrom,
    Loss,
    Precision,
    Stage,
    Unlabelled,
    parse_interval,
)


class Weighted(NamedTuple):
    """A data file, and how often an epoch passes over it."""

    path: str
    passes: float


def weighted_file(text: str) -> Weighted:
    """Parses FILE=PASSES; the file may have an equals sign in its name."""
    file, _, passes = text.rpartition("=")
    try:
        weighted = Weighted(path_or_url(file), float(passes))
    except ValueError:
        weighted = Weighted("", 0.0)
    if not file or not 0 < weighted.passes < math.inf:
        raise typer.BadParameter(f"{text!r} is no FILE=PASSES with a number over 0, such as more.json=1")
    return weighted


def step_range(text: str) -> tuple[int, int]:
    """Parses FIRST:LAST."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise typer.BadParameter(f"{text!r} is no FIRST:LAST, two steps counted from 1, such as 20:24")
    return int(first), int(last)


WATCHING = "Watching"  # a group of options in the help


class WorkerRange(NamedTuple):
    """The fewest and the most workers of a run."""

    least: int
    most: int


def worker_range(text: object) -> WorkerRange:
    """A value of --workers: 4, or 2..8."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(text), re.ASCII)
    if match is None or not 0 < int(match[1]) <= int(match[2] or match[1]):
        raise typer.BadParameter(f"{text}: give a number of workers, as 4, or the fewest and the most, as 2..8")
    return WorkerRange(int(match[1]), int(match[2] or match[1]))


def interval(text: str) -> str:
    """A value of --checkpoint-every, unchanged."""
    try:
        parse_interval(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


# Option of every stage, by the field of TrainConfig that takes its value.
OPTIONS: dict[str, Any] = {
    "data": DataPath,
    "store": Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="PATH_OR_URL",
            help="Feature store: a folder, or a URL (s3://, gs://, ...); none with --features online.",
            parser=path_or_url,
        ),
    ],
    "model": ModelPath,
    "output": Annotated[
        Path,
        typer.Option(
            "--output", metavar="FOLDER", help="Folder that the trained model is written to.", parser=output_path
        ),
    ],
    "mix": Annotated[
        list[Weighted] | None,
        typer.Option(
            "--mix",
            metavar="FILE=PASSES",
            help="A further data file, and how often an epoch passes over it (0.5: over a random half); repeatable.",
            parser=weighted_file,
            rich_help_panel=DATA,
        ),
    ],
    "images": ImagesPath,
    "bad_rows": BadRows,
    "fingerprints": Annotated[
        list[NameValue] | None,
        typer.Option(
            "--fingerprint",
            metavar="NAME=FINGERPRINT",
            help="Features of an expert to read where the store has several (`mova store ls`); repeatable.",
            parser=name_value,
            rich_help_panel=DATA,
        ),
    ],
    "learning_rate": Annotated[
        float, typer.Option(help="Peak of the cosine schedule.", min=0, rich_help_panel=TRAINING)
    ],
    "batch_size": Annotated[
        int, typer.Option(help="Samples per step, over all workers.", min=1, rich_help_panel=TRAINING)
    ],
    "epochs": Annotated[
        float,
        typer.Option(
            help="Passes over the data, fractions allowed; at least one step is made.", min=0, rich_help_panel=TRAINING
        ),
    ],
    "loss": Annotated[
        Loss,
        typer.Option(
            help="token: mean over all answer tokens of a batch; sample: mean over samples.", rich_help_panel=TRAINING
        ),
    ],
    "max_length": Annotated[
        int, typer.Option(help="Longest sample, tokens; a longer one loses its end.", min=1, rich_help_panel=TRAINING)
    ],
    "group_by_length": Annotated[
        bool,
        typer.Option(
            "--group-by-length",
            help="Batches of samples of similar length and of one modality, as the paper's sft has; else plain shuffling.",
            rich_help_panel=TRAINING,
        ),
    ],
    "seed": Annotated[
        int, typer.Option(help="Decides the order of the samples and every random choice.", rich_help_panel=TRAINING)
    ],
    "checkpoint_every": Annotated[
        str,
        typer.Option(
            metavar="STEPS|MINUTESm",
            help="Steps between two checkpoints, or minutes: 200, 10m.",
            parser=interval,
            rich_help_panel=RUN,
        ),
    ],
    "export_every": Annotated[
        int,
        typer.Option(
            help="Steps between two models written beside --output, as OUTPUT-step-200; 0: none.",
            min=0,
            rich_help_panel=RUN,
        ),
    ],
    "eval_data": Annotated[
        str | None,
        typer.Option(
            "--eval-data",
            metavar="PATH_OR_URL",
            help="Held-out samples, whose loss is measured while the run trains.",
            parser=path_or_url,
            rich_help_panel=WATCHING,
        ),
    ],
    "eval_every": Annotated[
        int,
        typer.Option(
            help="Steps between two evaluations on --eval-data; 0: one, after the last step.",
            min=0,
            rich_help_panel=WATCHING,
        ),
    ],
    "log": Annotated[
        str,
        typer.Option(
            metavar="TRACKER,...",
            help="Send the lines of metrics.jsonl to tensorboard, wandb or mlflow, too; each needs its package.",
            rich_help_panel=WATCHING,
        ),
    ],
    "profile_steps": Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="Steps to trace with torch.profiler; the traces go to OUTPUT.logs.",
            parser=step_range,
            rich_help_panel=WATCHING,
        ),
    ],
    "best": Annotated[
        bool,
        typer.Option(
            "--best", help="Write the model with the lowest loss on --eval-data, not the last one.", rich_help_panel=RUN
        ),
    ],
    "micro_batch": MicroBatch,
    "strategy": Annotated[
        Literal["auto", "ddp", "fsdp", "zero2", "zero3"],
        typer.Option(
            help="ddp: each worker holds the whole model; fsdp: workers share its parameters and moments; zero2, zero3: DeepSpeed; "
            "auto: ddp where the plan of --gpus fits, else fsdp.",
            rich_help_panel=RUN,
        ),
    ],
    "shard_size": Annotated[
        int,
        typer.Option(
            help="fsdp: workers that share one copy of the model, best those of one node; 0: all.",
            min=0,
            rich_help_panel=RUN,
        ),
    ],
    "precision": Annotated[
        Precision, typer.Option(help="Of the computation; parameters stay float32.", rich_help_panel=RUN)
    ],
    "checkpoint_activations": Annotated[
        bool | None,
        typer.Option(
            "--checkpoint-activations/--no-checkpoint-activations",
            help="Compute activations twice instead of keeping them; default: with --gpu.",
            rich_help_panel=RUN,
        ),
    ],
    "workers": Annotated[
        WorkerRange,
        typer.Option(
            help="Ray Train workers; 2..8: as many of 8 as the cluster has, at least 2.",
            metavar="N|N..N",
            parser=worker_range,
            rich_help_panel=RUN,
        ),
    ],
    "shared_output": Annotated[
        bool,
        typer.Option(
            "--shared-output", help="All nodes of the cluster see the folder of --output.", rich_help_panel=RUN
        ),
    ],
    "gpu": Annotated[bool, typer.Option("--gpu", help="One GPU per worker, else one CPU.", rich_help_panel=RUN)],
    "loader_processes": Annotated[
        int, typer.Option(help="Reading processes per worker; 0: a thread reads ahead.", min=0, rich_help_panel=RUN)
    ],
}
Picture = Annotated[
    Path | None,
    typer.Option(
        "--picture",
        metavar="FILE",
        help="PNG file for loss, gradient norm, learning rate and data wait over the steps; that of an earlier run is replaced.",
        parser=output_path,
        rich_help_panel=WATCHING,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only check the settings, the data and the store, count samples and steps, and with --gpus or --gpu plan the memory; "
        "needs neither Ray nor weights.",
        rich_help_panel=RUN,
    ),
]
PART_OPTIONS: dict[str, Any] = {
    "freeze": Annotated[
        str,
        typer.Option(
            metavar="PART,...",
            help=f"Parts that do not learn: {', '.join(FREEZABLE)}.",
            rich_help_panel=TRAINING,
        ),
    ],
    "part_rates": Annotated[
        list[NameValue] | None,
        typer.Option(
            "--lr-part",
            metavar="PART=RATE",
            help=f"A learning rate of its own for one of {', '.join(PARTS)}; repeatable.",
            parser=name_value,
            rich_help_panel=TRAINING,
        ),
    ],
}
UNLABELLED = Annotated[
    Unlabelled,
    typer.Option(
        help="Samples without a routing label: refuse them, or fuse random (0 to 3 experts by chance) or none.",
        rich_help_panel=TRAINING,
    ),
]
FEATURE_OPTIONS: dict[str, Any] = {
    "unlabelled": UNLABELLED,
    "features": Annotated[
        FeaturesFrom,
        typer.Option(
            help="store: read them; tiered: compute and store what is missing; online: compute all, without a store.",
            rich_help_panel=DATA,
        ),
    ],
    "weights": Weights,
}
SHUFFLE_POOL = Annotated[
    bool,
    typer.Option(
        help="Shuffle, cut and reword the pool in routing prompts (model-pool augmentation).", rich_help_panel=TRAINING
    ),
]
STAGE_OPTIONS: dict[Stage, dict[str, Any]] = {
    "pretrain": FEATURE_OPTIONS | PART_OPTIONS,
    "sft": {
        **FEATURE_OPTIONS,
        **PART_OPTIONS,
        "lora_rank": Annotated[
            int,
            typer.Option(
                help="Train a LoRA of this rank in place of the LLM, and add it to the LLM at the end; 0: train the LLM.",
                min=0,
                rich_help_panel=TRAINING,
            ),
        ],
        "routing_samples": Annotated[
            int,
            typer.Option(
                help="Labelled samples that also teach the LLM itself to route; the paper mixes in 2,000.",
                min=0,
                rich_help_panel=TRAINING,
            ),
        ],
        "shuffle_pool": SHUFFLE_POOL,
    },
    "router": {
        "lora_rank": Annotated[
            int, typer.Option(help="Rank of the expert-routing LoRA.", min=1, rich_help_panel=TRAINING)
        ],
        "shuffle_pool": SHUFFLE_POOL,
    },
}

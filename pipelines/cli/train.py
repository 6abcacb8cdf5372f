"""`mova train STAGE`: one command per stage, made of the fields and defaults of `TrainConfig`."""

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from mova_core.figures import number, percent
from pipelines.cli.curves import curves
from pipelines.cli.help import App
from pipelines.cli.options import (
    DATA,
    RUN,
    TRAINING,
    BadRows,
    DataPath,
    ImagesPath,
    Json,
    ModelPath,
    NameValue,
    Quiet,
    Weights,
    by_expert,
    learning_rate,
    name_value,
    path_or_url,
    weights_location,
)
from pipelines.cli.output import fields, line, print_result, results_only
from pipelines.cli.paths import (
    Overwrite,
    check_output_file,
    check_output_folder,
    drawn_by,
    output_path,
)
from pipelines.cli.recipe import (
    AUTO,
    GpusOption,
    MicroBatch,
    RecipeOption,
    apply_recipe,
    given_options,
    plan_training,
    recipes,
    refuse_too_large,
    show_plan,
)
from pipelines.model_config import read_model_config
from pipelines.train.config import (
    FREEZABLE,
    PARTS,
    STAGES,
    FeaturesFrom,
    Loss,
    Precision,
    Stage,
    TrainConfig,
    Unlabelled,
    parse_interval,
)
from pipelines.train.gpus import Gpus


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

app = App(help="Train one stage on Ray Train workers that read the feature store.")


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


def option_defaults(stage: Stage) -> dict[str, Any]:
    """Option -> default, from `TrainConfig` and the stage; options without an entry are required."""
    plain = {
        field.name: field.default
        for field in dataclasses.fields(TrainConfig)
        if field.default is not dataclasses.MISSING
    }
    own = {
        "learning_rate": STAGES[stage].learning_rate,
        "batch_size": STAGES[stage].batch_size,
        "lora_rank": STAGES[stage].lora_rank,
        "fingerprints": None,
        "mix": None,
        "store": None,
        "weights": None,
        "log": "",
        "freeze": "",
        "part_rates": None,
    }
    return plain | own


def _parameters(stage: Stage) -> list[inspect.Parameter]:
    defaults = option_defaults(stage) | {
        "picture": None,
        "recipe": None,
        "gpus": None,
        "dry_run": False,
        "overwrite": False,
        "quiet": False,
        "as_json": False,
    }
    options = (
        OPTIONS
        | STAGE_OPTIONS.get(stage, {})
        | {"picture": Picture, "recipe": RecipeOption, "gpus": GpusOption, "dry_run": DryRun}
        | {"overwrite": Overwrite, "quiet": Quiet, "as_json": Json}
    )
    return [
        inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        *(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=option,
                default=defaults.get(name, inspect.Parameter.empty),
            )
            for name, option in options.items()
        ),
    ]


def _add_command(stage: Stage) -> None:
    def command(
        context: typer.Context,
        picture: Path | None,
        recipe: str | None,
        gpus: Gpus | None,
        dry_run: bool,
        overwrite: bool,
        quiet: bool,
        as_json: bool,
        **settings: Any,
    ) -> None:
        with results_only(quiet or as_json, resumes=True):
            given = given_options(context)
            auto = settings["micro_batch"] == AUTO or (recipe is not None and "micro_batch" not in given)
            settings["micro_batch"] = max(settings["micro_batch"], 0)
            auto_strategy = settings["strategy"] == "auto"
            settings["strategy"] = "ddp" if auto_strategy else settings["strategy"]
            config = apply_recipe(train_config(stage, settings), recipe, gpus, given)
            check_output_folder("--output", settings["output"], overwrite, config.inputs)

            from pipelines.train.curves import SOFTWARE
            from pipelines.train.data import check_data

            if not dry_run:
                check_output_file("--picture", picture, overwrite, drawn_by(SOFTWARE))
            data = check_data(config)  # before torch and Ray, which take 10 to 30 s to start
            model = read_model_config(settings["model"])
            data.config, plan = plan_training(data.config, model, gpus, recipe, auto, auto_strategy)
            if dry_run:
                result = _counts(data) | {"plan": plan}
            else:
                from cluster.session import ray_session
                from pipelines.train.answers import check_answers
                from pipelines.train.run import train

                refuse_too_large(data.config, model, plan)
                check_answers(data)
                with ray_session():
                    result = train(config, progress=not (quiet or as_json), data=data, picture=picture)
        print_result(result, as_json, lambda: show_training(result))

    command.__signature__ = inspect.Signature(_parameters(stage))  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters(stage)}
    app.command(stage, help=STAGES[stage].summary)(command)


def _counts(data: Any) -> dict[str, Any]:
    """What a run would train on."""
    from pipelines.train.data import total_steps

    return {
        "stage": data.config.stage,
        "samples": len(data.rows),
        "skipped": data.skipped,
        "left_out": data.counts(),
        "output": data.config.output,
        "steps": total_steps(data.config, len(data.rows)),
    }


def train_config(stage: Stage, settings: dict[str, Any]) -> TrainConfig:
    """The settings of a run from the values of its options, with absolute paths.

    Raises:
        typer.BadParameter: --fingerprint names no expert of the model; --freeze or --lr-part no part of it.
    """
    experts = [expert["name"] for expert in read_model_config(settings["model"]).get("pool", [])]
    fingerprints = by_expert("--fingerprint", settings["fingerprints"], experts, str)
    values: dict[str, Any] = {name: str(settings[name] or "") for name in ("model", "output", "store")}
    values |= {
        "fingerprints": fingerprints,
        "weights": by_expert("--weights", settings.get("weights"), experts, weights_location),
        "mix": {file.path: file.passes for file in settings["mix"] or ()},
        "workers": settings["workers"].most,
        "min_workers": settings["workers"].least if settings["workers"].least < settings["workers"].most else 0,
        "log": tuple(name.strip() for name in settings["log"].split(",") if name.strip()),
    }
    if "freeze" in settings:
        values["freeze"] = tuple(part.strip() for part in settings["freeze"].split(",") if part.strip())
        if unknown := [part for part in values["freeze"] if part not in FREEZABLE]:
            raise typer.BadParameter(f"--freeze {unknown[0]}: the parts are {', '.join(FREEZABLE)}")
        values["part_rates"] = by_expert("--lr-part", settings["part_rates"], tuple(PARTS), learning_rate)
    return TrainConfig(stage=stage, **settings | values)


def show_training(result: dict[str, Any]) -> None:
    """What a training did, for people."""
    if "seconds" not in result:
        line(f"{result['stage']} can start; nothing was trained")
        fields((name, result[name]) for name in ("samples", "steps", "output"))
        _show_left_out(result)
        if result["plan"] is not None:
            show_plan(result["plan"])
        return
    line(f"{result['stage']} finished")
    steps = number(result.get("steps"))
    if result.get("resumed_from"):
        steps += f", resumed from step {number(result['resumed_from'])}"
    rows = {
        "samples": result["samples"],
        "steps": steps,
        "loss": f"{number(result.get('loss'))} nats per token over the last steps",
        "time": f"{number(result['seconds'])} s",
        "speed": f"{number(result['tokens_per_second'])} tokens/s, {percent(result['data_wait'], 1)} of the time waiting for data",
        "output": result["output"],
    }
    if result.get("failed"):
        rows["samples that could not be used"] = len(result["failed"])
    if result["eval_loss"] is not None:
        rows["loss of held-out samples"] = f"{number(result['eval_loss'])} nats per token"
    if result["mfu"] is not None:
        rows["MFU"] = percent(result["mfu"], 1)
    if result["skipped_steps"]:
        rows["steps skipped, as loss or gradient was no finite number"] = result["skipped_steps"]
    if result.get("cut_off"):
        rows["answers cut off whole by --max-length"] = result["cut_off"]
    fields(rows.items())
    _show_left_out(result)


def _show_left_out(result: dict[str, Any]) -> None:
    fields((f"left out, {reason}", count) for reason, count in result["left_out"].items())
    if result["skipped"]:
        fields([("invalid records left out", len(result["skipped"]))])


for _stage in STAGES:
    _add_command(_stage)
app.command()(curves)
app.command("recipe")(recipes)

"""`mova train recipe`, and what --recipe, --gpus, --micro-batch auto and --dry-run plan before a training starts."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from mova_core.figures import number
from pipelines.cli.options import RUN, Json, Quiet
from pipelines.cli.output import fields, line, print_result, results_only, table
from pipelines.train.config import TrainConfig
from pipelines.train.gpus import Gpus, find_gpus, parse_gpus
from pipelines.train.recipes import RECIPES, Recipe

AUTO = -1  # what `micro_batch` returns for "auto"
ROWS = {  # key of `gigabytes` in a plan -> what it is
    "weights": "weights and buffers",
    "gradients": "gradients",
    "moments": "AdamW's moments",
    "experts": "vision experts",
    "transient": "gathered, cast or in buckets",
    "activations": "activations",
    "logits": "logits",
    "optimizer": "optimizer's step, after the activations",
    "total": "peak, with 3 GB + 5 % for CUDA",
}


def gpus_option(text: str) -> Gpus:
    try:
        return parse_gpus(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def micro_batch(text: str) -> int:
    """Parses a number of samples, or auto."""
    if str(text) == "auto":
        return AUTO
    try:
        samples = int(text)
    except ValueError:
        samples = -1
    if samples < 0:
        raise typer.BadParameter(f"{text!r} is no number of samples: give 0, a larger number or auto")
    return samples


def recipe_name(text: str) -> str:
    if text not in RECIPES:
        raise typer.BadParameter(f"no recipe {text}: there are {', '.join(RECIPES)}")
    return text


GpusOption = Annotated[
    Gpus | None,
    typer.Option(
        "--gpus",
        metavar="COUNTxNAME-MEMORY",
        help="Plan for such GPUs, e.g. 8xA100-80G, and train on as many; default: those found, with --gpu.",
        parser=gpus_option,
        rich_help_panel=RUN,
    ),
]
MicroBatch = Annotated[
    int,
    typer.Option(
        "--micro-batch",
        metavar="N|auto",
        help="Samples that a worker computes at once; 0: its whole share of a batch; auto: as many as the GPUs hold.",
        parser=micro_batch,
        rich_help_panel=RUN,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Settings of a recipe (`mova train recipe`); options given beside it win.",
        parser=recipe_name,
        rich_help_panel=RUN,
    ),
]


def given_options(context: typer.Context) -> set[str]:
    """Names of the options that do not have their default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def apply_recipe(config: TrainConfig, name: str | None, gpus: Gpus | None, given: set[str]) -> TrainConfig:
    """The settings with those of the recipe, and the workers of --gpus; options in `given` stay.

    Raises:
        typer.BadParameter: the recipe is of another stage; --workers and --gpus differ.
    """
    changes: dict[str, Any] = {}
    if name is not None:
        recipe = RECIPES[name]()
        if recipe.stage != config.stage:
            raise typer.BadParameter(f"--recipe {name} is of `mova train {recipe.stage}`")
        changes = recipe.values() | {"workers": parse_gpus(recipe.gpus.value).count}
    if gpus is not None:
        if "workers" in given and config.workers != gpus.count:
            raise typer.BadParameter(f"--workers {config.workers} and --gpus with {gpus.count} GPUs: give one of them")
        changes = {"checkpoint_activations": True} | changes | {"workers": gpus.count, "gpu": True}
    return replace(config, **{key: value for key, value in changes.items() if key not in given})


def plan_training(
    config: TrainConfig,
    model: dict[str, Any],
    gpus: Gpus | None,
    recipe: str | None,
    auto: bool,
    auto_strategy: bool = False,
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The settings with the micro-batch that fits, and the plan of the memory; None without GPUs and for DeepSpeed.

    Args:
        model: config.json of the model.
        gpus: of --gpus; else those of this machine, else of the recipe.
        recipe: name.
        auto: choose the micro-batch.
        auto_strategy: take "fsdp" instead of the config's "ddp" where "ddp" does not fit.

    Raises:
        typer.BadParameter: `auto` without GPUs or with DeepSpeed.
    """
    if config.stage == "light-router":  # two small matrices learn
        return config, None
    if config.strategy.startswith("zero"):  # DeepSpeed's buffers are not in the plan
        if auto:
            raise typer.BadParameter(f"--micro-batch auto plans ddp and fsdp: give a number with {config.strategy}")
        return config, None
    if gpus is None and config.gpu:
        gpus = find_gpus() or (parse_gpus(RECIPES[recipe]().gpus.value) if recipe else None)
    if gpus is None:
        if auto:
            raise typer.BadParameter("--micro-batch auto needs the memory of the GPUs: give --gpus 8xA100-80G")
        return config, None
    from mova_core.config import MoVAConfig
    from pipelines.train.memory import plan_run

    shapes = MoVAConfig.from_dict(model)
    fewest = replace(config, workers=config.min_workers or config.workers, min_workers=0)  # each of them holds most
    plan = plan_run(fewest, shapes, gpus, auto)
    if auto_strategy and not plan["fits"] and config.workers > 1:
        config = replace(config, strategy="fsdp")
        plan = plan_run(replace(fewest, strategy="fsdp"), shapes, gpus, auto)
    return replace(config, micro_batch=plan["micro_batch"] if auto else config.micro_batch), plan


def refuse_too_large(config: TrainConfig, model: dict[str, Any], plan: dict[str, Any] | None) -> None:
    """Refuses a run that its plan says cannot fit.

    Raises:
        DataError: with the two changes that cost least.
    """
    if plan is None or plan["fits"]:
        return
    from mova_core.config import MoVAConfig
    from mova_core.data import DataError
    from pipelines.train.memory import refusal

    raise DataError(refusal(config, MoVAConfig.from_dict(model), plan))


def show_plan(plan: dict[str, Any]) -> None:
    """The memory of a run, for people."""
    parts = [
        (name, part["parameters"] / 1e6, part["trained"] / 1e6)
        for name, part in plan["parts"].items()
        if part["parameters"]
    ]
    table("parameters, millions", ("part", "all", "trained"), parts)
    print()
    gigabytes = plan["gigabytes"]
    rows = [(text, round(gigabytes[key], 1)) for key, text in ROWS.items() if gigabytes[key]]
    gpus = plan["gpus"]
    table(f"{Gpus(**gpus)}, each:", ("", "GB"), rows)
    sample = plan["gigabytes_per_sample"]
    pairs = {
        "strategy": f"{plan['strategy']}, {plan['precision']}",
        "micro-batch": f"{plan['micro_batch']}, {plan['micro_batches']} a step; the largest that fits is {plan['largest_micro_batch']}",
        "GB a sample": f"activations {sample['activations']:.2f} (without checkpointing {sample['activations_unchecked']:.1f}), "
        f"logits {sample['logits']:.2f}",
        "fits": plan["fits"],
    }
    fields(pairs.items())


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A recipe; without a name all are listed.", parser=recipe_name),
    ] = None,
    gpus: Annotated[
        Gpus | None,
        typer.Option(
            "--gpus",
            metavar="COUNTxNAME-MEMORY",
            help="Plan its memory for these GPUs, e.g. 8xA100-80G; default: the recipe's.",
            parser=gpus_option,
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print a recipe: settings with their source, and the memory that it needs; without a name, list all."""
    if name is None:
        rows = [_row(name, make()) for name, make in RECIPES.items()]
        print_result(rows, as_json, lambda: _show_list(rows))
        return
    with results_only(quiet or as_json):
        result = describe(name, gpus)
    print_result(result, as_json, lambda: _show_recipe(result))


def _row(name: str, recipe: Recipe) -> dict[str, Any]:
    return {"recipe": name, "stage": recipe.stage, "gpus": recipe.gpus.value, "summary": recipe.summary}


def describe(name: str, gpus: Gpus | None = None) -> dict[str, Any]:
    """A recipe and its plan for its own GPUs or for others."""
    from pipelines.train.data import total_steps
    from pipelines.train.memory import full_size, plan_run

    recipe = RECIPES[name]()
    planned = gpus or parse_gpus(recipe.gpus.value)
    places: dict[str, Any] = dict.fromkeys(("model", "data", "store", "output"), "")
    config = TrainConfig(stage=recipe.stage, **places, **recipe.values() | {"workers": planned.count})
    settings = {**recipe.settings, "gpus": recipe.gpus}
    return _row(name, recipe) | {
        "samples": recipe.samples,
        "steps": total_steps(config, recipe.samples),
        "settings": {key: {"value": _plain(value), "source": source} for key, (value, source) in settings.items()},
        "plan": plan_run(config, full_size(recipe.llm), planned, auto=True),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _show_list(rows: list[dict[str, Any]]) -> None:
    table("recipes", ("recipe", "GPUs", "what"), [(row["recipe"], row["gpus"], row["summary"]) for row in rows])
    line("`mova train recipe NAME` prints one; `mova train STAGE --recipe NAME` trains with it.")


def _show_recipe(result: dict[str, Any]) -> None:
    line(f"{result['recipe']}: {result['summary']}; {number(result['steps'])} steps")
    print()
    settings = [(key, _text(setting["value"]), setting["source"]) for key, setting in result["settings"].items()]
    table("settings", ("setting", "value", "source"), settings)
    print()
    show_plan(result["plan"])


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={rate:g}" for key, rate in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)

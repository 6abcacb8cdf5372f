"""`mova train STAGE`: one command per stage, made of the fields and defaults of `TrainConfig`."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import typer

from mova_core.figures import number, percent
from pipelines.cli.curves import curves
from pipelines.cli.help import App
from pipelines.cli.options import (
    Json,
    Quiet,
    by_expert,
    learning_rate,
    weights_location,
)
from pipelines.cli.output import fields, line, print_result, results_only
from pipelines.cli.paths import (
    Overwrite,
    check_output_file,
    check_output_folder,
    drawn_by,
)
from pipelines.cli.recipe import (
    AUTO,
    GpusOption,
    RecipeOption,
    apply_recipe,
    given_options,
    plan_training,
    recipes,
    refuse_too_large,
    show_plan,
)
from pipelines.cli.train_options import OPTIONS, STAGE_OPTIONS, DryRun, Picture
from pipelines.model_config import read_model_config
from pipelines.train.config import (
    FREEZABLE,
    PARTS,
    STAGES,
    Stage,
    TrainConfig,
)
from pipelines.train.gpus import Gpus

app = App(help="Train one stage on Ray Train workers that read the feature store.")


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

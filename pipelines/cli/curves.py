"""`mova train curves`: what the lines of `metrics.jsonl` say of trainings, in numbers and in a picture."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mova_core.figures import percent
from pipelines.cli.options import Json, Quiet
from pipelines.cli.output import print_result, results_only, table
from pipelines.cli.paths import Overwrite, check_output_file, drawn_by, output_path


def curves(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...", help="The --output of each training; it may still be going on.", parser=output_path
        ),
    ],
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PNG file for loss, gradient norm, learning rate and data wait over the steps, the trainings laid on each "
            "other.",
            parser=output_path,
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare trainings step by step: their last lines, and their curves in one picture."""
    with results_only(quiet or as_json):
        from pipelines.train.curves import SOFTWARE, difference, draw_curves
        from pipelines.train.metrics import find_metrics, read_metrics, summary

        check_output_file("--picture", picture, overwrite, drawn_by(SOFTWARE))
        try:
            runs = {str(folder): read_metrics(find_metrics(folder)) for folder in folders}
        except FileNotFoundError as error:
            raise typer.BadParameter(str(error)) from None
        if empty := [name for name, lines in runs.items() if not lines]:
            raise typer.BadParameter(f"{empty[0]} has made no step yet")
        if picture is not None:
            draw_curves(short_names(runs), picture)
        first = next(iter(runs.values()))
        rows = [
            {
                "folder": name,
                "steps": lines[-1]["step"],
                "loss": lines[-1]["loss"],
                "difference": None if lines is first else difference(first, lines),
                **summary(lines),
            }
            for name, lines in runs.items()
        ]
    print_result(rows, as_json, lambda: show_curves(rows))


def short_names(runs: dict[str, Any]) -> dict[str, Any]:
    """The runs by the last part of their folders' paths, where these differ."""
    names = [Path(name).name for name in runs]
    return dict(zip(names, runs.values(), strict=True)) if len(set(names)) == len(names) else runs


def show_curves(rows: list[dict[str, Any]]) -> None:
    """A line per training, for people."""
    table(
        "loss: of the last step; difference: the largest one of a step's loss from that of the first training",
        ["training", "steps", "loss", "difference", "held out", "tokens/s", "data wait", "skipped"],
        [
            [
                Path(row["folder"]).name,
                row["steps"],
                row["loss"],
                None if row["difference"] is None else f"{row['difference']:.1e}",
                row["eval_loss"],
                row["tokens_per_second"],
                percent(row["data_wait"], 1),
                row["skipped_steps"],
            ]
            for row in rows
        ],
        drop=["skipped", "data wait", "tokens/s"],
    )

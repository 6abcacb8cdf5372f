"""`mova evaluate`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import BadRow, DataPath, Gpu, ImagesPath, Json, ModelPath, Quiet, StorePath
from pipelines.cli.output import emit, results_only, table


def evaluate(
    model: ModelPath,
    data: DataPath,
    store: StorePath,
    images: ImagesPath = None,
    bad_rows: BadRow = "raise",
    train: Annotated[Path | None, typer.Option(help="Training file; gives the chance level.")] = None,
    answers: Annotated[Path | None, typer.Option(help="JSON file every single answer is written to.")] = None,
    actors: Annotated[int, typer.Option(help="Answer servers.", min=1)] = 1,
    gpu: Gpu = 0.0,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1)] = 16,
    limit: Annotated[int | None, typer.Option(help="First questions only.", min=1)] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer a test set and compare with its truths, per kind of picture."""
    with results_only():
        from cluster.session import ray_session
        from pipelines.evaluate.run import evaluate as run

        with ray_session():
            result = run(
                str(model.resolve()),
                str(data),
                str(store),
                images=images,
                bad_rows=bad_rows,
                train=None if train is None else str(train),
                limit=limit,
                actors=actors,
                gpu=gpu,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=not quiet,
            )
        if answers is not None:
            answers.write_text(json.dumps(result["answers"], indent=1))
    emit({name: result[name] for name in ("kinds", "skipped")}, as_json, lambda: show_kinds(result["kinds"]))


def show_kinds(kinds: dict[str, dict[str, Any]]) -> None:
    """Accuracy per kind of picture, for people."""
    table(
        "accuracy by kind of picture (chance: the most frequent training answer of the same form of question)",
        ["kind", "questions", "accuracy", "chance", "experts picked (times)"],
        [
            [
                kind,
                row["questions"],
                f"{100 * row['accuracy']:.1f} %",
                "" if row["chance"] is None else f"{100 * row['chance']:.1f} %",
                ", ".join(f"{name} {count}" for name, count in row["experts"].items()) or "none",
            ]
            for kind, row in kinds.items()
        ],
    )

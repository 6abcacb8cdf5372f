"""`mova evaluate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mova_core.figures import number, percent
from pipelines.cli.options import (
    DATA,
    OUTPUT,
    RUN,
    BadRows,
    DataPath,
    Gpu,
    ImagesPath,
    Json,
    ModelPath,
    Quiet,
    StorePath,
)
from pipelines.cli.output import line, print_result, results_only, table
from pipelines.cli.paths import Overwrite, check_output_file, output_path, path_or_url


def evaluate(
    model: ModelPath,
    data: DataPath,
    store: StorePath,
    images: ImagesPath = None,
    bad_rows: BadRows = "raise",
    train: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_URL",
            help="Training records; they give the baseline: always the most frequent training answer.",
            parser=path_or_url,
            rich_help_panel=DATA,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First questions only.", min=1, rich_help_panel=DATA)] = None,
    actors: Annotated[int, typer.Option(help="Answer servers.", min=1, rich_help_panel=RUN)] = 1,
    gpu: Gpu = 0.0,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.", min=1, rich_help_panel=RUN)] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1, rich_help_panel=RUN)] = 16,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON file that every single answer is written to.",
            parser=output_path,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer the questions of a test set and compare the answers with the true ones, per kind of picture.

    Each human turn is a question, asked with the turns before it. The kind of a picture is the record's field `kind`.
    """
    check_output_file("--answers", answers, overwrite)
    with results_only(quiet or as_json):
        from pipelines.data_args import DataArgs
        from pipelines.evaluate.data import check_data

        args = DataArgs(model=str(model), data=data, store=store, images=images, bad_rows=bad_rows)
        read = check_data(args, train)  # before torch and Ray, which take 10 to 30 s to start

        from cluster.session import ray_session
        from pipelines.evaluate.run import evaluate as evaluate_records

        with ray_session():
            result = evaluate_records(
                str(model),
                data,
                store,
                images=images,
                bad_rows=bad_rows,
                train=train,
                limit=limit,
                actors=actors,
                gpu=gpu,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=not (quiet or as_json),
                read=read,
            )
        if answers is not None:
            from mova_core.io import strict_json
            from mova_core.io.atomic import write_atomic

            write_atomic(answers, strict_json.dumps(result["answers"], indent=1))

    def show() -> None:
        show_kinds(result["kinds"])
        if result["unreadable"]:
            replies = f"{number(result['unreadable'])} of {number(len(result['answers']))} router replies"
            line(f"{replies} could not be read, so no expert was used for these questions")
        if result["left_out"]:
            line(f"left out: {', '.join(f'{reason} {number(count)}' for reason, count in result['left_out'].items())}")

    print_result({name: value for name, value in result.items() if name != "answers"}, as_json, show)


def show_kinds(kinds: dict[str, dict[str, Any]]) -> None:
    """Accuracy per kind of picture, for people."""
    table(
        "accuracy by kind of picture (baseline: always the most frequent training answer)",
        ["kind", "questions", "accuracy", "baseline", "experts picked (times)"],
        [
            [
                kind,
                row["questions"],
                percent(row["accuracy"], 1),
                percent(row["chance"], 1),
                ", ".join(f"{name} {count}" for name, count in row["experts"].items()) or "none",
            ]
            for kind, row in kinds.items()
        ],
        drop=["experts picked (times)"],
    )

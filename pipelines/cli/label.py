"""`mova label`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mova_core.figures import number
from pipelines.cli.options import (
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
from pipelines.cli.paths import Overwrite, check_output_file, output_path


def label(
    model: ModelPath,
    data: DataPath,
    store: StorePath,
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="FILE", help="JSON file with the records and their routing.", parser=output_path
        ),
    ],
    images: ImagesPath = None,
    bad_rows: BadRows = "raise",
    actors: Annotated[int, typer.Option(help="Actors that measure losses.", min=1, rich_help_panel=RUN)] = 1,
    gpu: Gpu = 0.0,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1, rich_help_panel=RUN)] = 32,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Label each sample with the experts that help: those that lower the LM loss below the loss without, at most 3."""
    check_output_file("--output", output, overwrite)
    with results_only(quiet or as_json):
        from pipelines.data_args import DataArgs
        from pipelines.read_data import check_label_data

        args = DataArgs(model=str(model), data=data, store=store, images=images, bad_rows=bad_rows)
        read = check_label_data(args, str(output))  # before torch and Ray, which take 10 to 30 s to start

        from dataclasses import asdict

        from cluster.session import ray_session
        from pipelines.label import label as label_samples

        with ray_session():
            done = label_samples(
                str(model),
                data,
                store,
                str(output),
                images=images,
                bad_rows=bad_rows,
                actors=actors,
                gpu=gpu,
                batch_size=batch_size,
                progress=not (quiet or as_json),
                read=read,
            )

    print_result(asdict(done), as_json, lambda: show_labels(done))


def show_labels(done: Any) -> None:
    """A `LabelSummary`, for people."""
    table(
        f"{number(done.samples)} samples, {number(done.per_sample)} experts each: {done.output}",
        ["expert", "samples it helps"],
        [[name, count] for name, count in done.experts.items()],
    )
    if done.unlabelled:
        line(f"{number(done.unlabelled)} records without a label")

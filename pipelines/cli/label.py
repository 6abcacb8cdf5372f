"""`mova label`."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import BadRow, DataPath, Gpu, ImagesPath, Json, ModelPath, Quiet, StorePath
from pipelines.cli.output import emit, results_only, table


def label(
    model: ModelPath,
    data: DataPath,
    store: StorePath,
    output: Annotated[Path, typer.Option("--output", help="JSON file with the records and their routing.")],
    images: ImagesPath = None,
    bad_rows: BadRow = "raise",
    actors: Annotated[int, typer.Option(help="Actors that measure losses.", min=1)] = 1,
    gpu: Gpu = 0.0,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 32,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Label which experts help which sample: those whose LM loss is below the loss without, at most 3."""
    with results_only():
        from dataclasses import asdict

        from cluster.session import ray_session
        from pipelines.label import label as run

        with ray_session():
            done = run(
                str(model.resolve()),
                str(data),
                str(store),
                str(output),
                images=images,
                bad_rows=bad_rows,
                actors=actors,
                gpu=gpu,
                batch_size=batch_size,
                progress=not quiet,
            )
    emit(
        asdict(done),
        as_json,
        lambda: table(
            f"{done.samples} samples, {done.per_sample:.2f} experts each: {output}",
            ["expert", "samples it helps"],
            [[name, count] for name, count in done.experts.items()],
        ),
    )

"""`mova profile`."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import (
    Dtype,
    Experts,
    Gpu,
    Imports,
    Json,
    Quiet,
    Size,
    Weights,
    expert_names_of,
    import_modules,
    weights_of,
)
from pipelines.cli.output import emit, results_only, rounded, table


def profile(
    output: Annotated[
        Path, typer.Option("--output", help="JSON file; what it holds of other experts and devices stays.")
    ],
    experts: Experts = None,
    gpu: Gpu = 0.0,
    cpu: Annotated[
        float | None,
        typer.Option("--cpu", help="CPUs per actor; 1, or 0.25 beside a GPU, where it is not given.", min=0),
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option("--accelerator", help="Kind of GPU, as Ray names it, e.g. A100.")
    ] = None,
    weights: Weights = [],  # noqa: B006
    size: Size = "full",
    dtype: Dtype = "float32",
    seconds: Annotated[float, typer.Option(help="Time to spend on each expert, seconds, about.", min=0)] = 60.0,
    imports: Imports = [],  # noqa: B006
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure each expert's images/s and memory at batch sizes 1, 2, 4, ... on one kind of device, for --profile."""
    with results_only():
        from dataclasses import asdict

        from cluster.pools import PoolSpec
        from cluster.session import ray_session
        from pipelines.profile import profile as run

        import_modules(imports)
        names = expert_names_of(experts)
        given = weights_of(weights, names)
        place = PoolSpec(expert="profile", cpu=cpu, gpu=gpu, accelerator=accelerator)
        with ray_session():
            measured = run(
                names,
                output,
                place=place,
                weights=given,
                size=size,
                dtype=dtype,
                seconds=seconds,
                progress=not quiet,
            )

    def show() -> None:
        table(
            f"{measured[0].device}, {dtype}, size {size}; chosen: the smallest batch nearly as fast as any",
            ["expert", "batch", "images/s", "peak MiB", ""],
            [
                [
                    row.expert,
                    one.batch,
                    rounded(one.images_per_second),
                    None if one.peak_bytes is None else round(one.peak_bytes / 2**20),
                    "chosen" if one == row.best() else "",
                ]
                for row in measured
                for one in row.batches
            ],
        )

    emit([asdict(row) for row in measured], as_json, show)

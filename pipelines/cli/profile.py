"""`mova profile`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import (
    RUN,
    Experts,
    Gpu,
    Imports,
    Json,
    OptionalDtype,
    OptionalSize,
    PoolOfModel,
    Quiet,
    Weights,
    by_expert,
    expert_settings,
    import_modules,
    weights_location,
)
from pipelines.cli.output import print_result, results_only, table
from pipelines.cli.paths import check_output_file, output_path


def profile(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            metavar="FILE",
            help="JSON file; profiles of other experts, dtypes and devices in it stay.",
            parser=output_path,
        ),
    ],
    model: PoolOfModel = None,
    experts: Experts = None,
    weights: Weights = None,
    size: OptionalSize = None,
    dtype: OptionalDtype = None,
    imports: Imports = None,
    gpu: Gpu = 0.0,
    cpu: Annotated[
        float | None,
        typer.Option("--cpu", help="CPUs per actor (default: 1, or 0.25 beside a GPU).", min=0, rich_help_panel=RUN),
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option("--accelerator", help="Type of GPU, by Ray's name, e.g. A100.", rich_help_panel=RUN),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Time to spend on each expert, seconds, about.", min=0, rich_help_panel=RUN)
    ] = 60.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure each expert's images/s and memory at batch sizes 1, 2, 4, ... on one kind of device, for --profile."""
    with results_only(quiet or as_json):
        from dataclasses import asdict

        from cluster.pools import PoolSpec
        from cluster.session import ray_session
        from pipelines.profile import profile as measure_experts

        check_output_file("--output", output, overwrite=True)  # profiles are added to those in the file
        import_modules(imports)
        chosen = expert_settings(model, experts, size, dtype)
        weights_by_expert = by_expert("--weights", weights, chosen.names, weights_location)
        place = PoolSpec(expert="profile", cpu=cpu, gpu=gpu, accelerator=accelerator)
        with ray_session():
            measured = measure_experts(
                chosen.names,
                output,
                place=place,
                weights=weights_by_expert,
                size=chosen.size,
                dtype=chosen.dtype,
                seconds=seconds,
                progress=not (quiet or as_json),
            )

    print_result([asdict(row) for row in measured], as_json, lambda: show_profiles(measured, chosen.size))


def show_profiles(measured: Sequence[Any], size: str) -> None:
    """The batches of each `Profile`, for people."""
    table(
        f"{measured[0].device}, {measured[0].dtype}, size {size}; chosen: the smallest batch nearly as fast as any",
        ["expert", "batch", "images/s", "peak MiB", ""],
        [
            [
                row.expert,
                batch.batch,
                batch.images_per_second,
                None if batch.peak_bytes is None else batch.peak_bytes / 2**20,
                "chosen" if batch == row.best() else "",
            ]
            for row in measured
            for batch in row.batches
        ],
    )

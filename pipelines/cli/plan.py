"""`mova plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import (
    EXPERTS,
    OUTPUT,
    RUN,
    Experts,
    Imports,
    Json,
    NameValue,
    OptionalDtype,
    OptionalSize,
    PoolOfModel,
    Quiet,
    ShardMb,
    by_expert,
    expert_settings,
    import_modules,
    name_value,
    positive_count,
)
from pipelines.cli.output import line, print_result, results_only, table
from pipelines.cli.paths import Overwrite, check_output_file, input_file, output_path

SIMULATION = "Simulation"


def plan(
    profile: Annotated[
        Path,
        typer.Option(
            "--profile",
            metavar="FILE",
            help="File of `mova profile`, with every kind of device; or written by hand (docs/json.md).",
            parser=input_file,
        ),
    ],
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster",
            metavar="FILE",
            help="YAML file of machines that need not exist (docs/placement.md); default: the running cluster's.",
            parser=input_file,
            rich_help_panel=RUN,
        ),
    ] = None,
    decode: Annotated[
        float | None,
        typer.Option(
            help="Pictures/s that one core decodes and prepares (default: decoding is not counted).",
            min=0.1,
            rich_help_panel=RUN,
        ),
    ] = None,
    model: PoolOfModel = None,
    experts: Experts = None,
    size: OptionalSize = None,
    dtype: OptionalDtype = None,
    images: Annotated[
        int, typer.Option("--images", help="Pictures, each through every expert.", min=1, rich_help_panel=EXPERTS)
    ] = 1_000_000,
    wanted: Annotated[
        list[NameValue] | None,
        typer.Option(
            "--wanted",
            metavar="NAME=FEATURES",
            help="Features of an expert to compute, in place of --images; repeatable.",
            parser=name_value,
            rich_help_panel=EXPERTS,
        ),
    ] = None,
    imports: Imports = None,
    shard_mb: ShardMb = 128.0,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="Run the plan by discrete events, without a GPU.", rich_help_panel=SIMULATION),
    ] = False,
    mtbf_hours: Annotated[
        float | None,
        typer.Option(help="Mean time between failures of one machine, hours.", min=0.01, rich_help_panel=SIMULATION),
    ] = None,
    node_mb_s: Annotated[
        float | None,
        typer.Option(help="Write rate of one machine, MiB/s.", min=0.1, rich_help_panel=SIMULATION),
    ] = None,
    store_mb_s: Annotated[
        float | None,
        typer.Option(help="Write rate of the store in all, MiB/s.", min=0.1, rich_help_panel=SIMULATION),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="YAML file that the pools go to.",
            parser=output_path,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Choose device types, GPU shares, batches and pool sizes from profiles; predict images/s and the bottleneck."""
    silent = quiet or as_json
    check_output_file("--output", output, overwrite)
    with results_only(silent):
        from dataclasses import asdict

        from cluster.nodes import PlanError, read_cluster, running_nodes
        from cluster.placement import plan_placement
        from cluster.pools import write_pools
        from cluster.session import ray_session
        from cluster.simulator import Conditions
        from cluster.simulator import simulate as simulate_plan
        from mova_core.experts import expert_card
        from mova_core.experts.cost import feature_bytes, read_profiles
        from pipelines.progress_bar import progress_bar

        import_modules(imports)
        settings = expert_settings(model, experts, size, dtype)
        counts = dict.fromkeys(settings.names, images)
        if wanted:
            counts = by_expert("--wanted", wanted, settings.names, positive_count)
        measured = [
            row
            for row in read_profiles(profile)
            if row.expert in counts and row.is_of(expert_card(row.expert), settings.size, settings.dtype)
        ]
        if not measured:
            raise PlanError(
                f"{profile} holds none of {', '.join(counts)} at size {settings.size} in {settings.dtype}: "
                "see --size, --dtype, --model"
            )
        bytes_each = {name: feature_bytes(name, settings.size, settings.dtype) for name in counts}
        shard_rows = {name: max(1, int(shard_mb * 2**20 / size)) for name, size in bytes_each.items()}
        if cluster is not None:
            nodes = read_cluster(cluster)
        else:
            with ray_session():
                nodes = running_nodes()
        placed = plan_placement(counts, measured, nodes, decode, shard_rows)
        if output is not None:
            write_pools(output, placed.pools)
        simulated = None
        if simulate:
            with progress_bar(sum(placed.wanted.values()), "simulate", "features", not silent) as bar:
                conditions = Conditions(
                    shard_rows=shard_rows,
                    feature_bytes=bytes_each,
                    decode=decode,
                    node_bytes_per_second=node_mb_s and node_mb_s * 2**20,
                    store_bytes_per_second=store_mb_s and store_mb_s * 2**20,
                    mtbf_hours=mtbf_hours,
                )
                simulated = simulate_plan(placed.pools, placed.wanted, measured, nodes, conditions, bar.update)

    result: dict[str, Any] = asdict(placed) | {
        "in_turn": placed.sequential,
        "seconds": placed.seconds,
        "rates": placed.rates,
        "bottleneck": placed.bottleneck,
    }
    print_result(result | {"simulated": simulated and asdict(simulated)}, as_json, lambda: show_plan(placed, simulated))


def show_plan(placed: Any, simulated: Any) -> None:
    """A `Placement` and what its simulation, if there was one, says about it, for people."""
    table(
        f"{len(placed.pools)} pools; GPUs and CPUs per actor, batch in pictures",
        ["expert", "actors", "device", "GPU", "CPU", "batch", "images/s", "wanted"],
        [
            [
                pool.expert,
                pool.max_size,
                pool.accelerator or "CPU",
                pool.gpu,
                pool.cpus,
                pool.batch,
                pool.rate or 0.0,
                placed.wanted[pool.expert],
            ]
            for pool in placed.pools
        ],
        drop=["wanted", "CPU", "batch"],
    )
    for text in [*placed.describe(), *(simulated.describe() if simulated else [])]:
        line(text)

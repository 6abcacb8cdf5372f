"""`mova plan`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import (
    Dtype,
    Experts,
    Imports,
    Json,
    Quiet,
    ShardMb,
    Size,
    expert_names_of,
    import_modules,
)
from pipelines.cli.output import emit, results_only, rounded, table


def plan(
    profile: Annotated[
        Path, typer.Option("--profile", help="What `mova profile` wrote, for every kind of device; or made by hand.")
    ],
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster",
            help="YAML of machines that need not be there (docs/placement.md); default: those of the running cluster.",
        ),
    ] = None,
    wanted: Annotated[
        list[str], typer.Option("--wanted", help="NAME=FEATURES to compute, once per expert; in place of --images.")
    ] = [],  # noqa: B006
    images: Annotated[int, typer.Option("--images", help="Pictures, each through every expert.", min=1)] = 1_000_000,
    experts: Experts = None,
    imports: Imports = [],  # noqa: B006
    size: Size = "full",
    dtype: Dtype = "float32",
    decode: Annotated[
        float | None,
        typer.Option(help="Pictures/s that one core decodes and prepares; not counted where it is not given.", min=0.1),
    ] = None,
    shard_mb: ShardMb = 128.0,
    output: Annotated[Path | None, typer.Option("--output", help="YAML file the pools go to.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Run the plan by discrete events, without a GPU.")
    ] = False,
    mtbf_hours: Annotated[
        float | None, typer.Option(help="Simulated: mean time between failures of one machine, hours.", min=0.01)
    ] = None,
    node_mb_s: Annotated[
        float | None, typer.Option(help="Simulated: what one machine can write, MiB/s.", min=0.1)
    ] = None,
    store_mb_s: Annotated[
        float | None, typer.Option(help="Simulated: what the store takes in all, MiB/s.", min=0.1)
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Choose kinds of device, shares of a GPU, batches and pool sizes by profiles, and predict images/s and bottleneck."""
    with results_only():
        from dataclasses import asdict

        import torch

        from cluster.nodes import PlanError, read_cluster, running_nodes
        from cluster.placement import plan_placement
        from cluster.pools import write_pools
        from cluster.session import ray_session
        from cluster.simulator import simulate as run
        from mova_core.experts import expert_card
        from mova_core.experts.cost import read_profiles, shapes_of
        from pipelines.progress_bar import progress_bar

        import_modules(imports)
        names = expert_names_of(experts)
        counts = wanted_of(wanted, names) if wanted else dict.fromkeys(names, images)
        measured = [
            one
            for one in read_profiles(profile)
            if one.expert in counts and one.is_of(expert_card(one.expert), size, dtype)
        ]
        if not measured:
            raise PlanError(
                f"{profile} holds none of {', '.join(counts)} at size {size} in {dtype}: see --size, --dtype"
            )
        shapes = {name: shapes_of(name, size) for name in counts}
        width = getattr(torch, dtype).itemsize
        feature_bytes = {name: one.grid[0] * one.grid[1] * one.channels * width for name, one in shapes.items()}
        shard_rows = {name: max(1, int(shard_mb * 2**20 / each)) for name, each in feature_bytes.items()}
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
            with progress_bar(sum(placed.wanted.values()), "simulate", "features", not quiet) as bar:
                simulated = run(
                    placed.pools,
                    placed.wanted,
                    measured,
                    nodes,
                    shard_rows=shard_rows,
                    feature_bytes=feature_bytes,
                    decode=decode,
                    node_bytes_per_second=node_mb_s and node_mb_s * 2**20,
                    store_bytes_per_second=store_mb_s and store_mb_s * 2**20,
                    mtbf_hours=mtbf_hours,
                    on_shard=bar.update,
                )

    def show() -> None:
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
                    rounded(pool.rate or 0.0),
                    placed.wanted[pool.expert],
                ]
                for pool in placed.pools
            ],
        )
        for line in [*placed.describe(), *(simulated.describe() if simulated else [])]:
            print(line)

    result = asdict(placed) | {"seconds": placed.seconds, "rates": placed.rates, "bottleneck": placed.bottleneck}
    emit(result | {"simulated": simulated and asdict(simulated)}, as_json, show)


def wanted_of(pairs: list[str], names: Sequence[str]) -> dict[str, int]:
    """Expert -> features to compute."""
    counts = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name not in names or not number.isdecimal():
            raise typer.BadParameter(f"--wanted {pair}: write NAME=FEATURES with NAME one of {', '.join(names)}")
        counts[name] = int(number)
    return counts

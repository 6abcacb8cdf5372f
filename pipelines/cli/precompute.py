"""`mova precompute`: run, status, resize."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from pipelines.cli.options import (
    BadRow,
    Dtype,
    Experts,
    ImagesPath,
    Imports,
    Json,
    Quiet,
    ShardMb,
    Size,
    Source,
    Weights,
    codecs_of,
    expert_names_of,
    import_modules,
    weights_of,
)
from pipelines.cli.output import emit, results_only, rounded, table


class _RunByDefault(typer.core.TyperGroup):
    """A group whose command `run` need not be named: `mova precompute SOURCE`, beside `mova precompute status`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


app = typer.Typer(
    cls=_RunByDefault, help="Compute the experts' features of pictures into a store; look at such runs and resize them."
)


@app.command("run", epilog="Beside it: mova precompute status [JOB], mova precompute resize JOB NAME=SIZE")
def precompute(
    source: Source,
    store: Annotated[str, typer.Option("--store", help="Folder or URL of the feature store; made if it is not there.")],
    images: ImagesPath = None,
    bad_rows: BadRow = "raise",
    column: Annotated[str | None, typer.Option(help="Column of Parquet files that holds the pictures.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many pictures.", min=1)] = None,
    experts: Experts = None,
    routed_only: Annotated[
        bool, typer.Option("--routed-only", help="For a picture only the experts that its routing labels name.")
    ] = False,
    pool: Annotated[
        list[str],
        typer.Option(
            "--pool",
            help="NAME=SIZE or NAME=MIN..MAX actors[,gpu=,cpu=,accelerator=,batch=,rate=] (gpu, cpu per actor; batch in "
            "pictures, by default that of --profile, else measured by each actor as it starts; rate in images/s of all of "
            "them, by which an expert with several pools divides its work). Repeatable, also for one expert.",
        ),
    ] = [],  # noqa: B006  typer reads the default
    pools: Annotated[
        Path | None,
        typer.Option(help="YAML list of pools: expert, size, gpu, cpu, accelerator, batch, rate of each.", exists=True),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="What `mova profile` wrote: batch sizes, and memory on CPUs.")
    ] = None,
    placement: Annotated[
        Literal["auto", "pools"],
        typer.Option(
            help="auto: where no pool is given and --profile tells enough, pools that make the whole soonest done; "
            "pools: those given, else one actor on a CPU per expert."
        ),
    ] = "auto",
    imports: Imports = [],  # noqa: B006
    weights: Weights = [],  # noqa: B006
    size: Size = "full",
    dtype: Dtype = "float32",
    codec: Annotated[
        list[str],
        typer.Option("--codec", help="NAME=DTYPE that an expert's features are stored in instead, e.g. sam=int8."),
    ] = [],  # noqa: B006
    shard_mb: ShardMb = 128.0,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try again what failed in an expert in an earlier run.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only tell, per expert, how many features and bytes are to be computed and in what time."
        ),
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Of the run, for status and resize (default: made of the time).")
    ] = None,
    summary: Annotated[Path | None, typer.Option(help="JSON file that the summary goes to.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="PNG that images/s and pool sizes over time are drawn to, per expert.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compute the experts' features of pictures into a store; what is there already is not computed again."""
    with results_only():
        from cluster.nodes import PlanError
        from cluster.pools import plan_pools, read_pools
        from cluster.session import ray_session
        from mova_core.experts.cost import read_profiles
        from pipelines.precompute.listing import find_images
        from pipelines.precompute.run import precompute as run
        from pipelines.precompute.run import preview

        import_modules(imports)
        names = expert_names_of(experts)
        settings: dict[str, Any] = {
            "experts": names,
            "weights": weights_of(weights, names),
            "codecs": codecs_of(codec, names),
            "size": size,
            "dtype": dtype,
            "shard_mb": shard_mb,
            "retry_quarantined": retry_quarantined,
        }
        try:
            given = [*pool, *(read_pools(pools) if pools else ())]
            plan_pools(names, given)  # refuse a malformed pool before anything starts
        except PlanError as error:
            raise typer.BadParameter(str(error)) from None
        profiles = () if profile is None else read_profiles(profile)
        skipped: list[str] = []
        found = find_images(source, images, bad_rows, skipped, routed_only=routed_only, limit=limit, column=column)
        with ray_session():
            if dry_run:
                plan = preview(found, store, profiles=profiles, progress=not quiet, **settings)
            else:
                done = run(
                    found,
                    store,
                    pools=given,
                    profiles=profiles,
                    placement=placement,
                    name=name,
                    summary=summary,
                    picture=picture,
                    progress=not quiet,
                    **settings,
                )
    if dry_run:
        kinds = sorted({kind for row in plan.values() for kind in row["hours"]})
        emit(
            {"experts": plan, "skipped": skipped},
            as_json,
            lambda: table(
                f"{len(found)} pictures; nothing was computed"
                + ("" if kinds else "; device-hours: give a --profile that holds these experts"),
                ["expert", "wanted", "there", "to compute", "MiB", *(f"hours of {kind}" for kind in kinds)],
                [
                    [expert, row["wanted"], row["there"], row["to_compute"], rounded(row["bytes"] / 2**20)]
                    + [rounded(row["hours"][kind]) if kind in row["hours"] else "?" for kind in kinds]
                    for expert, row in plan.items()
                ],
            ),
        )
        return
    computed = sum(done.computed.values())

    def show() -> None:
        table(
            f"{done.images} pictures, {computed} features computed, {sum(done.reused.values())} reused, {done.seconds:.1f} s",
            ["expert", "computed", "reused", "MiB", "images/s", "busy"],
            [
                [
                    expert,
                    row["computed"],
                    row["reused"],
                    rounded(row["bytes"] / 2**20),
                    row["images_per_second"],
                    "" if row["busy"] is None else f"{row['busy']:.0%}",
                ]
                for expert, row in done.experts.items()
            ],
        )
        for row in done.quarantined:
            print(f"quarantined {row['path']}: {row['reason']}")

    emit(done.to_dict() | {"skipped": skipped}, as_json, show)


@app.command("status")
def precompute_status(
    job: Annotated[str | None, typer.Argument(help="Name of a run; all those under way where it is left out.")] = None,
    as_json: Json = False,
) -> None:
    """Show how far the runs on the cluster that RAY_ADDRESS names are, per expert."""
    with results_only():
        from cluster.session import ray_session
        from pipelines.precompute.status_actor import status

        with ray_session(start=False):
            runs = status(job)

    def show() -> None:
        for run in runs:
            table(
                f"{run['job']}: into {run['store']}, for {run['seconds']:,.0f} s",
                ["expert", "done", "of", "images/s", "s to go", "actors", "waiting", "busy", "MiB", "pools"],
                [
                    [
                        expert,
                        row["done"],
                        row["total"],
                        row["images_per_second"],
                        row["eta_seconds"],
                        row["actors"],
                        row["queue"],
                        "" if row["busy"] is None else f"{row['busy']:.0%}",
                        rounded(row["bytes"] / 2**20),
                        " ".join(row["pools"]),
                    ]
                    for expert, row in run["experts"].items()
                ],
            )
        if not runs:
            print("no precompute runs on this cluster")

    emit(runs, as_json, show)


@app.command("resize")
def precompute_resize(
    job: Annotated[str, typer.Argument(help="Name of a run (`mova precompute status`).")],
    pools: Annotated[
        list[str],
        typer.Argument(
            help="NAME=SIZE or NAME=MIN..MAX; with gpu= and accelerator= where the expert has several pools.",
            metavar="NAME=SIZE...",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Give an expert of a run under way more actors or fewer; nothing computed is lost, and nothing is computed again."""
    with results_only():
        from cluster.nodes import PlanError
        from cluster.pools import PoolSpec
        from cluster.session import ray_session
        from pipelines.precompute.status_actor import resize

        try:
            for pool in pools:
                PoolSpec.parse(pool)
        except PlanError as error:
            raise typer.BadParameter(str(error).replace("--pool ", "")) from None
        with ray_session(start=False):
            told = resize(job, pools)
    emit(told, as_json, lambda: print("\n".join(f"{job}: {name} is now {' '.join(of)}" for name, of in told.items())))

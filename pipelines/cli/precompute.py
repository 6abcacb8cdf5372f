"""`mova precompute`: run, status, resize."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mova_core.figures import number, percent
from pipelines.cli.help import App, Group
from pipelines.cli.options import (
    DATA,
    OUTPUT,
    RUN,
    STORE,
    BadRows,
    Experts,
    ImagesPath,
    Imports,
    Json,
    NameValue,
    OptionalDtype,
    OptionalSize,
    PoolOfModel,
    Quiet,
    ShardMb,
    Weights,
    by_expert,
    codec_name,
    expert_settings,
    import_modules,
    name_value,
    weights_location,
)
from pipelines.cli.output import line, print_result, results_only, table
from pipelines.cli.paths import Overwrite, check_output_file, drawn_by, input_file, output_path, path_or_url


class _RunByDefault(Group):
    """A group whose command `run` need not be named: `mova precompute SOURCE`, beside `mova precompute status`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


app = App(
    cls=_RunByDefault,
    no_args_is_help=False,
    help="Compute the experts' features of pictures into a store; show such runs and resize their pools.",
)


@app.command(
    "run",
    epilog="See also: `mova precompute status [JOB]` and `mova precompute resize JOB NAME=SIZE`, each with --help.",
)
def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="The pictures, a path or a URL (s3://, gs://, https://, ...): a folder of pictures at any depth, of Parquet "
            "files or of webdataset tars; such files by name, by glob (data/*.parquet, quoted) or by range "
            "(train-{000..099}.tar); or LLaVA JSON/JSONL that names them. Remote files are fetched once per node, into "
            "$MOVA_CACHE (default: the user's cache folder), which keeps $MOVA_CACHE_GB (default: 10).",
            parser=path_or_url,
        ),
    ],
    store: Annotated[
        str,
        typer.Option(
            "--store",
            metavar="PATH_OR_URL",
            help="Feature store, a folder or a URL; created if it is missing.",
            parser=path_or_url,
        ),
    ],
    images: ImagesPath = None,
    bad_rows: BadRows = "raise",
    column: Annotated[
        str | None, typer.Option(help="Column of Parquet files that holds the pictures.", rich_help_panel=DATA)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="First pictures only.", min=1, rich_help_panel=DATA)] = None,
    routed_only: Annotated[
        bool,
        typer.Option(
            "--routed-only",
            help="Compute for a picture only the experts that its routing labels name.",
            rich_help_panel=DATA,
        ),
    ] = False,
    model: PoolOfModel = None,
    experts: Experts = None,
    size: OptionalSize = None,
    dtype: OptionalDtype = None,
    weights: Weights = None,
    imports: Imports = None,
    codec: Annotated[
        list[NameValue] | None,
        typer.Option(
            "--codec",
            metavar="NAME=DTYPE",
            help="Dtype in which an expert's features are stored instead, e.g. sam=int8; repeatable.",
            parser=name_value,
            rich_help_panel=STORE,
        ),
    ] = None,
    shard_mb: ShardMb = 128.0,
    retry_quarantined: Annotated[
        bool,
        typer.Option(
            "--retry-quarantined",
            help="Compute again what failed in an expert in an earlier run.",
            rich_help_panel=STORE,
        ),
    ] = False,
    pool: Annotated[
        list[str] | None,
        typer.Option(
            "--pool",
            metavar="NAME=SIZE[,KEY=VALUE...]",
            help="Actors of an expert, e.g. sam=2..4,gpu=0.5,accelerator=A100,batch=16; repeatable, also for one expert.\n"
            "SIZE: actors, fixed (2) or a range (2..4).\n"
            "gpu: GPUs per actor, e.g. gpu=0.5 (default: 0).\n"
            "cpu: CPUs per actor, e.g. cpu=0.25 (default: 1, or 0.25 beside a GPU).\n"
            "accelerator: type of GPU by Ray's name, e.g. accelerator=A100.\n"
            "batch: pictures per forward pass, e.g. batch=16 (default: that of --profile, else measured at the start).\n"
            "rate: images/s of all actors of the pool, e.g. rate=120; an expert's pools share its work in this proportion.",
            rich_help_panel=RUN,
        ),
    ] = None,
    pools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML list of pools, each with the keys expert, size, gpu, cpu, accelerator, batch, rate "
            "(`mova plan --output` writes one).",
            parser=input_file,
            rich_help_panel=RUN,
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            help="File of `mova profile`: batch sizes, and memory on CPUs.",
            parser=input_file,
            rich_help_panel=RUN,
        ),
    ] = None,
    placement: Annotated[
        Literal["auto", "pools"],
        typer.Option(
            help="auto: without --pool and with a --profile of every expert, choose the pools that finish soonest; "
            "pools: those of --pool and --pools, else one actor on a CPU per expert.",
            rich_help_panel=RUN,
        ),
    ] = "auto",
    name: Annotated[
        str | None,
        typer.Option(help="Name of the run, for status and resize (default: from the time).", rich_help_panel=RUN),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only count, per expert, the features and bytes to compute, and estimate the time.",
            rich_help_panel=RUN,
        ),
    ] = False,
    summary: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON file that the summary goes to; the summary of an earlier run is replaced.",
            parser=output_path,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PNG file for a plot of images/s and pool sizes over time, per expert; the plot of an earlier run is "
            "replaced.",
            parser=output_path,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compute the experts' features of pictures into a store; features that the store holds are not computed again."""
    silent = quiet or as_json
    with results_only(silent, resumes=True):
        from cluster.nodes import PlanError
        from cluster.pools import plan_pools, read_pools
        from cluster.session import ray_session
        from mova_core.experts.cost import read_profiles
        from pipelines.precompute.listing import find_images
        from pipelines.precompute.plot import SOFTWARE
        from pipelines.precompute.run import precompute, preview

        import_modules(imports)
        chosen = expert_settings(model, experts, size, dtype)
        settings: dict[str, Any] = {
            "experts": chosen.names,
            "weights": by_expert("--weights", weights, chosen.names, weights_location),
            "codecs": chosen.stored | by_expert("--codec", codec, chosen.names, codec_name),
            "size": chosen.size,
            "dtype": chosen.dtype,
            "shard_mb": shard_mb,
            "retry_quarantined": retry_quarantined,
        }
        if not dry_run:
            check_output_file("--summary", summary, overwrite, _is_summary)
            check_output_file("--picture", picture, overwrite, drawn_by(SOFTWARE))
        try:
            specs = [*(pool or ()), *(read_pools(pools) if pools else ())]
            plan_pools(chosen.names, specs)  # refuse a malformed pool before anything starts
        except PlanError as error:
            raise typer.BadParameter(str(error)) from None
        profiles = () if profile is None else read_profiles(profile)
        skipped: list[str] = []
        found = find_images(source, images, bad_rows, skipped, routed_only=routed_only, limit=limit, column=column)
        with ray_session():
            if dry_run:
                counts = preview(found, store, profiles=profiles, progress=not silent, **settings)
            else:
                done = precompute(
                    found,
                    store,
                    pools=specs,
                    profiles=profiles,
                    placement=placement,
                    name=name,
                    summary=summary,
                    picture=picture,
                    progress=not silent,
                    **settings,
                )
    if dry_run:
        print_result({"experts": counts, "skipped": skipped}, as_json, lambda: show_preview(counts, len(found)))
    else:
        print_result(done.to_dict() | {"skipped": skipped}, as_json, lambda: show_summary(done))


def _is_summary(file: Path) -> bool:
    """Whether an earlier run wrote the file: a run that was stopped writes one too, and the same command resumes."""
    try:
        summary = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and {"job", "experts", "events"} <= summary.keys()


def show_preview(counts: dict[str, dict[str, Any]], pictures: int) -> None:
    """What a run would compute, and how long it would take, for people."""
    estimates = [
        [expert, device, hours] for expert, row in counts.items() for device, hours in sorted(row["hours"].items())
    ]
    table(
        f"{number(pictures)} pictures; nothing was computed"
        + ("" if estimates else "; for device-hours give a --profile that holds these experts"),
        ["expert", "wanted", "stored", "to compute", "MiB"],
        [
            [expert, row["wanted"], row["there"], row["to_compute"], row["bytes"] / 2**20]
            for expert, row in counts.items()
        ],
        drop=["stored"],
    )
    if unknown := [expert for expert, row in counts.items() if row["there"] is None]:
        line(
            f"the weights of {', '.join(unknown)} are not on this machine, so what the store holds of them is not counted"
        )
    if estimates:
        print()
        table("device-hours of the features to compute", ["expert", "device", "hours"], estimates)


def show_summary(done: Any) -> None:
    """What a run did, for people."""
    table(
        f"{number(done.images)} pictures, {number(sum(done.computed.values()))} features computed, "
        f"{number(sum(done.reused.values()))} reused, {number(done.seconds)} s; images/s: from the first batch begun to the "
        "last shard written; busy: of the time in which actors were ready",
        ["expert", "computed", "reused", "MiB", "images/s", "busy"],
        [
            [
                expert,
                row["computed"],
                row["reused"],
                row["bytes"] / 2**20,
                row["images_per_second"],
                percent(row["busy"]),
            ]
            for expert, row in done.experts.items()
        ],
        drop=["MiB", "reused"],
    )
    for row in done.quarantined:
        line(f"quarantined {row['path']}: {row['reason']}")


@app.command("status")
def status(
    job: Annotated[str | None, typer.Argument(help="Name of a run (default: every run on the cluster).")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show the progress of the runs on the cluster that RAY_ADDRESS names, per expert."""
    with results_only(quiet or as_json):
        from cluster.session import ray_session
        from pipelines.precompute.status_actor import status as read_status

        with ray_session(start=False):
            runs = read_status(job)

    def show() -> None:
        for row in runs:
            show_run(row)
        if not runs:
            print("no precompute runs on this cluster")

    print_result(runs, as_json, show)


def show_run(run: dict[str, Any]) -> None:
    """How far a run is, for people."""
    table(
        f"{run['job']}: into {run['store']}, for {number(run['seconds'])} s; waiting: blocks of pictures not yet taken; "
        "images/s and busy: as in the summary",
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
                percent(row["busy"]),
                row["bytes"] / 2**20,
                " ".join(row["pools"]),
            ]
            for expert, row in run["experts"].items()
        ],
        drop=["pools", "MiB", "waiting", "busy", "actors"],
    )


@app.command("resize")
def resize(
    job: Annotated[str, typer.Argument(help="Name of a run (`mova precompute status`).")],
    pools: Annotated[
        list[str],
        typer.Argument(
            help="NAME=SIZE or NAME=MIN..MAX; with gpu= and accelerator= where the expert has several pools.",
            metavar="NAME=SIZE...",
        ),
    ],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Change the number of an expert's actors in a run under way; computed features stay."""
    with results_only(quiet or as_json):
        from cluster.nodes import PlanError
        from cluster.pools import PoolSpec
        from cluster.session import ray_session
        from pipelines.precompute.status_actor import resize as resize_run

        try:
            for pool in pools:
                PoolSpec.parse(pool)
        except PlanError as error:
            raise typer.BadParameter(str(error).replace("--pool ", "")) from None
        with ray_session(start=False):
            resized = resize_run(job, pools)

    def show() -> None:
        for name, specs in resized.items():
            line(f"{job}: {name} is now {' '.join(specs)}")

    print_result(resized, as_json, show)

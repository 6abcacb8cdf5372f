"""The `mova` command. Heavy imports stand inside the commands, so that `mova --help` is instant.

Exit codes: 0 when all of it worked, 2 for a usage error, 1 with one clear line for anything else.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core

from pipelines.errors import is_ours, root_cause

DEMO_PACKAGES = ("skimage", "sklearn", "matplotlib", "vega_datasets", "pydicom")

app = typer.Typer(
    name="mova",
    help="MoVA on Ray: precompute expert features, train the router and the model, ask and evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train a stage as Ray Train workers reading the store.", no_args_is_help=True)
store_app = typer.Typer(help="Look into a feature store.", no_args_is_help=True)


class _RunByDefault(typer.core.TyperGroup):
    """A group whose command `run` need not be named: `mova precompute SOURCE`, beside `mova precompute status`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


precompute_app = typer.Typer(
    cls=_RunByDefault, help="Compute the experts' features of pictures into a store; look at such runs and resize them."
)
app.add_typer(precompute_app, name="precompute")
app.add_typer(train_app, name="train")
app.add_typer(store_app, name="store")


def _location(store: str) -> str:
    """A store's folder, absolute, so that it means the same in every process; or its URL."""
    return store if "://" in store else str(Path(store).resolve())


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
StorePath = Annotated[
    str,
    typer.Option("--store", help="Feature store: a folder, or a URL (s3://, gs://, ...).", parser=_location),
]
StoreHere = Annotated[
    str,
    typer.Argument(metavar="STORE", help="The store: a folder, or a URL (s3://, gs://, ...).", parser=_location),
]
DataPath = Annotated[Path, typer.Option("--data", help="LLaVA JSON array, or JSONL with one record a line.")]
ImagesPath = Annotated[
    str | None,
    typer.Option("--images", help="Folder or URL the records' images are relative to (default: the data file's)."),
]
Source = Annotated[
    str,
    typer.Argument(
        help="Where the pictures are; a path or a URL (s3://, gs://, https://, ...): a folder of pictures at any depth, of "
        "Parquet files or of webdataset tars; such files by name, glob (data/*.parquet, quoted) or range "
        "(train-{000..099}.tar); or LLaVA JSON/JSONL that names them. What is far away is fetched once per node, into "
        "$MOVA_CACHE (default: mova-<user id> in the temporary folder), of which $MOVA_CACHE_GB (default 10) are kept."
    ),
]
ModelPath = Annotated[Path, typer.Option("--model", help="Folder of a MoVA model.", exists=True, file_okay=False)]
Experts = Annotated[
    str | None, typer.Option("--experts", help="Comma-separated names; all seven where there are none.")
]
ShardMb = Annotated[float, typer.Option("--shard-mb", help="Size a shard aims at, MiB.", min=0.01)]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Computed in, and stored.")]
Size = Annotated[
    Literal["full", "mini"], typer.Option("--size", help="Size of the experts: full as published, mini for a laptop.")
]
Weights = Annotated[
    list[str], typer.Option("--weights", help="NAME=PATH_OR_HUB_ID, once per expert (default: the public weights).")
]
Imports = Annotated[
    list[str],
    typer.Option("--import", help="Module that registers an expert of your own (docs/custom_expert.md); repeatable."),
]
BadRow = Annotated[
    Literal["raise", "skip"],
    typer.Option("--bad-rows", help="Whether the first bad record, tar or Parquet file ends it, or all are left out."),
]
Gpu = Annotated[float, typer.Option("--gpu", help="GPUs per actor, fractions allowed.", min=0)]


def main() -> None:
    """Entry point of the console script."""
    debug = "--debug" in sys.argv
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end, so that nothing is left running
    try:
        app(argv)  # usage errors end in here, with code 2
    except Exception as error:
        if debug:
            raise
        print(f"mova: {_one_line(root_cause(error))}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").split(".")[0]
        extra = {"ray": "ray,train", "psutil": "ray", "yaml": "ray", "scipy": "ray"}.get(
            missing, "demo" if missing in DEMO_PACKAGES else ""
        )
        if extra:
            return f"this command needs the package {missing}: pip install 'mova-ray[{extra}]'"
    text = " ".join(str(error).split())
    return text if text and is_ours(error) else f"{type(error).__name__}: {text} (a traceback: --debug)"


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Keeps stdout for the result: whatever prints while the work runs goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        print(
            "mova: stopped; stored features and checkpoints are kept, the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(130)


def emit(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    """The result: one JSON document, or what `show` prints for people."""
    if as_json:
        print(json.dumps(value, indent=2, default=str))
    else:
        show()


def rounded(value: float) -> float:
    """Three digits, or all those before the point."""
    return round(value) if value >= 100 else float(f"{value:.3g}")


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table for people; columns of numbers are right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in rows)
        last = index == len(columns) - 1
        drawn.add_column(name, justify="right" if numeric else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        drawn.add_row(*(f"{cell:,}" if isinstance(cell, int | float) else cell or "" for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(drawn)


def _weights(pairs: list[str], names: Sequence[str]) -> dict[str, str]:
    """Expert -> weights, of `names` only; local paths made absolute, so that they mean the same in every process."""
    given = {}
    for pair in pairs:
        name, equals, where = pair.partition("=")
        if not equals or not where or name not in names:
            raise typer.BadParameter(f"--weights {pair}: write NAME=PATH_OR_HUB_ID with NAME one of {', '.join(names)}")
        given[name] = str(Path(where).resolve()) if Path(where).exists() else where
    return given


def _codecs(pairs: list[str], names: Sequence[str]) -> dict[str, str]:
    """Expert -> dtype its features are stored in."""
    from mova_core.features.codec import CODECS

    chosen = {}
    for pair in pairs:
        name, _, dtype = pair.partition("=")
        if name not in names or dtype not in CODECS:
            raise typer.BadParameter(
                f"--codec {pair}: write NAME=DTYPE with NAME one of {', '.join(names)} and DTYPE one of {', '.join(CODECS)}"
            )
        chosen[name] = dtype
    return chosen


def _costs(pairs: list[str], profile: Path | None, config: Any) -> dict[str, float]:
    """Expert of a model's pool -> cost per picture: as given, else in ms of this CPU as measured, else in GFLOPs."""
    import torch

    from mova_core.experts import expert_card
    from mova_core.experts.cost import count_flops, device_kind, read_profiles, shapes_of

    costs: dict[str, float] = {}
    if pairs:
        if profile is not None:
            raise typer.BadParameter("--cost and --profile are of different units: give one of them")
        for pair in pairs:
            name, _, cost = pair.partition("=")
            try:
                costs[name] = float(cost)
            except ValueError:
                raise typer.BadParameter(f"--cost {pair}: write NAME=NUMBER") from None
        fix = "give a --cost for each expert, or none for GFLOPs"
    elif profile is not None:
        device = device_kind(torch.device("cpu"))
        measured = [one for one in read_profiles(profile) if one.device == device]
        for name in config.experts:
            dtype = config.feature_dtypes.get(name, "float32")
            for one in measured:
                if one.expert == name and one.is_of(expert_card(name), config.expert_size, dtype):
                    costs[name] = 1000 / one.at(1).images_per_second
        fix = f"{profile} has none on {device} at size {config.expert_size}: run `mova profile` here"
    else:
        counted = {name: count_flops(shapes_of(name, config.expert_size)) for name in config.experts}
        costs = {name: flops / 1e9 for name, flops in counted.items() if flops is not None}
        fix = "its FLOPs cannot be counted: give a --cost for each expert"
    if unpriced := [name for name in config.experts if name not in costs]:
        raise typer.BadParameter(f"--budget: no cost of {', '.join(unpriced)}; {fix}")
    return costs


def _import(modules: list[str]) -> None:
    """Imports what registers experts, also from the current folder, which Ray's workers look into as well."""
    import importlib

    if modules:
        sys.path.append(os.getcwd())
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # the module is there, and lacks another
            raise typer.BadParameter(
                f"--import {name}: no such module in {os.getcwd()}, installed or on PYTHONPATH"
            ) from None


def _experts(names: str | None) -> list[str]:
    from mova_core.experts import EXPERTS, expert_card

    chosen = [name.strip() for name in names.split(",")] if names else list(EXPERTS)
    try:
        for name in chosen:
            expert_card(name)
    except ValueError as error:
        raise typer.BadParameter(f"--experts: {error}") from None
    return chosen


@app.command()
def experts(size: Size = "full", imports: Imports = [], as_json: Json = False) -> None:  # noqa: B006
    """List the pool: parameters, input, grid, channels, GFLOPs and bytes per picture of each expert, and its weights."""
    from mova_core.experts import BASE, EXPERTS, expert_names, found_here
    from mova_core.experts.cost import count_flops, shapes_of
    from mova_core.routing import LETTERS

    _import(imports)
    rows: list[dict[str, Any]] = []
    for name in expert_names():
        expert = shapes_of(name, size)
        card, (height, width), channels = expert.card, expert.grid, expert.channels
        rows.append(
            {
                "expert": name,
                "title": card.title,
                "parameters": sum(p.numel() for p in expert.parameters()),
                "input": expert.arch.get("image_size"),
                "grid": [height, width],
                "channels": channels,
                "flops": count_flops(expert),
                "bytes": 2 * height * width * channels,
                "weights": card.weights,
                "weights_here": found_here(card.weights),
            }
        )

    def option(name: str) -> str:
        return "base" if name == BASE else LETTERS[EXPERTS.index(name)] if name in EXPERTS else "own"

    def show() -> None:
        table(
            f"vision experts, size {size}; per picture: GFLOPs (a multiply-add is two), KB of features in bfloat16",
            ["", "expert", "network", "M params", "px", "grid", "chan.", "GFLOPs", "KB", "here", "public weights"],
            [
                [
                    option(row["expert"]),
                    row["expert"],
                    row["title"],
                    round(row["parameters"] / 1e6, 1),
                    row["input"],
                    "x".join(map(str, row["grid"])),
                    row["channels"],
                    "?" if row["flops"] is None else rounded(row["flops"] / 1e9),
                    round(row["bytes"] / 1e3),
                    "yes" if row["weights_here"] else "no",
                    row["weights"],
                ]
                for row in rows
            ],
        )

    emit(rows, as_json, show)


@app.command()
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

        from cluster.placement import PoolSpec
        from cluster.session import ray_session
        from pipelines.profile import profile as run

        _import(imports)
        names = _experts(experts)
        given = _weights(weights, names)
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


@app.command()
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
        from cluster.placement import plan_placement, write_pools
        from cluster.session import ray_session
        from cluster.simulator import simulate as run
        from mova_core.experts import expert_card
        from mova_core.experts.cost import read_profiles, shapes_of
        from pipelines.progress_bar import progress_bar

        _import(imports)
        names = _experts(experts)
        counts = _wanted(wanted, names) if wanted else dict.fromkeys(names, images)
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


def _wanted(pairs: list[str], names: Sequence[str]) -> dict[str, int]:
    """Expert -> features to compute."""
    counts = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name not in names or not number.isdecimal():
            raise typer.BadParameter(f"--wanted {pair}: write NAME=FEATURES with NAME one of {', '.join(names)}")
        counts[name] = int(number)
    return counts


@precompute_app.command("run", epilog="Beside it: mova precompute status [JOB], mova precompute resize JOB NAME=SIZE")
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
        from cluster.placement import PlanError, plan_pools, read_pools
        from cluster.session import ray_session
        from mova_core.experts.cost import read_profiles
        from pipelines.precompute.listing import find_images
        from pipelines.precompute.run import precompute as run
        from pipelines.precompute.run import preview

        _import(imports)
        names = _experts(experts)
        settings: dict[str, Any] = {
            "experts": names,
            "weights": _weights(weights, names),
            "codecs": _codecs(codec, names),
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


@precompute_app.command("status")
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


@precompute_app.command("resize")
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
        from cluster.placement import PlanError, PoolSpec
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


def _train_command(
    stage: Literal["pretrain", "sft", "router", "light-router"], doc: str, learning_rate: float, batch_size: int
) -> None:
    def command(
        data: DataPath,
        store: StorePath,
        model: Annotated[
            Path, typer.Option("--model", help="Folder of the model to start from.", exists=True, file_okay=False)
        ],
        output: Annotated[Path, typer.Option("--output", help="Folder the trained model goes to.")],
        images: ImagesPath = None,
        bad_rows: BadRow = "raise",
        learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = learning_rate,
        batch_size: Annotated[int, typer.Option(help="Samples per step over all workers.", min=1)] = batch_size,
        epochs: Annotated[
            float, typer.Option(help="Passes over the data, fractions allowed; at least one step is made.", min=0)
        ] = 1.0,
        workers: Annotated[int, typer.Option(help="Ray Train workers.", min=1)] = 2,
        gpu: Annotated[bool, typer.Option(help="One GPU per worker.")] = False,
        checkpoint_every: Annotated[int, typer.Option(help="Steps.", min=1)] = 200,
        max_length: Annotated[int, typer.Option(help="Longest sample, tokens.", min=1)] = 2048,
        loader_processes: Annotated[int, typer.Option(help="Reading processes per worker.", min=0)] = 0,
        lora_rank: Annotated[int, typer.Option(help="Rank of the expert-routing LoRA (router only).", min=1)] = 64,
        shuffle_pool: Annotated[bool, typer.Option(help="Model-pool augmentation (router only).")] = True,
        seed: Annotated[int, typer.Option(help="Order of the samples and of chance.")] = 0,
        fingerprint: Annotated[
            list[str],
            typer.Option(
                help="NAME=FINGERPRINT: which features to take where the store has several (`mova store ls`)."
            ),
        ] = [],  # noqa: B006
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        with results_only():
            from cluster.session import ray_session
            from mova_core.io.uris import absolute
            from pipelines.train.loop import TrainConfig, train

            config = TrainConfig(
                stage=stage,
                model=str(model.resolve()),
                data=str(data.resolve()),
                store=store,
                output=str(output.resolve()),
                images=None if images is None else absolute(images),
                bad_rows=bad_rows,
                learning_rate=learning_rate,
                batch_size=batch_size,
                epochs=epochs,
                workers=workers,
                gpu=gpu,
                checkpoint_every=checkpoint_every,
                max_length=max_length,
                loader_processes=loader_processes,
                lora_rank=lora_rank,
                shuffle_pool=shuffle_pool,
                seed=seed,
                fingerprints=dict(pair.split("=", 1) for pair in fingerprint if "=" in pair),
            )
            with ray_session():
                result = train(config, progress=not quiet)
        emit(
            result,
            as_json,
            lambda: table(
                f"{stage} finished",
                ["", ""],
                [[key, str(len(value) if key == "skipped" else value)] for key, value in result.items()],
            ),
        )

    train_app.command(stage, help=doc)(command)


_train_command("pretrain", "Stage 1: MoV-Adapter and base encoder learn, the LLM is frozen.", 2e-4, 1024)
_train_command("sft", "Stage 2: everything but the experts learns.", 2e-5, 128)
_train_command("router", "The expert-routing LoRA learns from routing labels (see `mova label`).", 2e-4, 128)
_train_command(
    "light-router",
    "The light router (`mova ask --router light`) learns from the same labels; fixed pool, no LLM pass.",
    1e-3,
    128,
)


@app.command()
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


@app.command()
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


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="Picture file.")],
    question: Annotated[
        str,
        typer.Argument(help="What to ask about it; <image> in it says where a picture stands, if there are several."),
    ],
    model: ModelPath,
    also: Annotated[list[Path], typer.Option(help="One more picture file; may be given again.")] = [],  # noqa: B006
    store: Annotated[
        str | None,
        typer.Option(
            help="Feature store that is read first and kept up to date: a folder, or a URL.",
            parser=_location,
        ),
    ] = None,
    router: Annotated[str, typer.Option(help="Who picks the experts: llm, or light where the model has one.")] = "llm",
    force: Annotated[
        str | None, typer.Option(help="Experts to use, comma-separated, instead of asking the router; 'none' for none.")
    ] = None,
    forbid: Annotated[str | None, typer.Option(help="Experts that may not be used, comma-separated.")] = None,
    max_experts: Annotated[int | None, typer.Option(help="Most experts to use.", min=0)] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Most that the experts may cost together: GFLOPs, or ms with --profile, or in the unit of --cost.",
            min=0,
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help="What `mova profile` wrote of this CPU; makes --budget milliseconds."),
    ] = None,
    cost: Annotated[
        list[str],
        typer.Option(
            help="expert=COST per picture in a unit of your own; once for each (default: its GFLOPs, `mova experts`)."
        ),
    ] = [],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1)] = 64,
    weights: Weights = [],  # noqa: B006
    imports: Imports = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Ask about a picture; experts run in this process, and only those that the router picks."""
    with results_only():
        from dataclasses import asdict

        from mova_core.answering import Answerer, Question
        from mova_core.features import FeatureStore, LazyExperts, Tiered
        from mova_core.images import ImageRef
        from mova_core.model import MoVAForConditionalGeneration
        from mova_core.processing import MoVAProcessor

        _import(imports)
        loaded = MoVAForConditionalGeneration.from_pretrained(str(model))
        named = _weights(weights, loaded.config.experts)
        source: Any = LazyExperts(
            loaded.config.experts,
            size=loaded.config.expert_size,
            weights=named,
            fingerprints=loaded.config.fingerprints,
            dtypes=loaded.config.feature_dtypes,
        )
        if store is not None:
            source = Tiered(FeatureStore(store, fingerprints=loaded.config.fingerprints, create=True), source)
        asked = Question(
            image=[ImageRef(path=path) for path in (image, *also)],
            text=question,
            experts=None if force is None else [name for name in force.split(",") if name and name != "none"],
            forbid=[name for name in (forbid or "").split(",") if name],
            max_experts=max_experts,
            budget=budget,
        )
        answerer = Answerer(
            loaded,
            MoVAProcessor.from_pretrained(str(model)),
            source,
            router=router,  # type: ignore[arg-type]  # it names a wrong one itself
            costs=None if budget is None else _costs(cost, profile, loaded.config),
        )
        [answer] = answerer.answer([asked], max_new_tokens)
        if isinstance(source, Tiered):
            source.close()

    def show() -> None:
        print(answer.text or "(the model said nothing)")
        said = (
            "forced"
            if answer.router is None
            else f"router said {answer.router!r}" + ("" if answer.readable else ", which names no expert")
        )
        print(f"\nexperts: {', '.join(answer.experts) or 'none'} ({said})")
        for block, gates in enumerate(answer.gates, 1):
            print(f"gate, block {block}: " + ", ".join(f"{name} {weight:.2f}" for name, weight in gates.items()))
        print("seconds: " + ", ".join(f"{step} {seconds:.3f}" for step, seconds in answer.seconds.items()))

    emit(asdict(answer), as_json, show)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder to read.", exists=True, file_okay=False)],
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not be there, or be empty.")],
    to_published: Annotated[
        bool, typer.Option("--to-published", help="From ours to the published form, instead of to ours.")
    ] = False,
    experts: Annotated[
        str,
        typer.Option("--experts", help="keep, drop, or the names to keep, comma-separated; they go to experts/NAME."),
    ] = "keep",
    text_encoder: Annotated[
        str | None,
        typer.Option(
            "--text-encoder",
            help="Folder or hub id with the tokenizer of the adapter's text encoder (default: as config.json says).",
        ),
    ] = None,
    chat_format: Annotated[
        str | None,
        typer.Option(help="Published conversation format (default: the one that the tokenizer's marks tell)."),
    ] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest weights file, GB.", min=0.001)] = 4.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every name and shape, write nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn a published MoVA folder into ours, or ours into a published one. Memory does not grow with the model.

    Every tensor is accounted for in conversion.json; a missing, unknown or misshapen one is an error that names it.
    """
    with results_only():
        from mova_core import checkpoint
        from mova_core.processing import CHAT_FORMATS
        from pipelines.progress_bar import progress_bar

        if chat_format is not None and chat_format not in CHAT_FORMATS:
            raise typer.BadParameter(f"--chat-format {chat_format}: there are {', '.join(CHAT_FORMATS)}")
        try:
            kept = checkpoint.chosen_experts(experts)
        except ValueError as error:
            raise typer.BadParameter(f"--experts: {error}") from None
        with progress_bar(None, "convert", "B", not quiet) as bar:
            bar.unit_scale = True
            common: dict[str, Any] = {
                "shard_gb": shard_gb,
                "dry_run": dry_run,
                "progress": bar.update,
                "begin": bar.reset,
            }
            if to_published:
                report = checkpoint.convert_back(source, target, **common)
            else:
                common |= {"experts": kept, "text_encoder": text_encoder, "chat_format": chat_format}
                report = checkpoint.convert(source, target, **common)

    def show() -> None:
        noted = sum("note" in row for row in report["tensors"])
        table(
            f"{source} -> {target}" + (", nothing written" if dry_run else ""),
            ["part", "tensors", "M params", "MB", "MB written"],
            [
                [
                    part,
                    row["tensors"],
                    round(row["parameters"] / 1e6, 2),
                    *(round(row[key] / 1e6, 2) for key in ("bytes", "written")),
                ]
                for part, row in report["parts"].items()
            ],
        )
        print(
            f"{len(report['tensors'])} names, {noted} with a note" + ("" if dry_run else f": {target}/conversion.json")
        )
        for name in report.get("left_out", ()):
            print(f"left out, as the published form has no place for it: {name}")

    emit(report, as_json, show)


@store_app.command("ls")
def store_ls(store: StoreHere, as_json: Json = False) -> None:
    """List experts and fingerprints, with what each fingerprint covers."""
    from mova_core.features import FeatureStore

    opened = FeatureStore(store)
    rows = [
        {"fingerprint": partition.fingerprint, **partition.description}
        for name, prints in opened.experts().items()
        for partition in (opened.partition(name, one) for one in prints)
    ]
    emit(
        rows,
        as_json,
        lambda: table(
            store,
            ["expert", "fingerprint", "grid", "channels", "dtype"],
            [
                [row["expert"], row["fingerprint"], "x".join(map(str, row["grid"])), row["channels"], row["dtype"]]
                for row in rows
            ],
        ),
    )


@store_app.command("stat")
def store_stat(store: StoreHere, as_json: Json = False) -> None:
    """Count features, bytes and bytes per image of each fingerprint, and what its dtype lost when it was stored.

    The loss is relative L2: the norm of the error over that of what the expert computed.
    """
    from mova_core.features import FeatureStore

    stat = FeatureStore(store).stat()

    def show() -> None:
        table(
            f"{store}, {stat['quarantined']} pictures in quarantine",
            ["expert", "fingerprint", "dtype", "features", "shards", "MB", "KB per image", "mean loss", "max loss"],
            [
                [
                    name,
                    fingerprint,
                    one["dtype"],
                    one["features"],
                    one["shards"],
                    rounded(one["bytes"] / 1e6),
                    rounded(one["bytes_per_feature"] / 1e3),
                    f"{one['loss']:.1e}" if one["loss"] else "exact",
                    f"{one['max_loss']:.1e}" if one["max_loss"] else "exact",
                ]
                for name, row in stat["experts"].items()
                for fingerprint, one in row["fingerprints"].items()
            ],
        )

    emit(stat, as_json, show)


@store_app.command("verify")
def store_verify(
    store: StoreHere,
    keep: Annotated[bool, typer.Option("--keep", help="Only look: withdraw nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read every byte of a store, name what is damaged and withdraw it, so that the next precompute makes it anew.

    Exit 1 if anything is damaged. Sound features of a damaged shard are kept, in a shard of their own; `mova store gc`
    deletes the damaged files.
    """
    with results_only():
        from mova_core.features import FeatureStore
        from pipelines.progress_bar import progress_bar

        opened = FeatureStore(store, damaged=True)
        total = sum(row["features"] for row in opened.stat()["experts"].values())
        checked = 0
        with progress_bar(total, "verify", "features", not quiet) as bar:

            def count(features: int) -> None:
                nonlocal checked
                checked += features
                bar.update(features)

            damaged = list(opened.verify(progress=count))
        withdrawn = 0 if keep else opened.withdraw(damaged)

    def show() -> None:
        for row in damaged:
            where = "/".join(part for part in (row["expert"], row["fingerprint"], row["shard"]) if part)
            print(f"damaged: {where} {row['key']}: {row['reason']}".replace(" :", ":"))
        print(f"{checked} features checked, {len(damaged)} damages, {withdrawn} features withdrawn")
        if damaged:
            print("without --keep what is damaged is withdrawn" if keep else "`mova precompute` makes them anew")

    emit({"features": checked, "damaged": damaged, "withdrawn": withdrawn}, as_json, show)
    if damaged:
        sys.exit(1)


@store_app.command("gc")
def store_gc(
    store: StoreHere,
    grace: Annotated[
        float,
        typer.Option(
            help="Minutes for which a file that nothing names is left alone: more than a writer's longest pause.", min=0
        ),
    ] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what crashed writers, lost races and repairs left: nothing that a feature is in."""
    from mova_core.features import FeatureStore

    removed = FeatureStore(store).gc(60 * grace, dry_run)
    what = "would be deleted" if dry_run else "deleted"
    emit(removed, as_json, lambda: print(f"{removed['files']} files, {removed['bytes'] / 1e6:,.1f} MB {what}"))


@store_app.command("diff")
def store_diff(
    store: StoreHere,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The other: a folder, or a URL.", parser=_location)],
    keys: Annotated[bool, typer.Option("--keys", help="Also name the images: keys, one a line.")] = False,
    as_json: Json = False,
) -> None:
    """Tell which features one store has and the other lacks, and which both have with different bytes."""
    from mova_core.features import FeatureStore

    parts = ("only_here", "only_there", "differ")
    found = FeatureStore(store).diff(FeatureStore(other))
    counts = [{**row, **{part: len(row[part]) for part in parts}} for row in found]

    def show() -> None:
        columns = ["expert", "fingerprint", "same", "only here", "only there", "differ"]
        table(f"{store} and {other}", columns, [list(row.values()) for row in counts])
        for row in found if keys else ():
            for part in parts:
                for key in row[part]:
                    print(part.replace("_", "-"), row["expert"], row["fingerprint"], key)

    emit(found if keys else counts, as_json, show)


@store_app.command("export")
def store_export(
    store: StoreHere,
    to: Annotated[
        str,
        typer.Argument(metavar="TO", help="The other store, made if there is none.", parser=_location),
    ],
    experts: Annotated[str | None, typer.Option("--experts", help="Comma-separated names; all without it.")] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="File of image keys (sha256, hex), one a line: only these.", exists=True, dir_okay=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Only the images of this LLaVA JSON or JSONL, or of this folder.")
    ] = None,
    images: ImagesPath = None,
    shard_mb: ShardMb = 128.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Copy features to another store, local or remote, byte for byte; started again, it copies what is still missing."""
    with results_only():
        from mova_core.features import FeatureStore
        from pipelines.progress_bar import progress_bar

        if keys is not None and data is not None:
            raise typer.BadParameter("give --keys or --data, not both")
        source = FeatureStore(store)
        chosen: list[str] | None = None
        if keys is not None:
            chosen = keys.read_text().split()
        elif data is not None:
            from mova_core.images import ImageRef
            from pipelines.precompute.listing import find_images

            chosen = [ImageRef(path=path).key for path in find_images(data, images)["image"].to_pylist()]
        names = [name.strip() for name in experts.split(",")] if experts else list(source.experts())
        with progress_bar(None, "export", "features", not quiet) as bar:
            copied = source.export(
                FeatureStore(to, create=True), names, chosen, shard_bytes=int(shard_mb * 2**20), progress=bar.update
            )
    emit(
        copied,
        as_json,
        lambda: table(f"copied to {to}", ["expert", "features"], [list(pair) for pair in copied.items()]),
    )


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Option(help="Where data, store, models and report go (default: mova/demo in the user's cache folder)."),
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures to draw.", min=60)] = 480,
    seed: Annotated[int, typer.Option(help="Of the data, the sample order and chance.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The whole path on real pictures in minutes: precompute, train, route, answer, and a report."""
    with results_only():
        from pipelines.demo.run import DemoConfig
        from pipelines.demo.run import demo as run

        chosen = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mova" / "demo"
        result = run(DemoConfig(folder=str(chosen), images=images, seed=seed), progress=not quiet, say=say)

    def show() -> None:
        show_kinds(result["kinds"])
        print("The vision experts of this demo are frozen random networks and its LLM is a small one trained just now:")
        print("the accuracy shows that the parts work together, not what MoVA can do.")
        print(
            f"{result['features_computed']} features computed, {result['features_reused']} reused; {result['seconds']:.0f} s, "
            f"peak memory {result['peak_bytes'] / 2**30:.2f} GiB; report: {chosen / 'report.html'}"
        )
        for row in result["quarantined"]:
            print(f"quarantined {row['path']}: {row['reason']}")

    emit(result, as_json, show)


def say(line: str) -> None:
    """A line about the work, beside the progress bars."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


if __name__ == "__main__":
    main()

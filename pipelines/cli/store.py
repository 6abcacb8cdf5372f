"""`mova store`: ls, stat, verify, gc, diff, export."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mova_core.figures import number
from pipelines.cli.help import App
from pipelines.cli.options import (
    ImagesPath,
    Json,
    Quiet,
    ShardMb,
    StoreArgument,
    names_list,
)
from pipelines.cli.output import line, print_result, results_only, table
from pipelines.cli.paths import input_file, path_or_url

PARTS = ("only_here", "only_there", "differ")  # of a comparison of two stores

app = App(help="Inspect, verify, compare and copy feature stores.")


@app.command("ls")
def ls(store: StoreArgument, quiet: Quiet = False, as_json: Json = False) -> None:
    """List experts and fingerprints, with what each fingerprint covers."""
    with results_only(quiet or as_json):
        from mova_core.features import FeatureStore

        opened = FeatureStore(store)
        rows = [
            {"fingerprint": partition.fingerprint, **partition.description}
            for name, fingerprints in opened.experts().items()
            for partition in (opened.partition(name, fingerprint) for fingerprint in fingerprints)
        ]
    print_result(rows, as_json, lambda: show_ls(store, rows))


def show_ls(store: str, rows: Sequence[dict[str, Any]]) -> None:
    """Experts and fingerprints, for people."""
    table(
        store,
        ["expert", "fingerprint", "grid", "channels", "dtype"],
        [
            [row["expert"], row["fingerprint"], "x".join(map(str, row["grid"])), row["channels"], row["dtype"]]
            for row in rows
        ],
        drop=["channels", "grid"],
    )


@app.command("stat")
def stat(store: StoreArgument, quiet: Quiet = False, as_json: Json = False) -> None:
    """Count features, bytes and bytes per image of each fingerprint, and what its dtype lost when it was stored.

    The loss is relative L2: the norm of the error over the norm of what the expert computed.
    """
    with results_only(quiet or as_json):
        from mova_core.features import FeatureStore

        counts = FeatureStore(store).stat()

    print_result(counts, as_json, lambda: show_stat(counts))


def show_stat(counts: dict[str, Any]) -> None:
    """Counts and sizes, for people."""

    def loss(value: float) -> str:
        return f"{value:.1e}" if value else "exact"

    table(
        f"{counts['path']}, {number(counts['quarantined'])} pictures in quarantine",
        ["expert", "fingerprint", "dtype", "features", "shards", "MB", "KB per image", "mean loss", "max loss"],
        [
            [
                name,
                fingerprint,
                row["dtype"],
                row["features"],
                row["shards"],
                row["bytes"] / 1e6,
                row["bytes_per_feature"] / 1e3,
                loss(row["loss"]),
                loss(row["max_loss"]),
            ]
            for name, expert in counts["experts"].items()
            for fingerprint, row in expert["fingerprints"].items()
        ],
        drop=["shards", "mean loss", "KB per image", "dtype"],
    )


@app.command("verify")
def verify(
    store: StoreArgument,
    keep: Annotated[bool, typer.Option("--keep", help="Report only: withdraw nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read every byte of a store, report and withdraw damaged features; the next precompute computes them anew.

    Exit 1 if anything is damaged. Sound features of a damaged shard move to a shard of their own; `mova store gc` deletes
    the damaged files.
    """
    silent = quiet or as_json
    with results_only(silent):
        from mova_core.features import FeatureStore
        from pipelines.progress_bar import progress_bar

        opened = FeatureStore(store, damaged=True)
        total = sum(row["features"] for row in opened.stat()["experts"].values())
        checked = 0
        with progress_bar(total, "verify", "features", not silent) as bar:

            def count(features: int) -> None:
                nonlocal checked
                checked += features
                bar.update(features)

            damaged = list(opened.verify(progress=count))
        withdrawn = 0 if keep else opened.withdraw(damaged)

    def show() -> None:
        for row in damaged:
            where = "/".join(part for part in (row["expert"], row["fingerprint"], row["shard"]) if part)
            line(f"damaged: {where} {row['key']}: {row['reason']}".replace(" :", ":"))
        line(f"{number(checked)} features checked, {number(len(damaged))} damages, {number(withdrawn)} withdrawn")
        if damaged:
            line(
                "without --keep the damaged features are withdrawn" if keep else "`mova precompute` computes them anew"
            )

    print_result({"features": checked, "damaged": damaged, "withdrawn": withdrawn}, as_json, show)
    if damaged:
        sys.exit(1)


@app.command("gc")
def gc(
    store: StoreArgument,
    grace: Annotated[
        float,
        typer.Option(
            help="Minutes for which an unreferenced file stays: more than a writer's longest pause.",
            min=0,
        ),
    ] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report what would be deleted, delete nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Delete files that crashed writers, lost races and repairs left; never a file that holds a feature."""
    with results_only(quiet or as_json):
        from mova_core.features import FeatureStore

        removed = FeatureStore(store).gc(60 * grace, dry_run)
    what = "would be deleted" if dry_run else "deleted"
    print_result(
        removed, as_json, lambda: line(f"{number(removed['files'])} files, {number(removed['bytes'] / 1e6)} MB {what}")
    )


@app.command("diff")
def diff(
    store: StoreArgument,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="The other store: a folder, or a URL.", parser=path_or_url)
    ],
    keys: Annotated[bool, typer.Option("--keys", help="Also name the images: keys, one per line.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare two stores: features that only one of them has, and features whose bytes differ."""
    with results_only(quiet or as_json):
        from mova_core.features import FeatureStore

        differences = FeatureStore(store).diff(FeatureStore(other))
        counts = [{**row, **{part: len(row[part]) for part in PARTS}} for row in differences]

    shown_keys = differences if keys else ()
    print_result(
        differences if keys else counts, as_json, lambda: show_diff(f"{store} and {other}", counts, shown_keys)
    )


def show_diff(title: str, counts: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]]) -> None:
    """Numbers of features that differ, and the image keys of `differences`, for people."""
    columns = ["expert", "fingerprint", "same", "only here", "only there", "differ"]
    table(title, columns, [list(row.values()) for row in counts])
    for row in differences:
        for part in PARTS:
            for key in row[part]:
                print(part.replace("_", "-"), row["expert"], row["fingerprint"], key)


@app.command("export")
def export(
    store: StoreArgument,
    to: Annotated[
        str,
        typer.Argument(metavar="TO", help="The other store, created if it is missing.", parser=path_or_url),
    ],
    experts: Annotated[
        str | None, typer.Option("--experts", metavar="NAME,...", help="Experts, comma-separated (default: all).")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File of image keys (sha256, hex), one per line: only these.", parser=input_file
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PATH_OR_URL",
            help="Only the images of this LLaVA JSON or JSONL, or of this folder.",
            parser=path_or_url,
        ),
    ] = None,
    images: ImagesPath = None,
    shard_mb: ShardMb = 128.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Copy features to another store, local or remote, byte for byte; a second call copies what is still missing."""
    silent = quiet or as_json
    if keys is not None and data is not None:
        raise typer.BadParameter("give --keys or --data, not both")
    with results_only(silent):
        from mova_core.features import FeatureStore
        from pipelines.progress_bar import progress_bar

        source = FeatureStore(store)
        chosen: list[str] | None = None
        if keys is not None:
            chosen = keys.read_text().split()
        elif data is not None:
            from mova_core.images import ImageRef
            from pipelines.precompute.listing import find_images

            chosen = [ImageRef(path=path).key for path in find_images(data, images)["image"].to_pylist()]
        names = names_list(experts) or list(source.experts())
        source.require_experts(names)  # before the other store is created
        with progress_bar(None, "export", "features", not silent) as bar:
            copied = source.export(
                FeatureStore(to, create=True), names, chosen, shard_bytes=int(shard_mb * 2**20), progress=bar.update
            )
    print_result(
        copied,
        as_json,
        lambda: table(f"copied to {to}", ["expert", "features"], [list(pair) for pair in copied.items()]),
    )

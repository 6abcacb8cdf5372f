"""`mova store`: ls, stat, verify, gc, diff, export."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import ImagesPath, Json, Quiet, ShardMb, StoreHere, location
from pipelines.cli.output import emit, results_only, rounded, table

app = typer.Typer(help="Look into a feature store.", no_args_is_help=True)


@app.command("ls")
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


@app.command("stat")
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


@app.command("verify")
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


@app.command("gc")
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


@app.command("diff")
def store_diff(
    store: StoreHere,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The other: a folder, or a URL.", parser=location)],
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


@app.command("export")
def store_export(
    store: StoreHere,
    to: Annotated[
        str,
        typer.Argument(metavar="TO", help="The other store, made if there is none.", parser=location),
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

"""Option types that several commands share, and the parsers of their values."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer


def location(store: str) -> str:
    """A store's folder, absolute, so that it means the same in every process; or its URL."""
    return store if "://" in store else str(Path(store).resolve())


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
StorePath = Annotated[
    str,
    typer.Option("--store", help="Feature store: a folder, or a URL (s3://, gs://, ...).", parser=location),
]
StoreHere = Annotated[
    str,
    typer.Argument(metavar="STORE", help="The store: a folder, or a URL (s3://, gs://, ...).", parser=location),
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
        "$MOVA_CACHE (default: ~/.cache/mova), of which $MOVA_CACHE_GB (default 10) are kept."
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


def weights_of(pairs: list[str], names: Sequence[str]) -> dict[str, str]:
    """Expert -> weights, of `names` only; local paths made absolute, so that they mean the same in every process."""
    given = {}
    for pair in pairs:
        name, equals, where = pair.partition("=")
        if not equals or not where or name not in names:
            raise typer.BadParameter(f"--weights {pair}: write NAME=PATH_OR_HUB_ID with NAME one of {', '.join(names)}")
        given[name] = str(Path(where).resolve()) if Path(where).exists() else where
    return given


def codecs_of(pairs: list[str], names: Sequence[str]) -> dict[str, str]:
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


def import_modules(modules: list[str]) -> None:
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


def expert_names_of(names: str | None) -> list[str]:
    from mova_core.experts import EXPERTS, expert_card

    chosen = [name.strip() for name in names.split(",")] if names else list(EXPERTS)
    try:
        for name in chosen:
            expert_card(name)
    except ValueError as error:
        raise typer.BadParameter(f"--experts: {error}") from None
    return chosen

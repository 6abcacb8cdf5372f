"""Option types that several commands share, and the parsers of their values.

`name_value` parses every NAME=VALUE pair, and `pipelines.cli.paths` every path. A pair's name is validated by `by_expert`, after `--import` has registered the user's own experts.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

import typer

from pipelines.cli.paths import hub_id_or_folder, model_folder, path_or_url
from pipelines.model_config import read_model_config

T = TypeVar("T")

SizeName = Literal["full", "mini"]
DtypeName = Literal["float32", "bfloat16", "float16"]
BadRowsName = Literal["raise", "skip"]

# Groups of options in the help of a command; options without a group come first.
DATA = "Pictures and records"
EXPERTS = "Experts"
STORE = "Store"
RUN = "Actors, devices and run"
TRAINING = "Training"
ROUTING = "Choice of experts"
OUTPUT = "Output"


@dataclass(frozen=True)
class NameValue:
    """One NAME=VALUE pair of the command line."""

    name: str
    value: str


def name_value(text: str) -> NameValue:
    """Parses NAME=VALUE; neither may be empty."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise typer.BadParameter(f"{text!r} is no NAME=VALUE")
    return NameValue(name, value)


def by_expert(
    option: str,
    pairs: Sequence[NameValue] | None,
    experts: Sequence[str],
    convert: Callable[[str], T],
) -> dict[str, T]:
    """Expert -> converted value of an option's NAME=VALUE pairs.

    Args:
        option: the option as the user typed it, for messages.
        pairs: what the user gave; None for nothing.
        experts: the names that may stand before the equals sign.
        convert: turns the value into what the command needs; raises ValueError with a message that names the form.

    Raises:
        typer.BadParameter: an unknown expert, an expert named twice, a value that `convert` refuses.
    """
    values: dict[str, T] = {}
    for pair in pairs or ():
        if pair.name not in experts:
            raise typer.BadParameter(f"{option} {pair.name}={pair.value}: NAME must be one of {', '.join(experts)}")
        if pair.name in values:
            raise typer.BadParameter(f"{option}: {pair.name} is given twice")
        try:
            values[pair.name] = convert(pair.value)
        except ValueError as error:
            raise typer.BadParameter(f"{option} {pair.name}={pair.value}: {error}") from None
    return values


def positive_count(text: str) -> int:
    """A whole number of features."""
    if not text.isdecimal():
        raise ValueError("write NAME=FEATURES, a whole number")
    return int(text)


def learning_rate(text: str) -> float:
    """A learning rate above zero."""
    try:
        if 0 < (rate := float(text)) < math.inf:
            return rate
    except ValueError:
        pass
    raise ValueError("write PART=RATE, a number above 0 such as 2e-6")


def cost_number(text: str) -> float:
    """A cost per picture, in any unit."""
    try:
        return float(text)
    except ValueError:
        raise ValueError("write NAME=NUMBER") from None


def codec_name(text: str) -> str:
    """A dtype that features can be stored in."""
    from mova_core.features.codec import CODECS

    if text not in CODECS:
        raise ValueError(f"write NAME=DTYPE with DTYPE one of {', '.join(CODECS)}")
    return text


def weights_location(text: str) -> str:
    """A local path made absolute, or a hub id with its owner."""
    try:
        location = hub_id_or_folder(text)
        if "/" not in location:
            raise typer.BadParameter(f"no file or folder {text} in {os.getcwd()}, and a hub id has the form owner/name")
        return location
    except typer.BadParameter as error:
        raise ValueError(error.message) from None


def import_modules(modules: Sequence[str] | None) -> None:
    """Imports modules that register experts, also from the current folder, which Ray's workers search as well."""
    if modules:
        sys.path.append(os.getcwd())
    for name in modules or ():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # the module exists and lacks another
            raise typer.BadParameter(
                f"--import {name}: no such module in {os.getcwd()}, installed or on PYTHONPATH"
            ) from None


def names_list(names: str | None) -> list[str]:
    """Names of a comma-separated option value."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def chosen_experts(names: str | None) -> list[str]:
    """The experts of `--experts`: registered names, the published seven by default."""
    from mova_core.experts import EXPERTS, expert_card

    chosen = names_list(names) or list(EXPERTS)
    try:
        for name in chosen:
            expert_card(name)
    except ValueError as error:
        raise typer.BadParameter(f"--experts: {error}") from None
    return chosen


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document (docs/json.md) on stdout and nothing else; no progress bars.",
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bars and no warnings of libraries.", rich_help_panel=OUTPUT)
]
StorePath = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="PATH_OR_URL",
        help="Feature store: a folder, or a URL (s3://, gs://, ...).",
        parser=path_or_url,
    ),
]
StoreArgument = Annotated[
    str,
    typer.Argument(metavar="STORE", help="Feature store: a folder, or a URL (s3://, gs://, ...).", parser=path_or_url),
]
DataPath = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="PATH_OR_URL",
        help="Records: a LLaVA JSON array, JSONL with one record a line, a Parquet file or a webdataset tar.",
        parser=path_or_url,
    ),
]
ImagesPath = Annotated[
    str | None,
    typer.Option(
        "--images",
        metavar="PATH_OR_URL",
        help="Folder that the records' pictures are relative to (default: the data file's folder).",
        parser=path_or_url,
        rich_help_panel=DATA,
    ),
]
ModelPath = Annotated[
    Path, typer.Option("--model", metavar="FOLDER", help="Folder of a MoVA model.", parser=model_folder)
]
Experts = Annotated[
    str | None,
    typer.Option(
        "--experts",
        metavar="NAME,...",
        help="Experts, comma-separated (default: the published seven).",
        rich_help_panel=EXPERTS,
    ),
]
ShardMb = Annotated[
    float, typer.Option("--shard-mb", help="Target size of a shard, MiB.", min=0.01, rich_help_panel=STORE)
]
Size = Annotated[
    SizeName,
    typer.Option(
        "--size",
        help="Size of the experts: full as published, mini for a laptop's two cores.",
        rich_help_panel=EXPERTS,
    ),
]
Weights = Annotated[
    list[NameValue] | None,
    typer.Option(
        "--weights",
        metavar="NAME=PATH_OR_HUB_ID",
        help="Weights of one expert; repeatable (default: the public weights, see `mova experts`).",
        parser=name_value,
        rich_help_panel=EXPERTS,
    ),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Module that registers an expert of your own (docs/custom_expert.md); repeatable.",
        rich_help_panel=EXPERTS,
    ),
]
BadRows = Annotated[
    BadRowsName,
    typer.Option(
        "--bad-rows",
        help="raise: stop at the first bad record; skip: leave bad records out and list them.",
        rich_help_panel=DATA,
    ),
]
Gpu = Annotated[float, typer.Option("--gpu", help="GPUs per actor, fractions allowed.", min=0, rich_help_panel=RUN)]
PoolOfModel = Annotated[
    Path | None,
    typer.Option(
        "--model",
        metavar="FOLDER",
        help="Folder of a MoVA model, which then decides --experts, --size and --dtype where these are not given.",
        parser=model_folder,
        rich_help_panel=EXPERTS,
    ),
]
OptionalSize = Annotated[
    SizeName | None,
    typer.Option(
        "--size",
        help="Size of the experts: full as published, mini for a laptop's two cores (default: --model's, else full).",
        rich_help_panel=EXPERTS,
    ),
]
OptionalDtype = Annotated[
    DtypeName | None,
    typer.Option(
        "--dtype",
        help="Dtype the experts compute in and features are stored in (default: --model's, else float32).",
        rich_help_panel=EXPERTS,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """Which experts a command runs, and how.

    Attributes:
        names: the experts.
        size: "full" or "mini".
        dtype: what they compute in.
        stored: expert -> dtype of its features in a store where that is another one.
    """

    names: list[str]
    size: SizeName
    dtype: DtypeName
    stored: dict[str, str]


def expert_settings(
    model: Path | None, experts: str | None, size: SizeName | None, dtype: DtypeName | None
) -> ExpertSettings:
    """Settings as the options say, else as the model was assembled and trained, else the published pool in float32."""
    pool: dict[str, str | None] = {}
    if model is not None:
        config = read_model_config(model)
        pool = {expert["name"]: expert.get("dtype") for expert in config.get("pool", [])}
        size = size or config.get("expert_size")
    names = chosen_experts(experts or ",".join(pool))
    trained = {name: str(pool[name]) for name in names if pool.get(name)}
    if dtype is None and len(set(trained.values())) == 1 and len(trained) == len(names):
        [common] = set(trained.values())
        dtype = common if common in get_args(DtypeName) else None  # type: ignore[assignment]
    dtype = dtype or "float32"
    return ExpertSettings(
        names=names,
        size=size or "full",
        dtype=dtype,
        stored={name: stored for name, stored in trained.items() if stored != dtype},
    )

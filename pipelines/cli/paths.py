"""Paths on the command line: what an option may name, and where a command may write.

An option that takes a path takes a URL too, or refuses the URL while the command line is parsed. `pathlib` must never see a
URL: it turns `s3://bucket/x` into the local path `s3:/bucket/x`.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from mova_core.io.uris import absolute, local_path
from pipelines.model_config import read_model_config

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # the hub keeps some ids without an owner, such as gpt2
FILE = re.compile(r".*\.(safetensors|bin|pth?|json)")

Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what an earlier run wrote there.", rich_help_panel="Output"),
]


def path_or_url(text: str) -> str:
    """A local path made absolute, so that every process of a cluster reads the same file; a URL unchanged."""
    return absolute(text)


def _local(text: str, advice: str) -> Path:
    local = local_path(text)
    if local is None:
        raise typer.BadParameter(f"{text} is a URL: {advice}")
    return Path(absolute(local))


def input_file(text: str) -> Path:
    """An existing local file."""
    path = _local(text, "this option reads a local file; download it first")
    if not path.is_file():
        raise typer.BadParameter(f"{path} is a folder: name a file" if path.is_dir() else f"no file {path}")
    return path


def input_folder(text: str) -> Path:
    """An existing local folder."""
    path = _local(text, "this option reads a local folder; download it first")
    if not path.is_dir():
        raise typer.BadParameter(f"{path} is a file: name a folder" if path.exists() else f"no folder {path}")
    return path


def model_folder(text: str) -> Path:
    """The local folder of a MoVA model."""
    path = input_folder(text)
    try:
        read_model_config(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return path


def hub_id_or_folder(text: str) -> str:
    """A local file or folder made absolute, else the id of a repository on the hub."""
    local = _local(text, "give a local path or a hub id")
    if local.exists():
        return str(local)
    if not HUB_ID.fullmatch(text) or FILE.fullmatch(text):
        raise typer.BadParameter(f"no file or folder {local}, and {text} is no hub id (owner/name)")
    return text


def output_path(text: str) -> Path:
    """A local path that a command writes to."""
    return _local(text, "this option writes to a local path; upload the result afterwards")


def check_output_folder(option: str, folder: Path, overwrite: bool, inputs: Sequence[object] = ()) -> None:
    """Refuses a folder that a command must not write before the command's work begins.

    A folder that holds something is replaced as a whole, so --overwrite applies only to a MoVA model, and to none that
    holds what the command reads.

    Args:
        option: the option or argument as the user knows it, for messages.
        folder: absolute, see `output_path`.
        overwrite: whether the user gave --overwrite.
        inputs: paths that the command reads; URLs and None are skipped.

    Raises:
        typer.BadParameter: the folder is a file, not empty without --overwrite, no MoVA model, holds one of `inputs`, or
            cannot be made.
    """
    where = f"{option} {folder}"
    if not os.path.lexists(folder):
        return _check_parent(where, folder)
    if not folder.is_dir():
        raise typer.BadParameter(f"{where} is a file: name a folder that is missing or empty")
    held = sorted(path.name for path in folder.iterdir())
    if not held:
        return _check_parent(where, folder)
    if not overwrite:
        raise typer.BadParameter(
            f"{where} is not empty: choose a folder that is missing or empty, or replace this one with --overwrite"
        )
    for path in inputs:
        local = None if path is None else local_path(str(path))
        if local is not None and Path(absolute(local)).is_relative_to(folder):
            raise typer.BadParameter(
                f"{where}: this command reads {local}, which would be deleted: name another folder"
            )
    try:
        read_model_config(folder)
    except ValueError:
        raise typer.BadParameter(
            f"{where}: --overwrite replaces only a folder of a MoVA model, and this one holds {', '.join(held[:3])}"
            f"{', ...' if len(held) > 3 else ''}: empty it yourself, or name another"
        ) from None
    _check_parent(where, folder)


def check_demo_folder(folder: Path) -> None:
    """Refuses a folder in which `mova demo` would write among other things: its own folder holds `data`.

    Raises:
        typer.BadParameter: the folder is a file, or holds something and no demo.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "data").is_dir()):
        raise typer.BadParameter(
            f"--folder {folder}: choose a folder that is missing or empty, or one of an earlier demo"
        )


def check_output_file(
    option: str, file: Path | None, overwrite: bool, replaceable: Callable[[Path], bool] = lambda _: False
) -> None:
    """Refuses a file that a command must not write before the command's work begins; makes the folder of the file.

    Args:
        option, overwrite: as `check_output_folder` takes them.
        file: absolute, see `output_path`; None where the option is not given.
        replaceable: whether an existing file may be replaced without --overwrite, because the same command wrote it.

    Raises:
        typer.BadParameter: the file is a folder, exists without --overwrite, or cannot be written.
    """
    if file is None:
        return
    where = f"{option} {file}"
    if file.is_dir():
        raise typer.BadParameter(f"{where} is a folder: name a file")
    if os.path.lexists(file) and not overwrite and not replaceable(file):
        raise typer.BadParameter(f"{where} exists: name another file, or replace this one with --overwrite")
    _check_parent(where, file)
    file.parent.mkdir(parents=True, exist_ok=True)


def drawn_by(software: str) -> Callable[[Path], bool]:
    """Says whether a command drew a PNG, as that file's metadata name the command: it may be replaced without --overwrite."""

    def is_picture(file: Path) -> bool:
        from PIL import Image

        try:
            with Image.open(file) as picture:
                return picture.info.get("Software") == software
        except OSError:
            return False

    return is_picture


def _check_parent(where: str, path: Path) -> None:
    """Refuses a path whose nearest existing folder cannot be written."""
    parent = next(folder for folder in path.parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise typer.BadParameter(f"{where}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise typer.BadParameter(f"{where}: no right to write in {parent}")

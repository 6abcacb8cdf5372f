"""The help of every command: whole option names and whole texts in a terminal of 80 columns."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mova_core import __version__
from pipelines.cli.main import app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_cuts_nothing(path):
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in result.output and "--debug" in result.output
    shown = " ".join(result.output.split())
    if path == ("precompute",):
        return  # the help of `precompute run`, whose name may be left out
    for parameter in COMMANDS[path].params:
        names = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
        assert all(any(line.lstrip().startswith(name) or f" {name}" in line for line in lines) for name in names)
        assert " ".join((parameter.help or "").split()) in shown
    for name, child in getattr(COMMANDS[path], "commands", {}).items():
        assert " ".join(child.help.split("\n\n")[0].split()) in shown, name


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_json_and_quiet(path):
    names = {name for parameter in COMMANDS[path].params for name in parameter.opts}
    assert hasattr(COMMANDS[path], "commands") or {"--json", "--quiet"} <= names


def test_options_of_one_stage_stand_only_there():
    shown = {
        stage: CliRunner().invoke(app, ["train", stage, "--help"]).output
        for stage in ("pretrain", "sft", "router", "light-router")
    }
    for stage, text in shown.items():
        assert ("--lora-rank" in text) == ("--shuffle-pool" in text) == (stage in ("router", "sft"))
    assert "default: 1024" in shown["pretrain"] and "default: 0.001;" in shown["light-router"]


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"mova {__version__}\n")


def test_the_command_line_imports_nothing_heavy():
    heavy = ("torch", "ray", "transformers", "pyarrow", "fsspec", "numpy", "rich")
    code = f"import sys, pipelines.cli.main; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

"""The `mova` command. Heavy imports stand inside the commands, so that `mova --help` is instant.

Exit codes: 0 when all of it worked, 2 for a usage error, 130 for Ctrl-C, 1 with one clear line for anything else.
"""

import signal
import sys
from typing import Annotated

import typer

from cluster.environment import set_for_command
from mova_core import __version__
from pipelines.cli import ask, convert, demo, evaluate, experts, init, label, plan, precompute, profile, store, train
from pipelines.cli.help import App
from pipelines.errors import is_ours, root_cause

# Package that a command imports -> extra of this distribution that installs the package.
EXTRAS = {
    "ray": "ray,train",
    "psutil": "ray",
    "yaml": "ray",
    "scipy": "ray",
    **dict.fromkeys(("skimage", "sklearn", "matplotlib", "vega_datasets", "pydicom"), "demo"),
}
FEATURES, MODELS, USE = "Experts and their features", "Models", "Use"  # groups of commands in the help

app = App(
    name="mova", help="MoVA on Ray: precompute expert features, train the router and the model, ask and evaluate."
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mova {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Options of `mova` itself; `main` takes --debug from any place of the command line."""


app.command(rich_help_panel=FEATURES)(experts.experts)
app.command(rich_help_panel=FEATURES)(profile.profile)
app.command(rich_help_panel=FEATURES)(plan.plan)
app.add_typer(precompute.app, name="precompute", rich_help_panel=FEATURES)
app.add_typer(store.app, name="store", rich_help_panel=FEATURES)
app.command(rich_help_panel=MODELS)(init.init)
app.command(rich_help_panel=MODELS)(convert.convert)
app.command(rich_help_panel=MODELS)(label.label)
app.add_typer(train.app, name="train", rich_help_panel=MODELS)
app.command(rich_help_panel=USE)(ask.ask)
app.command(rich_help_panel=USE)(evaluate.evaluate)
app.command(rich_help_panel=USE)(demo.demo)


def main() -> None:
    """Entry point of the console script."""
    set_for_command()
    debug = "--debug" in sys.argv
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end, so that no actor stays behind
    try:
        app(argv)  # usage errors end in here, with code 2
    except Exception as error:
        if debug:
            raise
        print(f"mova: {_one_line(root_cause(error))}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: BaseException) -> str:
    """What is wrong, for the user: a message of this project as it stands, any other with its type."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").split(".")[0]
        if package in EXTRAS:
            return f"this command needs the package {package}: pip install 'mova-ray[{EXTRAS[package]}]'"
    text = " ".join(str(error).split())
    return text if text and is_ours(error) else f"{type(error).__name__}: {text} (a traceback: --debug)"


if __name__ == "__main__":
    main()

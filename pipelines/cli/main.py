"""The `mova` command. Heavy imports stand inside the commands, so that `mova --help` is instant.

Exit codes: 0 when all of it worked, 2 for a usage error, 1 with one clear line for anything else.
"""

import signal
import sys

import typer

from pipelines.cli import ask, convert, demo, evaluate, experts, label, plan, precompute, profile, store, train
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
app.add_typer(precompute.app, name="precompute")
app.add_typer(train.app, name="train")
app.add_typer(store.app, name="store")
app.command()(experts.experts)
app.command()(profile.profile)
app.command()(plan.plan)
app.command()(label.label)
app.command()(evaluate.evaluate)
app.command()(ask.ask)
app.command()(convert.convert)
app.command()(demo.demo)


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


if __name__ == "__main__":
    main()

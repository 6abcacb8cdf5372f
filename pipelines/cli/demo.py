"""`mova demo`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.evaluate import show_kinds
from pipelines.cli.options import Json, Quiet
from pipelines.cli.output import emit, results_only, say


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

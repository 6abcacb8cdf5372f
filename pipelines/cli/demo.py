"""`mova demo`."""

from pathlib import Path
from typing import Annotated

import typer

from mova_core.figures import number
from pipelines.cli.evaluate import show_kinds
from pipelines.cli.options import Json, Quiet
from pipelines.cli.output import line, log_line, print_result, results_only
from pipelines.cli.paths import check_demo_folder, output_path


def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for data, store, models and report (default: mova/demo in the user's cache folder).",
            parser=output_path,
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures to draw.", min=60)] = 480,
    seed: Annotated[int, typer.Option(help="Of the data, the sample order and every random choice.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the whole path on real pictures in minutes: precompute, train, route, answer, and write a report."""
    silent = quiet or as_json
    with results_only(silent, resumes=True):
        from mova_core.io.cache import cache_folder

        chosen = folder or cache_folder("demo")
        check_demo_folder(chosen)

        from pipelines.demo.run import DemoConfig
        from pipelines.demo.run import demo as run_demo

        result = run_demo(DemoConfig(folder=str(chosen), images=images, seed=seed), progress=not silent, log=log_line)

    def show() -> None:
        show_kinds(result["kinds"])
        line(
            "The vision experts of this demo are frozen random networks and its LLM is a small one trained just now: the "
            "accuracy shows that the parts work together, not what MoVA can do."
        )
        line(
            f"{number(result['features_computed'])} features computed, {number(result['features_reused'])} reused; "
            f"{number(result['seconds'])} s, peak memory {number(result['peak_bytes'] / 2**30)} GiB; report: {chosen / 'report.html'}"
        )
        for row in result["quarantined"]:
            line(f"quarantined {row['path']}: {row['reason']}")

    print_result(result, as_json, show)

"""`mova convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mova_core.figures import number
from pipelines.cli.options import Json, Quiet
from pipelines.cli.output import line, print_result, results_only, table
from pipelines.cli.paths import Overwrite, check_output_folder, hub_id_or_folder, input_folder, output_path


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder to read.", parser=input_folder)],
    target: Annotated[
        Path,
        typer.Argument(metavar="TARGET", help="Folder to write.", parser=output_path),
    ],
    to_published: Annotated[
        bool,
        typer.Option(
            "--to-published",
            help="Turn a model that came from a published folder back, bit for bit; other models cannot go back.",
        ),
    ] = False,
    experts: Annotated[
        str,
        typer.Option(
            "--experts",
            metavar="keep|drop|NAME,...",
            help="Experts' weights in the published folder: keep all, drop all, or keep the named ones, in experts/NAME.",
        ),
    ] = "keep",
    text_encoder: Annotated[
        str | None,
        typer.Option(
            "--text-encoder",
            metavar="FOLDER_OR_HUB_ID",
            help="Tokenizer of the adapter's text encoder (default: the one that config.json names).",
            parser=hub_id_or_folder,
        ),
    ] = None,
    chat_format: Annotated[
        str | None,
        typer.Option(help="Published conversation format (default: by the tokenizer's special tokens)."),
    ] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest weights file, GB.", min=0.001)] = 4.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every name and shape, write nothing.")] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn a published MoVA folder into this project's format, or back.

    Memory does not grow with the model. conversion.json accounts for every tensor; a missing, unknown or misshapen tensor is
    an error that names it.
    """
    with results_only(quiet or as_json):
        from mova_core import checkpoint
        from mova_core.chat_formats import CHAT_FORMATS
        from pipelines.progress_bar import progress_bar

        if chat_format is not None and chat_format not in CHAT_FORMATS:
            raise typer.BadParameter(f"--chat-format {chat_format}: choose one of {', '.join(CHAT_FORMATS)}")
        try:
            kept_experts = checkpoint.chosen_experts(experts)
        except ValueError as error:
            raise typer.BadParameter(f"--experts: {error}") from None
        check_output_folder("TARGET", target, overwrite, (source,))
        with progress_bar(None, "convert", "B", not (quiet or as_json)) as bar:
            bar.unit_scale = True
            common: dict[str, Any] = {
                "shard_gb": shard_gb,
                "dry_run": dry_run,
                "overwrite": overwrite,
                "progress": bar.update,
                "begin": bar.reset,
            }
            if to_published:
                report = checkpoint.convert_back(source, target, **common)
            else:
                common |= {"experts": kept_experts, "text_encoder": text_encoder, "chat_format": chat_format}
                report = checkpoint.convert(source, target, **common)

    print_result(report, as_json, lambda: show_report(report, dry_run))


def show_report(report: dict[str, Any], dry_run: bool) -> None:
    """Sums of a conversion by part, for people."""
    table(
        f"{report['source']} -> {report['target']}" + (", nothing written" if dry_run else ""),
        ["part", "tensors", "M params", "MB", "MB written"],
        [
            [part, row["tensors"], *(row[key] / 1e6 for key in ("parameters", "bytes", "written"))]
            for part, row in report["parts"].items()
        ],
    )
    noted = sum("note" in row for row in report["tensors"])
    where = "" if dry_run else f": {report['target']}/conversion.json"
    line(f"{number(len(report['tensors']))} names, {number(noted)} with a note{where}")
    for name in report.get("left_out", ()):
        line(f"left out, as the published form has no place for it: {name}")

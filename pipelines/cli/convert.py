"""`mova convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.options import Json, Quiet
from pipelines.cli.output import emit, results_only, table


def convert(
    source: Annotated[Path, typer.Argument(help="Folder to read.", exists=True, file_okay=False)],
    target: Annotated[Path, typer.Argument(help="Folder to make; it must not be there, or be empty.")],
    to_published: Annotated[
        bool, typer.Option("--to-published", help="From ours to the published form, instead of to ours.")
    ] = False,
    experts: Annotated[
        str,
        typer.Option("--experts", help="keep, drop, or the names to keep, comma-separated; they go to experts/NAME."),
    ] = "keep",
    text_encoder: Annotated[
        str | None,
        typer.Option(
            "--text-encoder",
            help="Folder or hub id with the tokenizer of the adapter's text encoder (default: as config.json says).",
        ),
    ] = None,
    chat_format: Annotated[
        str | None,
        typer.Option(help="Published conversation format (default: the one that the tokenizer's marks tell)."),
    ] = None,
    shard_gb: Annotated[float, typer.Option(help="Largest weights file, GB.", min=0.001)] = 4.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every name and shape, write nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Turn a published MoVA folder into ours, or ours into a published one. Memory does not grow with the model.

    Every tensor is accounted for in conversion.json; a missing, unknown or misshapen one is an error that names it.
    """
    with results_only():
        from mova_core import checkpoint
        from mova_core.chat_formats import CHAT_FORMATS
        from pipelines.progress_bar import progress_bar

        if chat_format is not None and chat_format not in CHAT_FORMATS:
            raise typer.BadParameter(f"--chat-format {chat_format}: there are {', '.join(CHAT_FORMATS)}")
        try:
            kept = checkpoint.chosen_experts(experts)
        except ValueError as error:
            raise typer.BadParameter(f"--experts: {error}") from None
        with progress_bar(None, "convert", "B", not quiet) as bar:
            bar.unit_scale = True
            common: dict[str, Any] = {
                "shard_gb": shard_gb,
                "dry_run": dry_run,
                "progress": bar.update,
                "begin": bar.reset,
            }
            if to_published:
                report = checkpoint.convert_back(source, target, **common)
            else:
                common |= {"experts": kept, "text_encoder": text_encoder, "chat_format": chat_format}
                report = checkpoint.convert(source, target, **common)

    def show() -> None:
        noted = sum("note" in row for row in report["tensors"])
        table(
            f"{source} -> {target}" + (", nothing written" if dry_run else ""),
            ["part", "tensors", "M params", "MB", "MB written"],
            [
                [
                    part,
                    row["tensors"],
                    round(row["parameters"] / 1e6, 2),
                    *(round(row[key] / 1e6, 2) for key in ("bytes", "written")),
                ]
                for part, row in report["parts"].items()
            ],
        )
        print(
            f"{len(report['tensors'])} names, {noted} with a note" + ("" if dry_run else f": {target}/conversion.json")
        )
        for name in report.get("left_out", ()):
            print(f"left out, as the published form has no place for it: {name}")

    emit(report, as_json, show)

"""`mova init`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mova_core.figures import number
from pipelines.cli.options import Imports, Json, Quiet, Size, import_modules, names_list
from pipelines.cli.output import line, print_result, results_only
from pipelines.cli.paths import Overwrite, check_output_folder, hub_id_or_folder, output_path

TEXT_ENCODER = "google-bert/bert-large-uncased"  # of the published adapter; mova_core.start_model names it too


def init(
    llm: Annotated[
        str,
        typer.Option(
            "--llm",
            metavar="FOLDER_OR_HUB_ID",
            help="Causal LM of transformers, with its tokenizer.",
            parser=hub_id_or_folder,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="FOLDER", help="Folder that the start model is written to.", parser=output_path
        ),
    ],
    text_encoder: Annotated[
        str,
        typer.Option(
            "--text-encoder",
            metavar="FOLDER_OR_HUB_ID",
            help="BERT model, with its tokenizer, that reads the question for the adapter's gate.",
            parser=hub_id_or_folder,
        ),
    ] = TEXT_ENCODER,
    size: Size = "full",
    base_weights: Annotated[
        str | None,
        typer.Option(
            "--base-weights",
            metavar="PATH_OR_HUB_ID",
            help="Weights of the base encoder (default: CLIP ViT-L/14-336 at size full, fixed random ones at size mini).",
            parser=hub_id_or_folder,
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts", metavar="NAME,...", help="Pool of experts in routing order (default: the published seven)."
        ),
    ] = None,
    imports: Imports = None,
    chat_format: Annotated[
        str | None,
        typer.Option(help="Published conversation format, instead of the chat template of the LLM's tokenizer."),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Build the model that pre-training starts from: a causal LM, a text encoder and a base encoder with a fresh adapter.

    The LLM's tokenizer gets an <image> token, and a pad token and a chat template if it has none.
    """
    with results_only(quiet or as_json):
        check_output_folder("--output", output, overwrite, (llm, text_encoder, base_weights))
        from mova_core.chat_formats import CHAT_FORMATS
        from mova_core.experts import EXPERTS
        from mova_core.io.atomic import atomic_path
        from mova_core.start_model import build_start_model

        import_modules(imports)
        if chat_format is not None and chat_format not in CHAT_FORMATS:
            raise typer.BadParameter(f"--chat-format {chat_format}: choose one of {', '.join(CHAT_FORMATS)}")
        model, processor = build_start_model(
            llm,
            text_encoder,
            size,
            pool=names_list(experts) or EXPERTS,
            base_weights=base_weights,
            chat_format=chat_format,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(output) as draft:
            model.save_pretrained(draft)
            processor.save_pretrained(draft)
    result: dict[str, Any] = {
        "output": str(output),
        "size": size,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "experts": list(model.config.experts),
        "image_tokens": model.config.image_tokens,
        "routing_tokens": model.config.routing_tokens,
    }

    def show() -> None:
        line(f"{output}: {number(result['parameters'] / 1e6)} M parameters in {result['dtype']}, {size} experts")
        line(
            f"{result['image_tokens']} visual tokens per picture in the answer, {result['routing_tokens']} in the routing"
        )
        line(f"next: mova precompute DATA --store STORE --model {output}")
        line(f"      mova train pretrain --data DATA --store STORE --model {output} --output OUTPUT")

    print_result(result, as_json, show)

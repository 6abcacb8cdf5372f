"""The model that pre-training starts from: a causal LM, a BERT text encoder and CLIP, joined by a fresh adapter.

`mova init` is this function and two `save_pretrained` calls.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel

from mova_core.assemble import assemble
from mova_core.data import IMAGE_MARK
from mova_core.experts import EXPERTS, WeightsError
from mova_core.experts.weights import hub_problem
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor, prepare_tokenizer

TEXT_ENCODER = "google-bert/bert-large-uncased"  # of the published adapter


def build_start_model(
    llm: str | os.PathLike[str],
    text_encoder: str | os.PathLike[str] = TEXT_ENCODER,
    size: Literal["full", "mini"] = "full",
    *,
    pool: Sequence[str] = EXPERTS,
    base_weights: str | os.PathLike[str] | None = None,
    blocks: int = 3,
    routing_grid: int | None = None,
    chat_format: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[MoVAForConditionalGeneration, MoVAProcessor]:
    """Builds a MoVA from public parts; save both results into one folder with `save_pretrained`.

    The LLM's tokenizer gets an `<image>` token, a pad token and a chat template where it lacks them. No code of a model
    repository is ever run (`trust_remote_code=False`).

    Args:
        llm: hub id or folder of a causal LM with its tokenizer.
        text_encoder: hub id or folder of a BERT model with its tokenizer; its [CLS] feature of the question drives the
            adapter's gate.
        size: size of the base encoder and of the experts. "mini" has a fixed random base encoder and needs no download
            beyond the two arguments above.
        pool: expert names in routing order.
        base_weights: weights of the base encoder as `load_expert` takes them; default its public ones (CLIP ViT-L/14-336).
        blocks: blocks of the adapter.
        routing_grid: side of the grid of visual tokens in the routing pass; default half the answer pass's side.
        chat_format: one of `CHAT_FORMATS`, instead of the chat template of the LLM's tokenizer.
        dtype: of all parameters; default the dtype of the LLM's weights.

    Returns:
        The model in eval mode on the CPU, and its processor.

    Raises:
        WeightsError: a part that cannot be found, read or fitted.
        ValueError: an unknown size, expert or chat format, a tokenizer without an end-of-sequence token, or an LLM whose
            context is too short for one picture.
    """
    tokenizer = _load("LLM's tokenizer", llm, AutoTokenizer.from_pretrained)
    text_tokenizer = _load("text encoder's tokenizer", text_encoder, AutoTokenizer.from_pretrained)
    language_model = _load("LLM", llm, AutoModelForCausalLM.from_pretrained, dtype=dtype or "auto")
    bert = _load("text encoder", text_encoder, BertModel.from_pretrained, add_pooling_layer=False)
    prepare_tokenizer(tokenizer, chat_format)
    model = assemble(
        language_model,
        bert,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_MARK),
        pool=pool,
        size=size,
        base_weights=None if base_weights is None else str(base_weights),
        blocks=blocks,
        routing_grid=routing_grid,
    )
    context = getattr(model.config.text_config, "max_position_embeddings", None)
    if context is not None and context <= model.config.image_tokens:
        raise ValueError(f"{llm} reads {context} tokens, but one picture takes {model.config.image_tokens}")
    processor = MoVAProcessor.for_model(model, tokenizer, text_tokenizer, chat_format=chat_format)
    return model.to(language_model.dtype).eval(), processor


def _load(part: str, source: str | os.PathLike[str], load: Callable[..., Any], **options: Any) -> Any:
    """One part from its hub id or folder.

    Raises:
        WeightsError: the part cannot be loaded; the message gives the library's reason in one line.
    """
    try:
        return load(source, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:  # what transformers, tokenizers and huggingface_hub raise
        if not os.path.exists(source):
            raise WeightsError(f"the {part} {os.fspath(source)} cannot be loaded: {hub_problem(error)}") from error
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"the {part} in {os.fspath(source)} cannot be loaded ({reason}): pass a folder that `save_pretrained` wrote"
        ) from error

"""config.json and tokenizers of a published MoVA -> `MoVAConfig` and the parts of a `MoVAProcessor`."""

import json
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoTokenizer, BertConfig, PreTrainedTokenizerBase

from mova_core.adapter import AdapterConfig
from mova_core.checkpoint.names import ADAPTER, LLM, PublishedParts
from mova_core.config import MoVAConfig
from mova_core.experts import BASE, EXPERTS, WeightsError, expert_card
from mova_core.model import MoVAForConditionalGeneration


def read_published_config(folder: Path) -> dict[str, Any]:
    """config.json of a published MoVA.

    Raises:
        WeightsError: no readable config.json, or one of another model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: its config.json cannot be read ({error}); pass the published folder") from None
    needed = ("mm_hidden_size", "image_feat_size", "expert_channels", "num_projector_layers", "hidden_size")
    if absent := [key for key in needed if key not in config]:
        raise WeightsError(f"{folder}: config.json has no {', '.join(absent)}, so this is no published MoVA")
    if len(config["expert_channels"]) != len(EXPERTS):
        raise WeightsError(
            f"{folder}: expert_channels has {len(config['expert_channels'])} numbers, not {len(EXPERTS)}"
        )
    return config


def our_config(
    published: Mapping[str, Any], parts: PublishedParts, text_encoder: Mapping[str, Any], image_token_id: int
) -> MoVAConfig:
    """The `MoVAConfig` of a published config.

    Args:
        published: from `read_published_config`.
        parts: of the same checkpoint; meta tensors do.
        text_encoder: fields of the adapter's BertConfig.
        image_token_id: of `IMAGE_MARK` in the LLM's tokenizer.

    Raises:
        WeightsError: an LLM that transformers does not have.
    """
    not_the_llms = {"architectures", "auto_map", "model_type", "transformers_version", "_name_or_path", "expert_archs"}
    not_the_llms |= {"expert_channels", "image_feat_size", "topk_experts", "topk", "image_aspect_ratio", "use_mm_proj"}
    not_the_llms |= {"num_projector_layers", "num_routing_tokens"}
    text = {key: value for key, value in published.items() if key not in not_the_llms and not key.startswith("mm_")}
    kind = re.sub(r"^(mova|llava)_", "", published.get("model_type", "llama"))
    if kind not in CONFIG_MAPPING:
        raise WeightsError(f"config.json: model_type {published['model_type']!r} names no LLM that transformers has")
    grid, width = published["image_feat_size"], published["mm_hidden_size"]
    base = parts.archs.get(BASE, dict(expert_card(BASE).full))
    adapter = AdapterConfig(
        expert_channels=dict(zip(EXPERTS, published["expert_channels"], strict=True)),
        out_width=published["hidden_size"],
        width=width,
        grid=grid,
        blocks=published["num_projector_layers"],
        topk=published.get("topk_experts", published.get("topk", 3)),
        text_encoder=text_encoder,
        text_width=text_encoder["hidden_size"],
        freeze_text_encoder=published.get("mm_projector_freeze_text_encoder", False),
    )
    dtype = next((tensor.dtype for tensor in parts.get(LLM, {}).values()), torch.float32)
    return MoVAConfig(
        text_config=CONFIG_MAPPING[kind](**text),
        base_arch=base | {"image_size": grid * base["patch_size"]},
        pool=[
            {"name": name, "channels": channels, "description": expert_card(name).description}
            for name, channels in adapter.expert_channels.items()
        ],
        adapter=adapter.to_dict(),
        image_token_id=image_token_id,
        routing_grid=isqrt(published.get("num_routing_tokens", 144)),
        architectures=[MoVAForConditionalGeneration.__name__],
        dtype=str(dtype).removeprefix("torch."),
    )


def read_llm_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer in a published folder.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the tokenizer's library does
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{source}: its tokenizer cannot be read ({reason}); copy the LLM's there") from error
    return tokenizer


def read_text_encoder(name: str | None, parts: PublishedParts) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """The tokenizer of the adapter's text encoder, and its config: from `name`, a folder or hub id, or from the shapes.

    Raises:
        WeightsError: no name, or no readable tokenizer.
    """
    if not name:
        raise WeightsError("config.json names no text encoder: pass --text-encoder FOLDER with its tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"the text encoder's tokenizer {name} cannot be read ({reason}): pass --text-encoder FOLDER that holds it"
        ) from error
    try:
        fields, _ = BertConfig.get_config_dict(name)
    except OSError:
        fields = {}
    if "hidden_size" in fields:
        config = BertConfig.from_dict(fields)
    else:
        shapes = {key: tensor.shape for key, tensor in parts.get(ADAPTER, {}).items()}
        bert = "text_encoder.bert."
        words, width = shapes.get(f"{bert}embeddings.word_embeddings.weight", (30522, 1024))
        layers = {key.split(".")[4] for key in shapes if key.startswith(f"{bert}encoder.layer.")}
        config = BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=len(layers) or 24,
            num_attention_heads=max(1, width // 64),
            intermediate_size=shapes.get(f"{bert}encoder.layer.0.intermediate.dense.weight", (4 * width,))[0],
            max_position_embeddings=shapes.get(f"{bert}embeddings.position_embeddings.weight", (512,))[0],
        )
    return tokenizer, config.to_diff_dict() | {"hidden_size": config.hidden_size}


def detect_chat_format(tokenizer: PreTrainedTokenizerBase) -> str:
    """The published format of the LLM whose marks the tokenizer has."""
    words = tokenizer.get_vocab()
    return "mova_llama3" if "<|start_header_id|>" in words else "chatml" if "<|im_start|>" in words else "vicuna_v1"

"""A MoVA put together from its parts, and a batch's features put together for its adapter."""

import copy
from collections.abc import Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mova_core.adapter import AdapterConfig
from mova_core.config import MoVAConfig
from mova_core.experts import BASE, EXPERTS, Features, expert_card, load_expert
from mova_core.model import MoVAForConditionalGeneration


def assemble(
    language_model: PreTrainedModel,
    text_encoder: PretrainedConfig | PreTrainedModel,
    *,
    image_token_id: int,
    pool: Sequence[str] = EXPERTS,
    size: str = "full",
    base_weights: str | None = None,
    blocks: int = 3,
    routing_grid: int | None = None,
) -> MoVAForConditionalGeneration:
    """A MoVA to start pre-training from: an LLM, a base encoder with its weights, and a fresh adapter for a pool of experts.

    Args:
        language_model: any causal LM of transformers; taken over, not copied.
        text_encoder: the adapter's text encoder, a `BertModel` whose weights are copied; or its `BertConfig`, for fresh ones.
        image_token_id: the LLM's token that stands for one visual token.
        pool: expert names in routing order.
        size, base_weights: as `load_expert` takes them, for the base encoder; `size` also for the pool's channels.
        routing_grid: default half the answer pass's side (published: 24 and 12).
    """
    bert_config = text_encoder.config if isinstance(text_encoder, PreTrainedModel) else text_encoder
    base = load_expert(BASE, weights=base_weights, size=size)
    archs = {name: expert_card(name).mini if size == "mini" else expert_card(name).full for name in pool}
    adapter = AdapterConfig(
        expert_channels={name: arch["channels"] for name, arch in archs.items()},
        out_width=language_model.config.hidden_size,
        width=base.channels,
        grid=base.grid[0],
        blocks=blocks,
        text_encoder=bert_config.to_diff_dict()
        | {"hidden_size": bert_config.hidden_size, "vocab_size": bert_config.vocab_size},
        text_width=bert_config.hidden_size,
    )
    config = MoVAConfig(
        # A copy: MoVAConfig resets the attention implementation of its parts, and the LLM would read no mask.
        text_config=copy.deepcopy(language_model.config),
        base_arch=base.arch,
        pool=[
            {"name": name, "channels": archs[name]["channels"], "description": expert_card(name).description}
            for name in pool
        ],
        adapter=adapter.to_dict(),
        image_token_id=image_token_id,
        expert_size=size,
        routing_grid=routing_grid or base.grid[0] // 4,
    )
    model = MoVAForConditionalGeneration(config, language_model)
    model.base_encoder.load_state_dict(base.state_dict())
    if isinstance(text_encoder, PreTrainedModel):
        fresh = model.adapter.text_encoder.bert
        weights = text_encoder.state_dict()
        fresh.load_state_dict({name: weights[name] for name in fresh.state_dict()})
    return model


def stack_features(
    rows: Sequence[Mapping[str, Features]], pool: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Features]:
    """Features per picture to features per expert, holding only the rows that have them, as `MoVAdapter` takes them.

    Raises:
        ValueError: features of one expert that differ in grid or channels.
    """
    stacked = {}
    for name in pool:
        have = [row[name] for row in rows if name in row]
        if sizes := {(features.grid, tuple(features.tokens.shape)) for features in have}:
            if len(sizes) > 1:
                listed = "; ".join(f"grid {grid[0]}x{grid[1]} with tokens {shape}" for grid, shape in sorted(sizes))
                raise ValueError(f"{name}: features of one batch differ: {listed}")
            tokens = torch.stack([features.tokens for features in have]).to(device, dtype, non_blocking=True)
            stacked[name] = Features(tokens, have[0].grid)
    return stacked

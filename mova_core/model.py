"""MoVAForConditionalGeneration: base encoder, MoV-Adapter and LLM. The vision experts are not inside: their features come in.

Legend: B rows, L tokens, M pictures, N base tokens, E experts of the pool, D the LLM's width.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from mova_core.adapter import AdapterConfig, MoVAdapter
from mova_core.config import MoVAConfig
from mova_core.experts import BASE, EXPERTS, Features, expert_card, expert_class, load_expert

ROUTING_LORA = "expert_routing_lora"  # the peft adapter's name, and its folder in a checkpoint


class MoVAForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """MoVA without its experts.

    `forward` takes what `MoVAProcessor` makes plus the routed experts' features; the LLM sees each picture as
    `config.image_tokens` tokens, or `config.routing_tokens` in a routing pass.
    """

    config_class = MoVAConfig
    base_model_prefix = "mova"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MoVAConfig):
        super().__init__(config)
        self.base_encoder = expert_class(BASE)(config.base_arch)
        self.adapter = MoVAdapter(AdapterConfig(**config.adapter))
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Parts of the adapter that a checkpoint lacks start as the published ones do; the LLM and CLIP know their own way."""
        reset = getattr(module, "reset_parameters", None)
        if reset is not None and type(module).__module__ == MoVAdapter.__module__:
            reset()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_output_embeddings()

    def encode_base(self, pixel_values: Tensor) -> Tensor:
        """Pixels (M, 3, S, S) to the base encoder's tokens (M, N, C)."""
        return self.base_encoder({"pixel_values": pixel_values}).tokens

    def encode_image(
        self,
        base: Tensor,
        text: Mapping[str, Tensor] | Tensor,
        experts: Mapping[str, Features] | None = None,
        routing: Tensor | None = None,
        coarse: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Fuses the routed experts into the base tokens.

        Args:
            base: (M, N, C) from `encode_base`.
            text: the gate's text, tokens or features, as `MoVAdapter` takes it.
            experts: features by expert name, as `MoVAdapter` takes them.
            routing: bool (M, E) in pool order; None routes to no expert.
            coarse: pool the tokens to the routing pass's grid.

        Returns:
            visual tokens (M, `config.image_tokens` or `config.routing_tokens`, D), and the gate weights (M, E) of every block.
        """
        if routing is None:
            routing = torch.zeros(len(base), len(self.config.pool), dtype=torch.bool, device=base.device)
        tokens, gates = self.adapter(base, experts or {}, routing, text, return_gates=True)
        if coarse:
            side = self.config.adapter["grid"] // 2
            plane = tokens.transpose(1, 2).unflatten(2, (side, side))
            tokens = F.adaptive_avg_pool2d(plane, self.config.routing_grid).flatten(2).transpose(1, 2)
        return tokens, gates

    def embed(self, input_ids: Tensor, visual: Tensor | None) -> Tensor:
        """Token embeddings (B, L, D) with the pictures' tokens (M, n, D), in reading order, where `image_token_id` stands.

        Raises:
            ValueError: the number of image tokens and of visual tokens differ.
        """
        places = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(places, 0))  # the LLM may have no such token
        count = 0 if visual is None else visual.shape[0] * visual.shape[1]
        if int(places.sum()) != count:
            raise ValueError(f"the text has {int(places.sum())} image tokens but the pictures give {count}")
        return embeds if visual is None else embeds.masked_scatter(places.unsqueeze(-1), visual.to(embeds.dtype))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        text_input_ids: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        experts: Mapping[str, Features] | None = None,
        routing: Tensor | None = None,
        coarse: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """LM logits (B, L, V), and with `labels` the mean cross entropy of the positions that carry one.

        Shapes as `MoVAProcessor` and `encode_image` give them; `inputs_embeds` (B, L, D) replaces ids and pictures.
        """
        if inputs_embeds is None:
            pictured = (pixel_values, text_input_ids, text_attention_mask, experts, routing, coarse)
            inputs_embeds = self._fused(input_ids, *pictured)
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        text_input_ids: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
        experts: Mapping[str, Features] | None = None,
        routing: Tensor | None = None,
        coarse: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """New tokens (B, <= max_new_tokens) after the left-padded input of `forward`; `kwargs` as transformers' `generate`."""
        if inputs_embeds is None:
            pictured = (pixel_values, text_input_ids, text_attention_mask, experts, routing, coarse)
            inputs_embeds = self._fused(input_ids, *pictured)
        return self.language_model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _fused(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        text_input_ids: Tensor | None,
        text_attention_mask: Tensor | None,
        experts: Mapping[str, Features] | None,
        routing: Tensor | None,
        coarse: bool,
    ) -> Tensor:
        """Embeddings (B, L, D) of text and pictures."""
        if input_ids is None:
            raise ValueError("give input_ids or inputs_embeds")
        if pixel_values is None:
            return self.embed(input_ids, None)
        if text_input_ids is None or text_attention_mask is None:
            raise ValueError(
                "a picture needs the gate's text: text_input_ids and text_attention_mask, as MoVAProcessor makes"
            )
        text = {"input_ids": text_input_ids, "attention_mask": text_attention_mask}
        visual, _ = self.encode_image(self.encode_base(pixel_values), text, experts, routing, coarse)
        return self.embed(input_ids, visual)

    # The expert-routing LoRA: on for the routing pass, off for the answer.

    @property
    def has_routing_lora(self) -> bool:
        return ROUTING_LORA in getattr(self.language_model, "peft_config", {})

    def add_routing_lora(self, rank: int = 64, alpha: int = 128, dropout: float = 0.05) -> None:
        """Puts a fresh expert-routing LoRA on every linear layer of the LLM's blocks, off until `expert_routing()`."""
        lora = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.language_model.add_adapter(lora, adapter_name=ROUTING_LORA)
        self.language_model.train(self.training)  # its dropout comes in training mode
        self.language_model.disable_adapters()

    @contextlib.contextmanager
    def expert_routing(self) -> Iterator[None]:
        """Within it the LLM is the router: its expert-routing LoRA is on, if it has one."""
        if not self.has_routing_lora:
            yield
            return
        self.language_model.enable_adapters()
        try:
            yield
        finally:
            self.language_model.disable_adapters()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """The model in transformers' form; the expert-routing LoRA beside it in peft's, so the LLM's weights stay plain."""
        state = kwargs.pop("state_dict", None) or self.state_dict()
        lora = {name for name in state if "lora_" in name}
        plain = {name.replace(".base_layer.", "."): value for name, value in state.items() if name not in lora}
        super().save_pretrained(save_directory, state_dict=plain, **kwargs)
        if self.has_routing_lora:
            folder = Path(save_directory) / ROUTING_LORA
            folder.mkdir(exist_ok=True)
            self.language_model.peft_config[ROUTING_LORA].save_pretrained(folder)
            weights = peft.get_peft_model_state_dict(self.language_model, adapter_name=ROUTING_LORA)
            save_file(
                {name: value.contiguous() for name, value in weights.items()}, folder / "adapter_model.safetensors"
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> "MoVAForConditionalGeneration":
        model = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path) / ROUTING_LORA
        if folder.is_dir():
            model.language_model.load_adapter(str(folder), adapter_name=ROUTING_LORA)
            model.language_model.disable_adapters()
        return model


def assemble(
    language_model: PreTrainedModel,
    text_encoder: PretrainedConfig,
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
        text_encoder: BERT config of the adapter's text encoder.
        image_token_id: the LLM's token that stands for one visual token.
        pool: expert names in routing order.
        size, base_weights: as `load_expert` takes them, for the base encoder; `size` also for the pool's channels.
        routing_grid: default half the answer pass's side (published: 24 and 12).
    """
    base = load_expert(BASE, weights=base_weights, size=size)
    archs = {name: expert_card(name).mini if size == "mini" else expert_card(name).full for name in pool}
    adapter = AdapterConfig(
        expert_channels={name: arch["channels"] for name, arch in archs.items()},
        out_width=language_model.config.hidden_size,
        width=base.channels,
        grid=base.grid[0],
        blocks=blocks,
        text_encoder=text_encoder.to_diff_dict(),
        text_width=text_encoder.hidden_size,
    )
    config = MoVAConfig(
        text_config=language_model.config,
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
    model = MoVAForConditionalGeneration(config)
    model.base_encoder.load_state_dict(base.state_dict())
    model.language_model = language_model
    return model


def stack_features(
    rows: Sequence[Mapping[str, Features]], pool: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Features]:
    """Features per picture to features per expert, holding only the rows that have them, as `MoVAdapter` takes them."""
    stacked = {}
    for name in pool:
        have = [row[name] for row in rows if name in row]
        if have:
            tokens = torch.stack([features.tokens for features in have]).to(device, dtype, non_blocking=True)
            stacked[name] = Features(tokens, have[0].grid)
    return stacked


AutoConfig.register("mova", MoVAConfig, exist_ok=True)
AutoModelForImageTextToText.register(MoVAConfig, MoVAForConditionalGeneration, exist_ok=True)

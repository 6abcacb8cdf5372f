"""What learns in each stage, and the light router's loss."""

import dataclasses

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from mova_core.model import LLM_LORA, MoVAForConditionalGeneration
from pipelines.train.config import TrainConfig, part_of


def choose_parameters(model: MoVAForConditionalGeneration, config: TrainConfig) -> None:
    """Says which parameters learn in this stage."""
    if config.stage == "router":
        if not model.has_routing_lora:
            model.add_routing_lora(rank=config.lora_rank, alpha=2 * config.lora_rank)
        model.language_model.enable_adapters()
    tuned = config.stage == "sft" and config.lora_rank > 0
    if tuned:
        model.add_llm_lora(rank=config.lora_rank, alpha=2 * config.lora_rank)
    if config.stage == "light-router" and model.light_router is None:
        model.add_light_router()
    frozen = {*config.freeze, *(["llm"] if config.stage == "pretrain" or tuned else [])}
    if "text" in frozen:
        # As in a model whose own config freezes it: no dropout and no graph in the text encoder. What is saved keeps its setting.
        model.adapter.config = dataclasses.replace(model.adapter.config, freeze_text_encoder=True)
    elif model.adapter.config.freeze_text_encoder:
        frozen.add("text")
    for name, parameter in model.named_parameters():
        lora, light = "lora_" in name, name.startswith("light_router.")
        of_answers = f".{LLM_LORA}." in name or not (lora or light or part_of(name) in frozen)
        learns = {"pretrain": of_answers, "sft": of_answers, "router": lora, "light-router": light}
        parameter.requires_grad_(learns[config.stage])


class LightRouting(nn.Module):
    """The light router's loss on what the frozen base and text encoders make of a batch; the LLM has no part in it."""

    def __init__(self, model: MoVAForConditionalGeneration):
        super().__init__()
        assert model.light_router is not None
        self.base_encoder, self.adapter, self.light_router = model.base_encoder, model.adapter, model.light_router

    def train(self, mode: bool = True) -> "LightRouting":
        """The encoders stay as inference has them: no dropout."""
        super().train(False)
        self.light_router.train(mode)
        return self

    def forward(
        self,
        text_input_ids: Tensor,
        text_attention_mask: Tensor,
        routing: Tensor,
        pixel_values: Tensor | None = None,
        base: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput:
        """Loss of pictures (B, 3, S, S), or the base encoder's tokens of them (B, N, C), with questions (B, T) int64.

        The labels are `routing`, bool (B, E) in pool order.

        Args:
            num_items_in_batch: samples of all ranks that the summed loss is divided by; default B.
        """
        with torch.no_grad():
            tokens = self.base_encoder({"pixel_values": pixel_values}).tokens if base is None else base
            seen = tokens.mean(1)
            text = self.adapter.encode_text(text_input_ids, text_attention_mask)
        loss = self.light_router.loss(text, seen, routing)
        share = 1 if num_items_in_batch is None else len(routing) / num_items_in_batch
        return SequenceClassifierOutput(loss=loss * share)

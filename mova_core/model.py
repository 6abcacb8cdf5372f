"""MoVAForConditionalGeneration: base encoder, MoV-Adapter and LLM. The vision experts are not inside: their features come in.

Legend: B rows, L tokens, M pictures, N base tokens, E experts of the pool, D the LLM's width.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import peft
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from mova_core.adapter import AdapterConfig, MoVAdapter
from mova_core.config import MoVAConfig
from mova_core.experts import BASE, Features, expert_card, expert_class
from mova_core.processing import IGNORE
from mova_core.routing.light_router import LightRouter

LLM_LORA = "llm_lora"  # the peft adapter that tunes the LLM itself while it is trained
ROUTING_LORA = "expert_routing_lora"  # the peft adapter's name, and its folder in a checkpoint
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")  # as peft names them


class PictureInputs(TypedDict, total=False):
    """What `forward` and `generate` take for the M pictures of a batch, in reading order; `MoVAProcessor` makes the first three."""

    pixel_values: Tensor  # (M, 3, S, S) float
    base: Tensor  # (M, N, C) in the model's dtype: what the base encoder makes of the pixels, in their place
    text_input_ids: Tensor  # (M, T) int64, the gate's text; needed where a picture is routed to an expert
    text_attention_mask: Tensor  # (M, T) int64
    experts: Mapping[str, Features]  # by name, as `MoVAdapter` takes them
    routing: Tensor  # bool (M, E) in pool order; left out: no expert
    coarse: bool | Sequence[bool] | Tensor  # pictures of a routing pass, shown in `config.routing_tokens` tokens
    unseen: bool  # no row shows the pictures: they take part with weight zero, see `fuse`


@dataclass
class MoVAOutput(CausalLMOutputWithPast):
    """transformers' output of a causal LM, with the loss of every row.

    Attributes:
        row_losses: with labels, the summed cross entropy of each row's answers (B,), float32, without a gradient.
    """

    row_losses: Tensor | None = None


class MoVAForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """MoVA without its experts.

    `forward` takes what `MoVAProcessor` makes plus the routed experts' features; the LLM sees each picture as
    `config.image_tokens` tokens, or `config.routing_tokens` in a routing pass. One batch may hold rows without a picture,
    with several, and rows of either pass.

    Args:
        config: what to build.
        language_model: the causal LM that `config.text_config` describes, taken over; default a fresh one.
    """

    config_class = MoVAConfig
    base_model_prefix = "mova"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Whole on one device, as they read their parts' weights themselves; post_init adds the LLM's.
    _no_split_modules = ["Clip", "MoVAdapter"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MoVAConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.base_encoder = expert_class(BASE)(config.base_arch)
        self.adapter = MoVAdapter(AdapterConfig(**config.adapter))
        self.language_model: Any = language_model or AutoModelForCausalLM.from_config(
            config.text_config, trust_remote_code=False
        )
        self.light_router: LightRouter | None = None
        if config.light_router:
            self.add_light_router(config.light_router)
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
        text: Mapping[str, Tensor] | Tensor | None = None,
        experts: Mapping[str, Features] | None = None,
        routing: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Fuses the routed experts into the base tokens.

        Args:
            base: (M, N, C) from `encode_base`.
            text: the gate's text, tokens or features, as `MoVAdapter` takes it; None where no picture is routed, as
                then the gate has nothing to weigh.
            experts: features by expert name, as `MoVAdapter` takes them.
            routing: bool (M, E) in pool order; None routes to no expert.

        Returns:
            visual tokens (M, `config.image_tokens`, D), and the gate weights (M, E) of every block.

        Raises:
            ValueError: a shape that does not fit, features missing for a routed expert, or a routed picture without text.
        """
        if routing is None:
            routing = torch.zeros(len(base), len(self.config.pool), dtype=torch.bool, device=base.device)
        if text is None:
            if routing.any():
                raise ValueError("a routed picture needs the gate's text: give text_input_ids and text_attention_mask")
            text = base.new_zeros(1, self.adapter.config.text_width)
        return self.adapter(base, experts or {}, routing, text, return_gates=True)

    def coarsen(self, visual: Tensor) -> Tensor:
        """Visual tokens (M, `config.image_tokens`, D) pooled to what a routing pass shows (M, `config.routing_tokens`, D)."""
        side = self.config.adapter["grid"] // 2
        plane = visual.transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(plane, self.config.routing_grid).flatten(2).transpose(1, 2)

    def embed(self, input_ids: Tensor, visual: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        """Token embeddings (B, L, D) with the pictures' tokens, in reading order, where `image_token_id` stands.

        Args:
            input_ids: (B, L) int64; the image token may lie outside the LLM's vocabulary.
            visual: per picture its tokens (n, D), of any number each.

        Raises:
            ValueError: the number of image tokens and of visual tokens differ.
        """
        places = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(places, 0))  # the LLM may have no such token
        shown = [] if visual is None else list(visual)
        count, wanted = sum(map(len, shown)), int(places.sum())
        if wanted != count:
            raise ValueError(f"the text has {wanted} image tokens but the pictures give {count}")
        if not shown:
            return embeds
        return embeds.masked_scatter(places.unsqueeze(-1), torch.cat(shown).to(embeds))

    def fuse(self, input_ids: Tensor, pictures: PictureInputs) -> Tensor:
        """Embeddings (B, L, D) of text and pictures; see `embed` and `encode_image` for what may be wrong with them.

        A batch of rows without pictures may hold one `unseen` picture. It changes no embedding, and gives every parameter
        of the base encoder and the adapter a gradient of zeros, which distributed training needs on every rank.
        """
        pixels, base = pictures.get("pixel_values"), pictures.get("base")
        if pixels is not None:
            if base is not None:
                raise ValueError("pixel_values and base show the same pictures: give one of them")
            base = self.encode_base(pixels)
        if base is None:
            return self.embed(input_ids)
        text = None
        if (ids := pictures.get("text_input_ids")) is not None:
            text = {"input_ids": ids}
            if (mask := pictures.get("text_attention_mask")) is not None:
                text["attention_mask"] = mask
        visual, _ = self.encode_image(base, text, pictures.get("experts"), pictures.get("routing"))
        if pictures.get("unseen", False):
            embeds = self.embed(input_ids)
            return embeds + 0 * visual.sum().to(embeds)
        coarse = pictures.get("coarse", False)
        coarse = [coarse] * len(visual) if isinstance(coarse, bool) else [bool(flag) for flag in coarse]
        if len(coarse) != len(visual):
            raise ValueError(f"coarse tells of {len(coarse)} pictures, there are {len(visual)}")
        if not any(coarse):
            return self.embed(input_ids, visual)
        pairs = zip(coarse, self.coarsen(visual), visual, strict=True)
        return self.embed(input_ids, [pooled if flag else full for flag, pooled, full in pairs])

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_weights: Tensor | None = None,
        answers_only: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """LM logits (B, L, V), and with `labels` the cross entropy of the positions that predict one.

        With `labels` and `answers_only` the LLM's head runs at these n positions alone: logits of all positions would be the
        largest tensors of a training step (4 GB a sample of 2,048 tokens for a vocabulary of 128,000), and in a VQA sample
        0.6 % of the positions predict an answer.

        Args:
            input_ids, attention_mask, labels: (B, L) int64 as `MoVAProcessor` makes them.
            inputs_embeds: (B, L, D) instead of ids and pictures.
            num_items_in_batch: the sum of the losses is divided by this number instead of n, as transformers' models do:
                labels of all micro-batches and ranks of an optimizer step.
            loss_weights: (B,) float, what a token of each row counts in the sum; default 1.
            answers_only: whether the head runs only where an answer is predicted; default: in training mode.
            kwargs: `PictureInputs`; all else goes to the LLM's forward.

        Returns:
            `logits` (B, L, V), or (n, V) row by row with `answers_only`; with `labels` a `MoVAOutput` with the scalar `loss`, float32.
        """
        inputs_embeds = self._embeds(input_ids, inputs_embeds, kwargs)
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **kwargs}
        if labels is None:
            return self.language_model(**inputs)
        predicting = labels[:, 1:] != IGNORE
        if self.training if answers_only is None else answers_only:
            answers = self._logits_at(predicting, inputs)
            output = MoVAOutput(logits=answers)
        else:
            kept = ("logits", "past_key_values", "hidden_states", "attentions")
            of_llm = self.language_model(**inputs)
            output = MoVAOutput(**{name: of_llm.get(name) for name in kept})
            answers = of_llm.logits[:, :-1][predicting]
        losses = F.cross_entropy(answers.float(), labels[:, 1:][predicting], reduction="none")
        rows = predicting.nonzero()[:, 0]
        row_losses = losses.new_zeros(len(labels)).index_add(0, rows, losses)
        total = (row_losses if loss_weights is None else row_losses * loss_weights).sum()
        output.loss = total / (predicting.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch)
        output.row_losses = row_losses.detach()
        return output

    def _logits_at(self, places: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Logits (n, V) at `places`, bool (B, L - 1), row by row."""
        scales = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # Gemma's, Cohere's, Granite's
        if any(getattr(self.language_model.config, name, None) not in (None, 1.0) for name in scales):
            return self.language_model(**inputs).logits[:, :-1][places]
        # A cache of keys and values would be one more copy of them in every layer.
        hidden = self.language_model.base_model(**{"use_cache": False, **inputs}).last_hidden_state[:, :-1][places]
        return self.language_model.get_output_embeddings()(hidden)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """New tokens (B, <= max_new_tokens) after a left-padded input.

        Args:
            input_ids, attention_mask, inputs_embeds: as `forward` takes them.
            kwargs: `PictureInputs`; all else (`max_new_tokens`, `streamer`, ...) goes to the LLM's `generate`.
        """
        inputs_embeds = self._embeds(input_ids, inputs_embeds, kwargs)
        return self.language_model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _embeds(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        """What the LLM reads; takes `PictureInputs` out of `kwargs`."""
        pictures = cast(
            PictureInputs, {name: kwargs.pop(name) for name in PictureInputs.__annotations__ if name in kwargs}
        )
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            return self.fuse(input_ids, pictures)
        if pictures:
            raise ValueError(f"inputs_embeds hold the pictures already: give no {', '.join(pictures)}")
        return inputs_embeds

    # The expert-routing LoRA: on for the routing pass, off for the answer.

    @property
    def has_llm_lora(self) -> bool:
        return LLM_LORA in getattr(self.language_model, "peft_config", {})

    @property
    def has_routing_lora(self) -> bool:
        return ROUTING_LORA in getattr(self.language_model, "peft_config", {})

    def add_routing_lora(self, rank: int = 64, alpha: int = 128, dropout: float = 0.05) -> None:
        """Puts a fresh expert-routing LoRA on every linear layer of the LLM's blocks, off until `expert_routing()`."""
        self._add_lora(ROUTING_LORA, rank, alpha, dropout)
        self.language_model.disable_adapters()

    def add_llm_lora(self, rank: int, alpha: int, dropout: float = 0.05) -> None:
        """Puts a fresh LoRA on every linear layer of the LLM's blocks, on in every pass: to tune a frozen LLM.

        It is of one training: `merge_llm_lora` adds it to the LLM's weights, and `save_pretrained` leaves it out.
        """
        self._add_lora(LLM_LORA, rank, alpha, dropout)
        self.language_model.set_adapter(LLM_LORA)

    def merge_llm_lora(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this model with its `LLM_LORA` added to the weights beneath it (arXiv 2106.09685, equation 3)."""
        merged = dict(weights)
        lora = self.language_model.peft_config[LLM_LORA]
        for name in [name for name in weights if f".lora_A.{LLM_LORA}." in name]:
            down, up = merged.pop(name), merged.pop(name.replace(".lora_A.", ".lora_B."))
            under = f"{name.partition('.lora_A.')[0]}.base_layer.weight"
            change = lora.lora_alpha / lora.r * (up.float() @ down.float())
            merged[under] = (merged[under].float() + change).to(merged[under].dtype)
        return merged

    def _add_lora(self, name: str, rank: int, alpha: int, dropout: float) -> None:
        lora = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.language_model.add_adapter(lora, adapter_name=name)
        self.language_model.train(self.training)  # its dropout comes in training mode

    @contextlib.contextmanager
    def expert_routing(self, rows: Sequence[bool] | None = None) -> Iterator[None]:
        """Within it the LLM is the router: its expert-routing LoRA is on, if it has one; without, the LLM itself routes (v2).

        Args:
            rows: which rows of the batch are a routing pass, where it holds both; for inference. None: all.
        """
        if not self.has_routing_lora or (rows is not None and not any(rows)):
            yield
            return
        hooks = []
        if rows is not None:
            names = [ROUTING_LORA if row else "__base__" for row in rows]  # peft's word for no adapter
            for module in self.language_model.modules():
                if isinstance(module, LoraLayer) and isinstance(module, torch.nn.Module):
                    tell = lambda _module, args, kwargs: (args, {**kwargs, "adapter_names": names})  # noqa: E731
                    hooks.append(module.register_forward_pre_hook(tell, with_kwargs=True))
        self.language_model.enable_adapters()
        try:
            yield
        finally:
            self.language_model.disable_adapters()
            for hook in hooks:
                hook.remove()

    def add_expert(self, name: str) -> None:
        """Lets the pool grow by an expert, last in routing order; its answers stay the same until it is trained.

        A light router is removed, because it knows the pool by position: add and train a new one.

        Args:
            name: a registered expert; its card gives channels, at `config.expert_size`, and description.

        Raises:
            ValueError: an unknown expert, or one that the pool has already.
        """
        card = expert_card(name)
        channels = (card.mini if self.config.expert_size == "mini" else card.full)["channels"]
        self.adapter.add_expert(name, channels)
        self.config.adapter = self.adapter.config.to_dict()
        self.config.pool.append({"name": name, "channels": channels, "description": card.description})
        self.light_router, self.config.light_router = None, 0

    def add_light_router(self, hidden: int = 512) -> None:
        """Puts a fresh light router beside the LLM; it is saved and loaded with the model."""
        sizes = (self.config.adapter["text_width"], self.base_encoder.channels, len(self.config.pool))
        self.light_router = LightRouter(*sizes, hidden=hidden).to(self.adapter.pos_embed)
        self.config.light_router = hidden

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """The model in transformers' form; the expert-routing LoRA beside it in peft's, so the LLM's weights stay plain."""
        quiet_deepspeed()  # accelerate imports it in here where it is installed
        push = kwargs.pop("push_to_hub", False)
        state = kwargs.pop("state_dict", None) or self.state_dict()
        state = {name: value for name, value in state.items() if f".{LLM_LORA}." not in name}
        lora = {name for name in state if "lora_" in name}
        plain = {name.replace(".base_layer.", "."): value for name, value in state.items() if name not in lora}
        super().save_pretrained(save_directory, state_dict=plain, **kwargs)
        if self.has_routing_lora:
            folder = Path(save_directory) / ROUTING_LORA
            folder.mkdir(exist_ok=True)
            self.language_model.peft_config[ROUTING_LORA].save_pretrained(folder)
            of_llm = {name.removeprefix("language_model."): state[name] for name in lora}
            weights = peft.get_peft_model_state_dict(self.language_model, of_llm, adapter_name=ROUTING_LORA)
            save_file(
                {name: value.contiguous() for name, value in weights.items()}, folder / "adapter_model.safetensors"
            )
        if push:  # only now is all of it there
            names = ("repo_id", "token", "private", "revision", "commit_message", "create_pr")
            options = {name: kwargs[name] for name in names if name in kwargs}
            self.push_to_hub(options.pop("repo_id", Path(save_directory).name), **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> "MoVAForConditionalGeneration":
        """Loads a model from a folder or the hub, with its expert-routing LoRA, switched off, where the model has one.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            args, kwargs: as transformers' `from_pretrained` takes them; `cache_dir`, `local_files_only`, `revision` and
                `token` also hold for the LoRA.

        Returns:
            The model in eval mode; with `output_loading_info=True` a tuple of model and info, as in transformers.

        Raises:
            OSError: no such model, or no connection to the hub.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        names = ("cache_dir", "local_files_only", "revision", "token")
        options = {name: kwargs[name] for name in names if name in kwargs}
        if (folder := _routing_lora_folder(str(pretrained_model_name_or_path), options)) is not None:
            model.language_model.load_adapter(str(folder), adapter_name=ROUTING_LORA)
            model.language_model.disable_adapters()
        return loaded


def quiet_deepspeed() -> None:
    """Keeps DeepSpeed's warnings off stdout, where results stand: without a GPU it warns there when it is imported."""
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # the same filter is added once


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _routing_lora_folder(source: str, options: Mapping[str, Any]) -> Path | None:
    """The folder of a model's expert-routing LoRA, fetched from the hub if `source` is no local folder; None: no LoRA."""
    if Path(source).is_dir():
        folder = Path(source) / ROUTING_LORA
        return folder if all((folder / name).is_file() for name in LORA_FILES) else None
    try:
        files = [hf_hub_download(source, f"{ROUTING_LORA}/{name}", **options) for name in LORA_FILES]
    except LocalEntryNotFoundError:
        if options.get("local_files_only") or is_offline_mode():
            return None  # not in the cache, although the model is: it was cached from a hub that has no LoRA
        raise
    except EntryNotFoundError:
        return None
    return Path(files[0]).parent


AutoConfig.register("mova", MoVAConfig, exist_ok=True)
AutoModelForImageTextToText.register(MoVAConfig, MoVAForConditionalGeneration, exist_ok=True)

"""MoVAConfig: the LLM, base encoder, expert pool, adapter and routing of one MoVA model."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig


class MoVAConfig(PretrainedConfig):
    """Configuration of `MoVAForConditionalGeneration`.

    Args:
        text_config: config of the causal LM, any that transformers can load.
        base_arch: arch of the base encoder (`clip`).
        pool: the vision experts in routing order: mappings with name, channels, description, and the fingerprint and
            dtype of the features that the model was trained on (absent before training).
        adapter: fields of `mova_core.adapter.AdapterConfig`.
        image_token_id: token that stands for one visual token in the LLM's input.
        expert_size: size of the experts whose features the adapter takes, as `load_expert` takes it.
        routing_grid: side of the grid to which the routing pass pools the adapter's output (published: 12, so 144 tokens).
        max_experts: most experts one question may get (paper section 3.1: 3).
        light_router: width of the light router's hidden layer; 0: the model has no light router.
    """

    model_type = "mova"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  transformers reads this attribute of the class

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        base_arch: Mapping[str, Any] | None = None,
        pool: Sequence[Mapping[str, Any]] = (),
        adapter: Mapping[str, Any] | None = None,
        image_token_id: int = 0,
        expert_size: str = "full",
        routing_grid: int = 12,
        max_experts: int = 3,
        light_router: int = 0,
        **kwargs: Any,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.base_arch = {key: list(v) if isinstance(v, tuple) else v for key, v in dict(base_arch or {}).items()}
        self.pool = [dict(expert) for expert in pool]
        self.adapter = dict(adapter or {})
        self.image_token_id = image_token_id
        self.expert_size = expert_size
        self.routing_grid = routing_grid
        self.max_experts = max_experts
        self.light_router = light_router
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the pool in routing order: the order of every routing mask."""
        return tuple(expert["name"] for expert in self.pool)

    @property
    def descriptions(self) -> list[str]:
        """The line that the router reads about each expert, in routing order."""
        return [expert["description"] for expert in self.pool]

    @property
    def image_tokens(self) -> int:
        """Visual tokens per image in the answer pass: the base grid average-pooled by two (published: 576)."""
        return (self.adapter["grid"] // 2) ** 2

    @property
    def routing_tokens(self) -> int:
        """Visual tokens per image in the routing pass (published: 144)."""
        return self.routing_grid**2

    @property
    def fingerprints(self) -> dict[str, str]:
        """Expert -> fingerprint of the features that this model was trained on, where known."""
        return {expert["name"]: expert["fingerprint"] for expert in self.pool if expert.get("fingerprint")}

    @property
    def feature_dtypes(self) -> dict[str, str]:
        """Expert -> dtype of the features that this model was trained on, where known."""
        return {expert["name"]: expert["dtype"] for expert in self.pool if expert.get("dtype")}

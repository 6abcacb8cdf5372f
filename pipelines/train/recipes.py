"""Recipes: the settings of whole runs, as functions. Each value says where it is from.

A recipe sets what `TrainConfig` has, but no path; options of the command line win over it. `llm` holds the sizes of the public
LLM (its config.json), so that a recipe can be planned without the model. Imports neither torch nor Ray.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.train.config import Stage

PAPER = "paper"  # arXiv 2404.13046, implementation details of its experiments
CODE = "published code"  # its scripts, which are LLaVA's; the paper itself does not say
LLAVA = "LLaVA-1.5"
NEXT = "LLaVA-NeXT"
OURS = "chosen here"

Sizes = Mapping[str, Any]
VICUNA_7B: Sizes = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "dtype": "float16",
}  # fmt: skip
LLAMA3_8B: Sizes = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16",
}  # fmt: skip
HERMES_YI_34B: Sizes = {
    "model_type": "llama", "vocab_size": 64000, "hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60,
    "num_attention_heads": 56, "num_key_value_heads": 8, "dtype": "bfloat16",
}  # fmt: skip
QWEN3_8B: Sizes = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
QWEN3_32B: Sizes = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


class Setting(NamedTuple):
    """The value of a field of `TrainConfig`, and where it is from."""

    value: Any
    source: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A stage of training.

    Attributes:
        summary: one line.
        samples: of the data that the recipe is for.
        gpus: that it is for, as `parse_gpus` takes them; their number is that of the workers.
        settings: field of `TrainConfig` -> value and source. The micro-batch is the largest that fits.
        llm: sizes of the LLM.
    """

    stage: Stage
    summary: str
    samples: int
    gpus: Setting
    settings: Mapping[str, Setting]
    llm: Sizes

    def values(self) -> dict[str, Any]:
        """Field of `TrainConfig` -> value."""
        return {name: setting.value for name, setting in self.settings.items()}


def common() -> dict[str, Setting]:
    """Of every recipe."""
    return {
        "warmup": Setting(0.03, CODE),
        "weight_decay": Setting(0.0, CODE),
        "clip_norm": Setting(1.0, CODE),
        "max_length": Setting(2048, CODE),
        "unlabelled": Setting("refuse", PAPER),
        "strategy": Setting("fsdp", OURS),
        "precision": Setting("bfloat16", OURS),
        "checkpoint_activations": Setting(True, OURS),
        "gpu": Setting(True, PAPER),
    }


def pretrain(llm: Sizes, gpus: Setting) -> Recipe:
    """The paper's first stage: MoV-Adapter and base encoder learn on 15 million samples, the LLM is frozen."""
    settings = common() | {
        "learning_rate": Setting(2e-4, PAPER),
        "batch_size": Setting(1024, PAPER),
        "epochs": Setting(1.0, PAPER),
    }
    summary = "stage 1: adapter and base encoder learn, on 15 M samples"
    return Recipe(stage="pretrain", summary=summary, samples=15_000_000, gpus=gpus, settings=settings, llm=llm)


def sft(llm: Sizes, gpus: Setting, **changes: Setting) -> Recipe:
    """The paper's second stage: everything but the experts learns, on 1.6 million samples with 2,000 routing ones among them."""
    settings = common() | {
        "learning_rate": Setting(2e-5, PAPER),
        "batch_size": Setting(128, PAPER),
        "epochs": Setting(1.0, CODE),
        "routing_samples": Setting(2000, PAPER),
        "group_by_length": Setting(True, CODE),
    }
    summary = "stage 2: all but the experts learns, on 1.6 M samples"
    samples = 1_600_000
    return Recipe(stage="sft", summary=summary, samples=samples, gpus=gpus, settings=settings | changes, llm=llm)


def llava_pretrain() -> Recipe:
    """A first stage for a day on one machine: LLaVA's 558 K captions, and only the adapter learns, as LLaVA's projector does."""
    settings = common() | {
        "learning_rate": Setting(1e-3, LLAVA),
        "batch_size": Setting(256, LLAVA),
        "epochs": Setting(1.0, LLAVA),
        "freeze": Setting(("base", "text"), LLAVA),
    }
    summary = "starter, stage 1: the adapter learns, on LLaVA-558K"
    gpus = Setting("8xA100-80G", LLAVA)
    return Recipe(stage="pretrain", summary=summary, samples=558_128, gpus=gpus, settings=settings, llm=VICUNA_7B)


def llava_sft() -> Recipe:
    """A second stage for a day on one machine: LLaVA's 665 K instructions and 2,000 routing samples."""
    settings = common() | {
        "learning_rate": Setting(2e-5, LLAVA),
        "batch_size": Setting(128, LLAVA),
        "epochs": Setting(1.0, LLAVA),
        "part_rates": Setting({"base": 2e-6}, NEXT),
        "routing_samples": Setting(2000, PAPER),
        "group_by_length": Setting(True, LLAVA),
    }
    summary = "starter, stage 2: all but the experts learns, on LLaVA-665K"
    gpus = Setting("8xA100-80G", LLAVA)
    return Recipe(stage="sft", summary=summary, samples=667_298, gpus=gpus, settings=settings, llm=VICUNA_7B)


def lora(llm: Sizes) -> Recipe:
    """A second stage for one card: the adapter and a LoRA of the LLM learn, as LLaVA's script for its LoRA has it."""
    settings = common() | {
        "learning_rate": Setting(2e-4, LLAVA),
        "part_rates": Setting({"adapter": 2e-5}, LLAVA),
        "batch_size": Setting(128, LLAVA),
        "epochs": Setting(1.0, LLAVA),
        "lora_rank": Setting(128, LLAVA),
        "freeze": Setting(("base", "text"), OURS),
        "routing_samples": Setting(2000, PAPER),
        "group_by_length": Setting(True, LLAVA),
    }
    summary = "one card: the adapter and a LoRA of the LLM learn, on LLaVA-665K"
    return Recipe(stage="sft", summary=summary, samples=667_298, gpus=_a100(1, OURS), settings=settings, llm=llm)


def _a100(count: int, source: str) -> Setting:
    return Setting(f"{count}xA100-80G", source)


# An LLM that the paper does not have keeps the paper's numbers; the base encoder learns slower beside it, as in LLaVA-NeXT.
_SLOW_BASE = {"part_rates": Setting({"base": 2e-6}, NEXT)}
RECIPES: dict[str, Callable[[], Recipe]] = {
    "vicuna-7b/pretrain": lambda: pretrain(VICUNA_7B, _a100(64, PAPER)),
    "vicuna-7b/sft": lambda: sft(VICUNA_7B, _a100(32, PAPER)),
    "llama3-8b/pretrain": lambda: pretrain(LLAMA3_8B, _a100(64, PAPER)),
    "llama3-8b/sft": lambda: sft(LLAMA3_8B, _a100(32, PAPER)),
    "hermes-yi-34b/pretrain": lambda: pretrain(HERMES_YI_34B, _a100(128, PAPER)),
    "hermes-yi-34b/sft": lambda: sft(HERMES_YI_34B, _a100(64, PAPER)),
    "qwen3-8b/pretrain": lambda: pretrain(QWEN3_8B, _a100(64, OURS)),
    "qwen3-8b/sft": lambda: sft(QWEN3_8B, _a100(32, OURS), **_SLOW_BASE),
    "qwen3-32b/pretrain": lambda: pretrain(QWEN3_32B, _a100(128, OURS)),
    "qwen3-32b/sft": lambda: sft(QWEN3_32B, _a100(64, OURS), **_SLOW_BASE),
    "llava-665k/pretrain": llava_pretrain,
    "llava-665k/sft": llava_sft,
    "llama3-8b/lora": lambda: lora(LLAMA3_8B),
    "qwen3-8b/lora": lambda: lora(QWEN3_8B),
}

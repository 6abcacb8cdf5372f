"""Models, data and stores for benchmarks/training.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

from mova_core.adapter import AdapterConfig
from mova_core.assemble import assemble
from mova_core.config import MoVAConfig
from mova_core.experts import BASE, EXPERTS, Features, expert_card, expert_class
from mova_core.experts.base import VisionExpert
from mova_core.features import FeatureStore
from mova_core.images import ImageRef
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import IGNORE, MoVAProcessor
from pipelines.train.config import TrainConfig
from pipelines.train.recipes import VICUNA_7B
from tests.mova_core.conftest import TEMPLATE, llm_tokenizer, text_tokenizer

LENGTH, ANSWER = 700, 120  # tokens of a sample of LLaVA's instructions, and those of its answers


def write_run(folder: Path, samples: int, batch: int, pictures: bool = True) -> TrainConfig:
    """A model with an LLM of 8 layers, records, pictures of 640x480 and the store with two experts' features of each."""
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    tokenizer, gate = llm_tokenizer(), text_tokenizer()
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=1, pad_token_id=0, **sizes))
    bert = BertConfig(
        vocab_size=len(gate), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = assemble(llm, bert, image_token_id=2, size="mini", blocks=2)
    model.save_pretrained(folder / "model")
    MoVAProcessor.for_model(model, tokenizer, gate, chat_template=TEMPLATE).save_pretrained(folder / "model")
    records, draw = [], np.random.default_rng(0)
    store = FeatureStore(folder / "store", create=True)
    partitions = {
        name: store.add_expert(
            {
                "expert": name,
                "dtype": "float32",
                "weights": "w",
                "grid": [9, 9],
                "channels": expert_card(name).mini["channels"],
            }
        )
        for name in EXPERTS
    }
    rows: dict[str, dict[str, Features]] = {name: {} for name in EXPERTS}
    for number in range(samples):
        words = " what is in the picture" * 8
        question = "what is in the picture?" + ("" if pictures else words)
        record: dict[str, Any] = {
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "left, right and" + words}]
        }
        if pictures:
            pixels = draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((640, 480)).save(folder / f"{number}.jpg")
            chosen = [EXPERTS[number % 7], EXPERTS[(number + 3) % 7]]
            record |= {"image": f"{number}.jpg", "routing": chosen}
            key = ImageRef(path=str(folder / f"{number}.jpg")).key
            for name in chosen:
                rows[name][key] = Features(torch.randn(81, expert_card(name).mini["channels"]), (9, 9))
        records.append(record)
    for name, features in rows.items():
        if features:
            partitions[name].write(partitions[name].shard_id(features), features)
    (folder / "data.json").write_text(json.dumps(records))
    places: dict[str, Any] = {name: str(folder / name) for name in ("model", "store", "output")}
    return TrainConfig(
        stage="sft", data=str(folder / "data.json"), batch_size=batch, workers=1, checkpoint_every="1000m", **places
    )


def few_layers_model(size: str, llm: int = 1, clip: int = 1, blocks: int = 1) -> MoVAForConditionalGeneration:
    """Vicuna-7B's LLM, CLIP, BERT and adapter at their full widths with few layers.

    Args:
        size: "full", or "mini" for small widths.
        llm, clip, blocks: layers of the LLM, of CLIP those that run, and of the adapter; BERT has one.
    """
    torch.manual_seed(0)
    full = size == "full"
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 1000}
    widths: dict[str, Any] = {key: VICUNA_7B[key] for key in small} if full else small
    text_config = LlamaConfig(num_hidden_layers=llm, **widths)
    channels = {name: _arch(name, size)["channels"] for name in EXPERTS}
    base = _arch(BASE, size) | {"depth": clip + 1}  # the last layer never runs
    side = 1024 if full else 64
    text = {"hidden_size": side, "num_attention_heads": 16, "intermediate_size": 4 * side, "num_hidden_layers": 1}
    adapter = AdapterConfig(
        expert_channels=channels, out_width=text_config.hidden_size, width=base["width"], blocks=blocks,
        text_encoder=text, text_width=side, grid=base["image_size"] // base["patch_size"],
    )  # fmt: skip
    pool = [{"name": name, "channels": count, "description": ""} for name, count in channels.items()]
    return MoVAForConditionalGeneration(
        MoVAConfig(text_config=text_config, base_arch=base, pool=pool, adapter=adapter.to_dict(), image_token_id=2)
    )


def one_layer_experts(size: str, device: str = "cpu") -> dict[str, VisionExpert]:
    """The seven experts with one layer each, of those that attend in windows a windowed one."""
    with torch.device(device):
        found = {}
        for name in EXPERTS:
            arch = _arch(name, size) | {"depth": 1}
            found[name] = expert_class(name)(arch | ({"global_blocks": ()} if "global_blocks" in arch else {}))
    return {name: expert.eval() for name, expert in found.items()}


def sample_of(model: Any, shapes: bool = False) -> dict[str, Any]:
    """A sample of `LENGTH` tokens, or what its picture needs, with a picture that is routed to two experts.

    Args:
        shapes: for a model on the meta device: no features.
    """
    config, shown = model.config, model.config.image_tokens
    length = max(LENGTH, shown + ANSWER)
    ids = torch.full((1, length), 5)
    ids[:, :shown] = config.image_token_id
    labels = ids.clone()
    labels[:, :-ANSWER] = IGNORE
    chosen = [name in ("dinov2", "sam") for name in EXPERTS]
    grid, side = config.adapter["grid"], config.base_arch["image_size"]
    channels = dict(config.adapter["expert_channels"])
    features = {
        name: Features(torch.randn(1, grid**2, channels[name]), (grid, grid))
        for name, routed in zip(EXPERTS, chosen, strict=True)
        if routed and not shapes
    }
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "experts": features,
        "pixel_values": torch.zeros(1, 3, side, side), "text_input_ids": torch.full((1, 16), 5),
        "text_attention_mask": torch.ones(1, 16, dtype=torch.long), "routing": torch.tensor([chosen]),
    }  # fmt: skip


def _arch(name: str, size: str) -> dict[str, Any]:
    card = expert_card(name)
    return dict(card.full if size == "full" else card.mini)

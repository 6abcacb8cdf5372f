"""The golden numbers: tensors and facts computed with the published code, its portable filler, and its tiny tower."""

import json
import os
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mova_core.experts import BASE, EXPERTS, Features, VisionExpert, expert_card, load_expert

REPOSITORY = Path(__file__).resolve().parents[2]
OWN = REPOSITORY / "tests" / "golden" / "data"  # a few megabytes of it; tests of other cases are skipped there


class Golden:
    """Cases under `dir`: golden("dinov2/swiglu") -> (tensors by name, facts); "adapter" is "adapter/adapter"."""

    def __init__(self, folder: Path):
        self.dir = folder
        self.seed = (folder / "seed.txt").read_text().strip()

    @lru_cache(maxsize=8)  # noqa: B019  one fixture per session
    def __call__(self, case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        stem = self.dir / case
        if stem.is_dir():
            stem /= stem.name
        tensors = stem.with_suffix(".safetensors")
        if self.dir == OWN and not stem.with_suffix(".json").exists():
            pytest.skip(f"{case} is not in the project's small copy; name the whole folder in MOVA_GOLDEN")
        facts = json.loads(stem.with_suffix(".json").read_text())
        return (load_file(tensors) if tensors.exists() else {}), facts

    def uniform(self, name: str, shape: tuple[int, ...], lo: float = -1.0, hi: float = 1.0) -> Tensor:
        """The filler: float32 uniform in lo..hi, a pure function of (seed, name, shape)."""
        random = np.random.RandomState(zlib.crc32(f"{self.seed}:{name}".encode()))
        values = lo + (hi - lo) * random.random_sample(int(np.prod(shape)))
        return torch.from_numpy(values.astype(np.float32).reshape(shape))


def pytest_configure(config: pytest.Config) -> None:
    """`golden_dir`: the folder that MOVA_GOLDEN names, else ../shared/golden beside the repository, else ours."""
    named = os.environ.get("MOVA_GOLDEN")
    beside = REPOSITORY.parent / "shared" / "golden"
    config.golden_dir = Path(named).resolve() if named else beside if beside.is_dir() else OWN  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def golden(pytestconfig: pytest.Config) -> Golden:
    """The golden numbers of the folder that `pytest_configure` chose."""
    return Golden(pytestconfig.golden_dir)  # type: ignore[attr-defined]


class Tower:
    """The published tower's tiny experts: what is in `shared_tiny_tower`, and which of the tower's inputs each takes."""

    def __init__(self, golden: Golden):
        self.tensors, facts = golden("shared_tiny_tower")
        self.config = facts["config"]

    def expert(self, name: str, tensors: Mapping[str, Tensor] | None = None, **arch: Any) -> VisionExpert:
        """One of them; `tensors` and `arch` stand in for what the tower's own says."""
        prefix = f"vision_tower_{(BASE, *EXPERTS).index(name)}."
        held = self.tensors if tensors is None else tensors
        weights = {key.removeprefix(prefix): tensor for key, tensor in held.items() if key.startswith(prefix)}
        return load_expert(name, weights=weights, arch=self._arch(name, weights) | arch)

    def _arch(self, name: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        config = self.config[name]
        if name in ("clip", "dinov2"):
            arch = {"width": config["hidden_size"], "depth": config["num_hidden_layers"]}
            arch |= {"heads": config["num_attention_heads"], "patch_size": config["patch_size"], "image_size": 84}
            mlp = {"clip": "vision_model.encoder.layers.0.mlp.fc2", "dinov2": "encoder.layer.0.mlp.weights_out"}[name]
            return arch | {"mlp_hidden": weights[f"{mlp}.weight"].shape[1]}
        if name in ("pix2struct", "deplot"):
            arch = {"width": config["hidden_size"], "depth": config["num_hidden_layers"], "patch_size": 16}
            arch |= {"heads": config["num_attention_heads"], "mlp_hidden": config["d_ff"], "image_size": 7 * 16}
            return arch | {"pos_grid": config["seq_len"]}
        arch = {"width": config["embed_dim"], "depth": config["depth"], "heads": config["num_heads"]}
        arch |= {"patch_size": config["patch_size"], "image_size": config.get("img_size") or config["image_size"]}
        if name == "biomedclip":
            return arch | {"mlp_hidden": 4 * config["embed_dim"]}
        arch |= {"mlp_hidden": int(config["embed_dim"] * config["mlp_ratio"]), "window_size": config["window_size"]}
        if name == "codetr":
            arch |= {"pos_grid": config["pretrain_img_size"] // config["patch_size"], "channels": config["out_chans"]}
            return arch | {"global_blocks": tuple(set(range(config["depth"])) - set(config["window_block_indexes"]))}
        arch |= {"global_blocks": tuple(config["global_attn_indexes"])}
        return arch | {"channels": config["out_chans"] * (2 if config["use_output_conv"] else 1)}

    @staticmethod
    def run(expert: VisionExpert, images: Tensor, high: Tensor, patches: Tensor) -> Features:
        """Features of what the expert takes of the published tower's three inputs."""
        name = expert.card.name
        if name in ("pix2struct", "deplot"):
            batch = {"flattened_patches": patches}
        elif name in ("clip", "biomedclip"):
            batch = {"pixel_values": images[:, :3]}
        else:
            batch = {"pixel_values": images[:, 3:] if name == "dinov2" else high}
        with torch.no_grad():
            features = expert(batch)
        assert features.tokens.shape[1:] == (features.grid[0] * features.grid[1], expert.channels)
        return features


@pytest.fixture(scope="session")
def tower(golden: Golden) -> Tower:
    return Tower(golden)


@pytest.fixture(scope="session")
def tiny_mova(golden: Golden, tower: Tower) -> Any:
    """The published code's tiny model as one of ours, in eval mode."""
    from transformers import LlamaConfig

    from mova_core.adapter import AdapterConfig
    from mova_core.model import MoVAConfig, MoVAForConditionalGeneration

    tensors, facts = golden("prepare_inputs")
    published, experts = dict(facts["config"]), {name: tower.expert(name) for name in (BASE, *EXPERTS)}
    adapter = AdapterConfig(
        expert_channels=dict(zip(EXPERTS, published["expert_channels"], strict=True)),
        out_width=published["hidden_size"],
        width=published["mm_hidden_size"],
        grid=published["image_feat_size"],
        blocks=published["num_projector_layers"],
        topk=published["topk_experts"],
        text_encoder=json.loads((golden.dir / "shared_text_encoder" / "config.json").read_text()),
    )
    published["rope_parameters"] = {"rope_type": "default", "rope_theta": published.pop("rope_theta")}
    cards = [
        {"name": name, "channels": experts[name].channels, "description": expert_card(name).description}
        for name in EXPERTS
    ]
    config = MoVAConfig(
        text_config=LlamaConfig(**{key: value for key, value in published.items() if hasattr(LlamaConfig(), key)}),
        base_arch=experts[BASE].arch,
        pool=cards,
        adapter=adapter.to_dict(),
        image_token_id=published["vocab_size"],  # outside the LLM's vocabulary, as the published -200 is
        routing_grid=int(published["num_routing_tokens"] ** 0.5),
    )
    model = MoVAForConditionalGeneration(config)
    bert = load_file(golden.dir / "shared_text_encoder" / "model.safetensors")
    state = {f"base_encoder.{name}": tensor for name, tensor in experts[BASE].state_dict().items()}
    state |= {f"adapter.text_encoder.{name}": tensor.float() for name, tensor in bert.items()}
    for name, tensor in tensors.items():
        if name.startswith("sd."):
            name = f"language_model.{name.removeprefix('sd.')}"
            state[name.replace("language_model.model.mm_projector.", "adapter.")] = tensor
    state["language_model.lm_head.weight"] = tensors["e2e.seed58.lm_head.weight"]  # as the case's logits were made
    model.load_state_dict(state)
    return model.eval()

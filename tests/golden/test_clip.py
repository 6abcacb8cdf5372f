"""CLIP: positions resized from 4x4 to 6x6, every layer, and the features MoVA selects."""

from functools import partial
from typing import Any

import pytest
import torch

from mova_core.experts import load_expert
from mova_core.experts.clip import Clip
from mova_core.experts.weight_shapes import resize_positions

close = partial(torch.testing.assert_close, atol=5e-5, rtol=0)


@pytest.fixture
def case(golden):
    """Weights of the small net, its arch at the larger size, and all tensors."""
    tensors, facts = golden("clip_resize")
    config, prefix = facts["config"], "sd_before."
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    arch = dict(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_hidden=config["intermediate_size"],
        patch_size=config["patch_size"],
        image_size=tensors["in.x"].shape[-1],
    )
    return weights, arch, tensors


def test_features(case):
    weights, arch, tensors = case
    expert = load_expert("clip", weights=weights, arch=arch)
    features = expert({"pixel_values": tensors["in.x"]})
    assert features.grid == (6, 6)
    close(features.tokens, tensors["out.select-2.patch"])


def test_names_without_prefix(case):
    weights, arch, tensors = case
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    expert = load_expert("clip", weights=bare, arch=arch)
    close(expert({"pixel_values": tensors["in.x"]}).tokens, tensors["out.select-2.patch"])


def test_every_layer(case):
    weights, arch, tensors = case
    expert: Any = load_expert("clip", weights=weights, arch=arch)
    seen: list[torch.Tensor] = []
    for module in (expert.pre_layrnorm, *expert.encoder.layers):
        module.register_forward_hook(lambda module, args, output: seen.append(output))
    expert({"pixel_values": tensors["in.x"]})
    assert len(seen) == arch["depth"]  # the embedding and all layers but the last
    for index, hidden in enumerate(seen):
        close(hidden, tensors[f"out.hidden{index}"])
    last = expert.encoder.layers[-1](seen[-1], None)  # kept whole, though MoVA does not need it
    close(last, tensors[f"out.hidden{arch['depth']}"])


def resized(table_ND: torch.Tensor, side: int) -> torch.Tensor:
    return resize_positions(table_ND[None], (side, side), others=1)[0]


def test_positions(case):
    weights, _, tensors = case
    table = weights["vision_model.embeddings.position_embedding.weight"]
    close(resized(table, 6), tensors["out.position_embedding_6x6"])
    close(resized(tensors["in.pos24"], 48), tensors["out.pos48"])
    assert resize_positions(table[None], (4, 4), others=1).data_ptr() == table.data_ptr(), "its own size: not copied"


def test_full_size_names(golden):
    names = golden("state_dict_names")[1]["names"]
    prefix = "model.vision_tower.vision_tower_0."
    published = {name.removeprefix(prefix): entry["shape"] for name, entry in names.items() if name.startswith(prefix)}
    with torch.device("meta"):
        expert = Clip(Clip.card.full)
    ours = {name: list(tensor.shape) for name, tensor in Clip.to_public(expert.state_dict(), expert.arch).items()}
    assert ours == published
    meta = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    assert Clip.from_public(meta, expert.arch).keys() == expert.state_dict().keys()

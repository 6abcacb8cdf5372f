"""The base encoder and all seven experts together, aligned and concatenated, against the published tower.

The published tower computes every expert in training and for batches, for one picture only the routed ones (zeros stand
for the others), and takes a cached feature whether it is routed or not. Features are the same in every case.
"""

from functools import cache

import pytest
import torch

from mova_core.adapter import align
from mova_core.experts import BASE, EXPERTS, load_expert

POOL = (BASE, *EXPERTS)
ALL = "ABCDEFG"
SCENARIOS = {  # experts whose features are in the output, and how many pictures
    "eval_b1_none": ("", 1),
    "eval_b1_ADF": ("ADF", 1),
    "eval_b1_all": (ALL, 1),
    "two_stage_BEG_after_none": ("BEG", 1),
    "three_stage_A_after_BEG": ("ABEG", 1),  # B, E and G from the cache
    "eval_b1_BEG_no_cache": ("BEG", 1),
    "eval_b1_A_no_cache": ("A", 1),
    "eval_b2_mixed": (ALL, 2),
    "train_b1_none": (ALL, 1),
    "train_b2_mixed": (ALL, 2),
}


def weights_of(tensors, name):
    prefix = f"vision_tower_{POOL.index(name)}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def arch_of(name, config, tensors):
    config, weights = config[name], weights_of(tensors, name)
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


def run(expert, images, high, patches):
    """What each expert takes of the published tower's three inputs."""
    name = expert.card.name
    if name in ("pix2struct", "deplot"):
        batch = {"flattened_patches": patches}
    elif name in ("clip", "biomedclip"):
        batch = {"pixel_values": images[:, :3]}
    else:
        batch = {"pixel_values": images[:, 3:] if name == "dinov2" else high}
    with torch.inference_mode():
        features = expert(batch)
    assert features.tokens.shape[1:] == (features.grid[0] * features.grid[1], expert.channels)
    return features


def merge(features, letters, side):
    aligned = [features[BASE].tokens]
    for letter, name in zip(ALL, EXPERTS, strict=True):
        tokens = align(features[name].tokens, features[name].grid, side)
        aligned.append(tokens if letter in letters else torch.zeros_like(tokens))
    return torch.cat(aligned, dim=-1)


@pytest.fixture(scope="module")
def features(golden):
    tensors, facts = golden("shared_tiny_tower")
    inputs, _ = golden("tower_merge")

    @cache  # one by one, so that a broken expert fails only where it is used
    def computed(name):
        arch = arch_of(name, facts["config"], tensors)
        expert = load_expert(name, weights=weights_of(tensors, name), arch=arch)
        return run(expert, inputs["in.images"], inputs["in.high"], inputs["in.flattened"])

    return computed


def test_channels_are_in_the_published_order(golden, features):
    _, facts = golden("tower_merge")
    widths = [end - start for start, end in facts["channel_slices"]["experts"]]
    assert [features(name).tokens.shape[-1] for name in EXPERTS] == widths


@pytest.mark.parametrize("index", range(len(POOL)), ids=POOL)
def test_every_expert_alone(golden, features, index):
    tensors, _ = golden("tower_merge")
    ours, cached = features(POOL[index]), tensors[f"cache.eval_b1_all.{index}"]
    tokens = align(ours.tokens, ours.grid, side=6) if index == 1 else ours.tokens  # DINOv2 is cached aligned
    torch.testing.assert_close(tokens[:1], cached, atol=5e-5, rtol=0)


def test_every_scenario_is_known(golden):
    tensors, _ = golden("tower_merge")
    assert {name.removeprefix("out.") for name in tensors if name.startswith("out.")} == set(SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_merged(golden, features, scenario):
    tensors, _ = golden("tower_merge")
    letters, pictures = SCENARIOS[scenario]
    merged = merge({name: features(name) for name in POOL}, letters, side=6)[:pictures]
    torch.testing.assert_close(merged, tensors[f"out.{scenario}"], atol=5e-5, rtol=0)


def test_tower_at_532_pixels(golden):
    """Large enough that DINOv2's picture is shrunk to 518 and its 37x37 features are aligned to the base's 38x38."""
    tower, facts = golden("shared_tiny_tower")
    tensors, expected = golden("tower_merge/tower532")
    positions = {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}
    tower = {**tower, **positions}
    images = golden.uniform("tower532.images", (1, 6, 532, 532), -2, 2)
    high = golden.uniform("tower532.high", (1, 3, 128, 128), -2, 2)
    patches = golden.uniform("tower532.patches", (1, 49, 770), -2, 2)
    patches[..., 0] = torch.arange(49) // 7 + 1
    patches[..., 1] = torch.arange(49) % 7 + 1
    sides = {"clip": 532, "dinov2": 518}
    computed = {}
    for name in POOL:
        arch = arch_of(name, facts["config"], tower)
        arch["image_size"] = sides.get(name, arch["image_size"])
        computed[name] = run(load_expert(name, weights=weights_of(tower, name), arch=arch), images, high, patches)
    merged = merge(computed, ALL, side=38)
    assert list(merged.shape) == expected["output"]["shape"]
    torch.testing.assert_close(merged.reshape(-1)[:: expected["sample_step"]], tensors["out.sample"], atol=5e-5, rtol=0)
    torch.testing.assert_close(merged[0, [0, 701, 1443]], tensors["out.tokens_0_701_1443"], atol=5e-5, rtol=0)

"""DINOv2 with both MLPs: at, above, below and beside the native size, and not a multiple of the patch."""

from functools import partial

import pytest
import torch

from mova_core.experts import load_expert
from mova_core.experts.dinov2 import Dinov2

close = partial(torch.testing.assert_close, atol=5e-5, rtol=0)
SIZES = ("native70", "up112", "down42", "rect98x70", "not_multiple_75")


def build(golden, net, **arch):
    tensors, facts = golden(f"dinov2/{net}")
    config = facts["config"]
    weights = {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}
    sizes = dict(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        patch_size=config["patch_size"],
        image_size=max(tensors[f"in.{size}"].shape[-1] for size in SIZES),
        pos_grid=config["image_size"] // config["patch_size"],
        mlp_hidden=facts["swiglu_hidden"] if config["use_swiglu_ffn"] else config["mlp_ratio"] * config["hidden_size"],
    )
    return load_expert("dinov2", weights=weights, arch=sizes | arch), tensors


@pytest.mark.parametrize("net", ["swiglu", "gelu_mlp"])
@pytest.mark.parametrize("size", SIZES)
def test_features(golden, net, size):
    expert, tensors = build(golden, net)
    pixels = tensors[f"in.{size}"]
    features = expert({"pixel_values": pixels})
    assert features.grid == (pixels.shape[2] // 14, pixels.shape[3] // 14)
    close(features.tokens, tensors[f"out.{size}.hidden-2"][:, 1:])
    close(expert.positions(*features.grid), tensors[f"out.{size}.pos"])


def test_positions_resized_when_loaded(golden):
    expert, tensors = build(golden, "swiglu")
    arch = {word: value for word, value in expert.arch.items() if word != "pos_grid"} | {"image_size": 112}
    expert = load_expert("dinov2", weights=Dinov2.to_public(expert.state_dict(), arch), arch=arch)
    close(expert({"pixel_values": tensors["in.up112"]}).tokens, tensors["out.up112.hidden-2"][:, 1:])


@pytest.mark.parametrize("net", ["swiglu", "gelu_mlp"])
def test_the_last_layer_and_norm_are_kept_whole(golden, net):
    expert, tensors = build(golden, net)
    before = tensors["out.native70.hidden-2"]
    last = expert.encoder.layer[-1](before)
    close(last, tensors["out.native70.hidden-1"])
    close(expert.layernorm(last), tensors["out.native70.last_hidden_state"])


def test_a_wider_picture_is_shrunk_first(golden):
    expert, tensors = build(golden, "swiglu", image_size=70)
    pixels = tensors["in.up112"]
    shrunk = torch.nn.functional.interpolate(pixels, size=(70, 70), mode="bilinear", align_corners=False)
    features = expert({"pixel_values": pixels})
    assert features.grid == (5, 5)
    close(features.tokens, expert({"pixel_values": shrunk}).tokens)


def test_names_of_newer_transformers(golden):
    expert, tensors = build(golden, "swiglu")
    published = Dinov2.to_public(expert.state_dict(), expert.arch)
    assert published.keys() == {name.removeprefix("sd.") for name in tensors if name.startswith("sd.")}
    assert all(torch.equal(tensor, tensors[f"sd.{name}"]) for name, tensor in published.items())
    newer: dict[str, torch.Tensor] = {}
    for name, tensor in published.items():
        for old, new in (
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("mlp.weights_out", "mlp.down_proj"),
        ):
            name = name.replace(old, new)
        if "mlp.weights_in" in name:
            gate, up = tensor.chunk(2)
            newer |= {name.replace("weights_in", "gate_proj"): gate, name.replace("weights_in", "up_proj"): up}
        else:
            newer[name] = tensor
    again = load_expert("dinov2", weights=newer, arch=expert.arch)
    pixels = tensors["in.native70"]
    assert torch.equal(again({"pixel_values": pixels}).tokens, expert({"pixel_values": pixels}).tokens)


def test_full_size_names(golden):
    names = golden("dinov2/full_size_giant")[1]["names"]
    with torch.device("meta"):
        expert = Dinov2(Dinov2.card.full)
    published = Dinov2.to_public(expert.state_dict(), expert.arch)
    assert {name: list(tensor.shape) for name, tensor in published.items()} == {
        name: entry["shape"] for name, entry in names.items()
    }
    assert Dinov2.from_public(published, expert.arch).keys() == expert.state_dict().keys()
    assert (
        sum(parameter.numel() for parameter in expert.parameters()) == golden("dinov2/full_size_giant")[1]["num_params"]
    )

"""BiomedCLIP's image encoder against the published tower's, and the forms in which its weights come."""

import pytest
import torch

from mova_core.experts import load_expert
from mova_core.experts.biomedclip import BiomedCLIP
from mova_core.images import clip_pixels

PREFIX = "vision_tower_6."


@pytest.fixture(scope="module")
def tiny(golden):
    tensors, facts = golden("shared_tiny_tower")
    config = facts["config"]["biomedclip"]
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    arch = {
        "width": config["embed_dim"],
        "depth": config["depth"],
        "heads": config["num_heads"],
        "mlp_hidden": weights["trunk.blocks.0.mlp.fc1.weight"].shape[0],
        "patch_size": config["patch_size"],
        "image_size": config["image_size"],
        "channels": config["embed_dim"],
    }
    return weights, arch, config


def test_features(golden, tiny):
    weights, arch, config = tiny
    tensors, _ = golden("tower_merge")
    expert = load_expert("biomedclip", weights=weights, arch=arch)
    with torch.inference_mode():
        features = expert({"pixel_values": tensors["in.images"][:1, :3]})
    assert features.grid == (14, 14)
    torch.testing.assert_close(features.tokens, tensors["cache.eval_b1_all.6"], atol=5e-5, rtol=0)
    norms = [module for module in expert.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {config["norm_eps"]}


def test_full_size_has_the_published_parameters(golden):
    _, checkpoint = golden("state_dict_names/state_dict_names")
    slot = f"model.vision_tower.{PREFIX}"
    with torch.device("meta"):
        expert = BiomedCLIP(BiomedCLIP.card.full)
        names = {key: entry["shape"] for key, entry in checkpoint["names"].items() if key.startswith(slot)}
        published = {key.removeprefix(slot): torch.empty(shape) for key, shape in names.items()}
    ours = BiomedCLIP.from_public(published, BiomedCLIP.card.full)
    shapes = {key: tuple(tensor.shape) for key, tensor in expert.state_dict().items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in ours.items()}
    assert published.keys() - ours.keys() == {"head.proj.weight"}


def test_open_clip_names(tiny):
    weights, arch, _ = tiny
    checkpoint = {f"visual.{name}": tensor for name, tensor in weights.items()}
    checkpoint |= {"text.transformer.pooler.weight": torch.zeros(8, 4), "logit_scale": torch.zeros(())}
    left, right = (load_expert("biomedclip", weights=some, arch=arch).state_dict() for some in (checkpoint, weights))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_pixels_are_every_third_of_clips(golden):
    """The published tower shrinks CLIP's 672 px to 224 without antialiasing; that happens before the network is met."""
    with torch.device("meta"):
        expert = BiomedCLIP({**BiomedCLIP.card.full, "depth": 1})
    pictures = [golden.dir / "images" / f"{name}.png" for name in ("rgb_300x200", "rgba_200x360", "palette_P_120x90")]
    pixels = expert.preprocess(pictures, compat="published")["pixel_values"]
    assert torch.equal(pixels, clip_pixels(pictures, 672, compat="published")[..., 1::3, 1::3])


def test_missing_and_foreign_weights_are_named(tiny):
    weights, arch, _ = tiny
    weights = {**weights, "trunk.lora": torch.zeros(1)}
    del weights["trunk.norm.bias"]
    with pytest.raises(Exception, match=r"trunk\.norm\.bias") as raised:
        load_expert("biomedclip", weights=weights, arch=arch)
    assert "trunk.lora" in str(raised.value)

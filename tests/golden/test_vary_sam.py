"""SAM's image encoder and Vary's against the published code's, and every form in which their weights come."""

import hashlib

import pytest
import torch
from transformers import SamConfig, SamModel, SamVisionConfig

from mova_core.experts import load_expert
from mova_core.experts.codetr import CoDETR
from mova_core.experts.sam import SAM
from mova_core.experts.vary import Vary
from mova_core.experts.window_vit import RelativeAttention

CASES = {"vary": "vary_sam/vary_b", "sam": "vary_sam/sam_h"}
FULL = {"vary": "vary_sam/full_size_vary_b", "sam": "vary_sam/full_size_sam_h"}
SLOTS = {"vary": 2, "sam": 7}
CLASSES = {"vary": Vary, "sam": SAM}


def arch_of(config):
    return {
        "width": config["embed_dim"],
        "depth": config["depth"],
        "heads": config["num_heads"],
        "mlp_hidden": int(config["embed_dim"] * config["mlp_ratio"]),
        "patch_size": config["patch_size"],
        "image_size": config["img_size"],
        "window_size": config["window_size"],
        "global_blocks": tuple(config["global_attn_indexes"]),
        "channels": config["out_chans"] * (2 if config["use_output_conv"] else 1),
    }


def weights_of(tensors):
    return {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("folded", [False, True], ids=["as a bias", "folded"])
@pytest.mark.parametrize("name", CASES)
def test_features_and_every_block(golden, monkeypatch, name, folded):
    monkeypatch.setattr(RelativeAttention, "folded", folded)
    tensors, facts = golden(CASES[name])
    expert = load_expert(name, weights=weights_of(tensors), arch=arch_of(facts["config"]))
    seen = {}
    stages = {"patch_embed": "patch_embed", "neck": "neck"}
    stages |= {f"block{index}": f"blocks.{index}" for index in range(facts["config"]["depth"])}
    for stage, path in stages.items():
        module = expert.get_submodule(path)
        module.register_forward_hook(lambda _module, _inputs, output, stage=stage: seen.update({stage: output}))
    with torch.inference_mode():
        features = expert({"pixel_values": tensors["in.x"]})
    for stage, output in seen.items():
        torch.testing.assert_close(output, tensors[f"inter.{stage}"], atol=5e-5, rtol=0)
    torch.testing.assert_close(features.tokens, tensors["out.y"], atol=5e-5, rtol=0)
    assert features.grid == expert.grid and features.tokens.shape[2] == expert.channels


@pytest.mark.parametrize("name", CASES)
def test_full_size_has_the_published_parameters(golden, name):
    _, facts = golden(FULL[name])
    _, checkpoint = golden("state_dict_names/state_dict_names")
    expert_class, slot = CLASSES[name], f"model.vision_tower.vision_tower_{SLOTS[name]}."
    arch = expert_class.card.full
    assert arch_of(facts["config"]) == arch
    with torch.device("meta"):
        expert = expert_class(arch)
        published = {key: torch.empty(entry["shape"]) for key, entry in facts["names"].items()}
    assert shapes_of(expert.state_dict()) == shapes_of(expert_class.from_public(published, arch))
    assert sum(parameter.numel() for parameter in expert.parameters()) == facts["num_params"]
    named = {key: tuple(entry["shape"]) for key, entry in checkpoint["names"].items() if key.startswith(slot)}
    assert named == {slot + key: shape for key, shape in shapes_of(published).items()}


def test_norms_have_the_published_epsilon(golden):
    _, facts = golden("vary_sam/full_size_sam_h")
    expert = load_expert("sam", size="mini")
    norms = [module for module in expert.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {facts["config"]["norm_eps"]} and len(norms) == 6


@pytest.mark.parametrize("name", ["sam", "vary", "codetr"])
def test_pixels_are_the_published_bits(golden, name):
    tensors, facts = golden("preprocess")
    expert_class = CLASSES.get(name, CoDETR)
    with torch.device("meta"):  # preprocessing needs no network
        expert = expert_class({**expert_class.card.full, "depth": 1})
    pictures = [picture for picture in facts["images"] if f"{picture}.high.sample" in tensors]
    assert len(pictures) >= 10
    for picture in pictures:
        (pixels,) = expert.preprocess([golden.dir / "images" / f"{picture}.png"], compat="published")["pixel_values"]
        assert torch.equal(pixels[:, 12::24, 12::24], tensors[f"{picture}.high.sample"]), picture
        digest = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
        assert digest.startswith(facts["images"][picture]["high"]["sha256_16"]), picture


def test_segment_anything_names(golden):
    tensors, facts = golden("vary_sam/sam_h")
    weights, arch = weights_of(tensors), arch_of(facts["config"])
    checkpoint = {f"image_encoder.{name}": tensor for name, tensor in weights.items()}
    checkpoint |= {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": torch.zeros(2, 8)}
    checkpoint |= {"mask_decoder.iou_token.weight": torch.zeros(1, 16)}
    _same(load_expert("sam", weights=checkpoint, arch=arch), load_expert("sam", weights=weights, arch=arch))


def test_transformers_names_and_features(golden):
    arch = {**SAM.card.mini, "heads": 4}
    vision = SamVisionConfig(
        hidden_size=arch["width"],
        num_hidden_layers=arch["depth"],
        num_attention_heads=4,
        mlp_dim=arch["mlp_hidden"],
        image_size=arch["image_size"],
        window_size=3,
        global_attn_indexes=[1],
        output_channels=arch["channels"],
    )
    model = SamModel(SamConfig(vision_config=vision.to_dict())).eval()
    for name, parameter in model.vision_encoder.named_parameters():
        parameter.data = golden.uniform(name, tuple(parameter.shape), -0.2, 0.2)
    expert = load_expert("sam", weights=model.state_dict(), arch={**arch, "window_size": 3})
    pixels = golden.uniform("pixels", (2, 3, 128, 128), -2, 2)
    with torch.inference_mode():
        ours = expert({"pixel_values": pixels}).tokens
        theirs = model.get_image_embeddings(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize("tower", ["model.vision_tower_high.", "transformer.vision_tower_high.", "model.vision_tower."])
def test_vary_names(golden, tower):
    tensors, facts = golden("vary_sam/vary_b")
    weights, arch = weights_of(tensors), arch_of(facts["config"])
    checkpoint = {tower + name: tensor for name, tensor in weights.items()}
    checkpoint |= {tower + "net_3.weight": torch.zeros(8, 4, 3, 3), "lm_head.weight": torch.zeros(9, 4)}
    checkpoint |= {"model.embed_tokens.weight": torch.zeros(9, 4), "model.mm_projector_vary.weight": torch.zeros(4, 4)}
    if "high" in tower:
        checkpoint["model.vision_tower.vision_model.pre_layrnorm.weight"] = torch.zeros(4)
    _same(load_expert("vary", weights=checkpoint, arch=arch), load_expert("vary", weights=weights, arch=arch))


@pytest.mark.parametrize("name", CASES)
def test_missing_and_foreign_weights_are_named(golden, name):
    tensors, facts = golden(CASES[name])
    weights, arch = weights_of(tensors), arch_of(facts["config"])
    del weights["blocks.0.attn.rel_pos_h"]
    weights["blocks.0.attn.lora"] = torch.zeros(1)
    with pytest.raises(Exception, match=r"blocks\.0\.attn\.(rel_pos_h|lora)") as raised:
        load_expert(name, weights=weights, arch=arch)
    assert "rel_pos_h" in str(raised.value) and "lora" in str(raised.value)


def _same(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

"""Co-DETR's backbone against the published code's, and the forms in which its weights come."""

import pytest
import torch
import torch.nn.functional as F

from mova_core.experts import load_expert
from mova_core.experts.codetr import CoDETR

CASES = ["official_flags", "window_pad_and_pos_interp"]


def arch_of(config):
    return {
        "width": config["embed_dim"],
        "depth": config["depth"],
        "heads": config["num_heads"],
        "mlp_hidden": config["mlp_hidden"],
        "patch_size": config["patch_size"],
        "image_size": config["img_size"],
        "window_size": config["window_size"],
        "global_blocks": tuple(i for i in range(config["depth"]) if i not in config["window_block_indexes"]),
        "channels": config["out_chans"],
        "pos_grid": config["pretrain_img_size"] // config["patch_size"],
    }


def weights_of(tensors):
    return {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}


@pytest.mark.parametrize("case", CASES)
def test_features_and_every_block(golden, case):
    tensors, facts = golden(f"codetr_vit/{case}")
    expert = load_expert("codetr", weights=weights_of(tensors), arch=arch_of(facts["config"]))
    seen = {}
    stages = {"patch_embed": "patch_embed", "neck": "neck"}
    stages |= {f"block{index}": f"blocks.{index}" for index in range(facts["config"]["depth"])}
    for stage, path in stages.items():
        module = expert.get_submodule(path)
        module.register_forward_hook(lambda _module, _inputs, output, stage=stage: seen.update({stage: output}))
    for name, facts_of_input in facts["inputs"].items():
        pixels = tensors.get(f"in.{name}")
        if pixels is None:
            pixels = golden.uniform(f"codetr.in.{name}", tuple(facts_of_input["stats"]["shape"]), -2, 2)
        with torch.inference_mode():
            features = expert({"pixel_values": pixels})
        assert features.grid == (37, 37)
        torch.testing.assert_close(features.tokens, tensors[f"out.{name}"], atol=5e-5, rtol=0)
        for stage, output in seen.items():
            sample = tensors.get(f"inter.{name}.{stage}.sample")
            if sample is not None:
                step = facts["inter"][stage]["sample_step"]
                torch.testing.assert_close(output.reshape(-1)[::step], sample, atol=5e-5, rtol=0)


def test_full_size_has_the_published_parameters(golden):
    _, facts = golden("codetr_vit/full_size")
    _, checkpoint = golden("state_dict_names/state_dict_names")
    config, arch, slot = facts["config"], CoDETR.card.full, "model.vision_tower.vision_tower_3."
    assert arch_of(config) == arch and arch["global_blocks"] == tuple(config["global_block_indexes"])
    with torch.device("meta"):
        expert = CoDETR(arch)
        published = {key: torch.empty(entry["shape"]) for key, entry in facts["names"].items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in expert.state_dict().items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in CoDETR.from_public(published, arch).items()}
    assert sum(parameter.numel() for parameter in expert.parameters()) == facts["num_params"]
    named = {key: entry["shape"] for key, entry in checkpoint["names"].items() if key.startswith(slot)}
    assert named == {slot + key: entry["shape"] for key, entry in facts["names"].items()}


def test_norms_have_the_published_epsilons(golden):
    """The output norm's differs, too little to be seen in the numbers."""
    _, facts = golden("codetr_vit/full_size")
    with torch.device("meta"):
        expert = CoDETR({**CoDETR.card.full, "depth": 1})
    norms = {name: module.eps for name, module in expert.named_modules() if isinstance(module, torch.nn.LayerNorm)}
    assert norms == {
        "blocks.0.norm1": facts["config"]["block_norm_eps"],
        "blocks.0.norm2": facts["config"]["block_norm_eps"],
        "blocks.0.mlp.ffn_ln": facts["config"]["ffn_ln_eps"],
        "out_norm": facts["config"]["out_norm_eps"],
        "neck.1": 1e-6,
        "neck.4": 1e-6,
    }


def test_rotary_tables_follow_from_the_arch(golden):
    tensors, facts = golden("codetr_vit/official_flags")
    weights, arch = weights_of(tensors), arch_of(facts["config"])
    without = {name: tensor for name, tensor in weights.items() if "rope" not in name}
    given, made = (load_expert("codetr", weights=some, arch=arch).state_dict() for some in (weights, without))
    assert given.keys() == made.keys()
    for name in given:
        torch.testing.assert_close(made[name], given[name], atol=1e-6, rtol=0)


def test_to_public_is_the_inverse(golden):
    _, facts = golden("codetr_vit/full_size")
    published = {name: torch.empty(entry["shape"], device="meta") for name, entry in facts["names"].items()}
    back = CoDETR.to_public(CoDETR.from_public(published, CoDETR.card.full), CoDETR.card.full)
    assert back.keys() == published.keys()
    assert all(back[name].shape == tensor.shape for name, tensor in published.items())
    tensors, facts = golden("codetr_vit/official_flags")
    weights, arch = weights_of(tensors), arch_of(facts["config"])
    back = CoDETR.to_public(load_expert("codetr", weights=weights, arch=arch).state_dict(), arch)
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert torch.equal(back["blocks.1.attn.rope.freqs_sin"], weights["rope_glb.freqs_sin"])


def test_detector_checkpoint(golden):
    """A public Co-DETR: other parts beside the backbone, one pyramid level taken, positions and patches resized."""
    tensors, facts = golden("codetr_vit/window_pad_and_pos_interp")
    weights, arch = weights_of(tensors), arch_of(facts["config"])
    detector = {}
    for name, tensor in weights.items():
        detector[name.replace("neck.", "neck.p4.") if name.startswith("neck.") else f"backbone.{name}"] = tensor
    detector["backbone.rope_win.freqs_cos"] = torch.zeros(24 * 24, 16)
    detector["backbone.blocks.0.attn.rope.freqs_cos"] = torch.zeros(24 * 24, 16)
    detector["backbone.patch_embed.proj.weight"] = patches = golden.uniform("patches", (48, 3, 14, 14))
    detector |= {"neck.p3.1.weight": torch.zeros(4), "query_head.label_embedding.weight": torch.zeros(4)}
    arch = {**arch, "pos_grid": 20}
    loaded = load_expert("codetr", weights=detector, arch=arch).state_dict()
    plain = load_expert("codetr", weights={**weights, "pos_embed": loaded["pos_embed"]}, arch=arch).state_dict()
    table = weights["pos_embed"][:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    larger = F.interpolate(table, size=(20, 20), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(loaded["pos_embed"][:, 1:], larger)
    larger = F.interpolate(patches, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(loaded["patch_embed.proj.weight"], larger)
    for name, tensor in loaded.items():
        if name not in ("pos_embed", "patch_embed.proj.weight"):
            torch.testing.assert_close(tensor, plain[name], atol=1e-6, rtol=0)


def test_missing_and_foreign_weights_are_named(golden):
    tensors, facts = golden("codetr_vit/window_pad_and_pos_interp")
    weights = weights_of(tensors)
    del weights["blocks.1.attn.q_bias"]
    weights["blocks.0.attn.lora"] = torch.zeros(1)
    with pytest.raises(Exception, match="lora") as raised:
        load_expert("codetr", weights=weights, arch=arch_of(facts["config"]))
    assert "blocks.1.attn.q_proj.bias" in str(raised.value)

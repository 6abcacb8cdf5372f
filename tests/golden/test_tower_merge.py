"""The base encoder and all seven experts together, aligned and concatenated, against the published tower.

The published tower computes every expert in training and for batches, for one picture only the routed ones (zeros stand
for the others), and takes a cached feature whether it is routed or not. Features are the same in every case.
"""

from functools import cache

import pytest
import torch

from mova_core.adapter import align
from mova_core.experts import BASE, EXPERTS

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


def merge(features, letters, side):
    aligned = [features[BASE].tokens]
    for letter, name in zip(ALL, EXPERTS, strict=True):
        tokens = align(features[name].tokens, features[name].grid, side)
        aligned.append(tokens if letter in letters else torch.zeros_like(tokens))
    return torch.cat(aligned, dim=-1)


@pytest.fixture(scope="module")
def features(golden, tower):
    inputs, _ = golden("tower_merge")

    @cache  # one by one, so that a broken expert fails only where it is used
    def computed(name):
        return tower.run(tower.expert(name), inputs["in.images"], inputs["in.high"], inputs["in.flattened"])

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


def test_tower_at_532_pixels(golden, tower):
    """Large enough that DINOv2's picture is shrunk to 518 and its 37x37 features are aligned to the base's 38x38."""
    tensors, expected = golden("tower_merge/tower532")
    positions = {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}
    tensors_at_532 = {**tower.tensors, **positions}
    images = golden.uniform("tower532.images", (1, 6, 532, 532), -2, 2)
    high = golden.uniform("tower532.high", (1, 3, 128, 128), -2, 2)
    patches = golden.uniform("tower532.patches", (1, 49, 770), -2, 2)
    patches[..., 0] = torch.arange(49) // 7 + 1
    patches[..., 1] = torch.arange(49) % 7 + 1
    sides = {"clip": 532, "dinov2": 518}
    computed = {}
    for name in POOL:
        arch = {"image_size": sides[name]} if name in sides else {}
        computed[name] = tower.run(tower.expert(name, tensors_at_532, **arch), images, high, patches)
    merged = merge(computed, ALL, side=38)
    assert list(merged.shape) == expected["output"]["shape"]
    torch.testing.assert_close(merged.reshape(-1)[:: expected["sample_step"]], tensors["out.sample"], atol=5e-5, rtol=0)
    torch.testing.assert_close(merged[0, [0, 701, 1443]], tensors["out.tokens_0_701_1443"], atol=5e-5, rtol=0)

"""Pix2Struct: patches of 13 pictures, padded to a square and as they are, and its encoder."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from mova_core.experts import load_expert
from mova_core.experts.deplot import Deplot
from mova_core.experts.pix2struct import Pix2Struct, published_grid, published_patches, square_patches
from mova_core.images import CLIP_MEAN, load_image, mean_colour, pad_to_square

close = partial(torch.testing.assert_close, atol=5e-5, rtol=0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    path = metafunc.config.golden_dir / "pix2struct" / "pix2struct.json"  # type: ignore[attr-defined]  # set by conftest.py
    facts = json.loads(path.read_text()) if path.exists() else {}  # the project's small copy lacks it
    if "padded" in metafunc.fixturenames:
        metafunc.parametrize("padded", sorted(facts.get("official_path_pad_2025", ())))
    if "small" in metafunc.fixturenames:
        metafunc.parametrize("small", sorted(facts.get("small_unpadded", ())))


@pytest.fixture(scope="module")
def expert(golden):
    tensors, facts = golden("pix2struct")
    config = facts["encoder_config"]
    weights = {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}
    arch = dict(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_hidden=config["d_ff"],
        pos_grid=config["seq_len"],
    )
    return load_expert("pix2struct", weights=weights, arch=arch)


def test_padded_pictures(golden, padded):
    tensors, facts = golden("pix2struct")
    fact = facts["official_path_pad_2025"][padded]
    square = pad_to_square(load_image(golden.dir / "images" / f"{padded}.png", "published"), mean_colour(CLIP_MEAN))
    patches = published_patches(np.asarray(square), 2025, 16)
    assert list(patches.shape) == fact["stats"]["shape"]
    assert int((patches[:, 0] > 0).sum()) == fact["nonzero_rows"]
    assert (int(patches[:, 0].max()), int(patches[:, 1].max())) == (fact["rows"], fact["cols"])
    sample = tensors[f"official.{padded}.sample"]
    close(patches.flatten()[:: fact["sample_step"]], sample)
    for token in (0, 1012):
        close(patches[token], tensors[f"official.{padded}.token{token}"])


def test_pictures_as_they_are(golden, small):
    tensors, facts = golden("pix2struct")
    count = facts["small_unpadded"][small]["max_patches"]
    image = load_image(golden.dir / "images" / f"{small}.png", "published")
    patches = published_patches(np.asarray(image), count, 16)
    close(patches, tensors[f"small.{small}.mp{count}"])
    mask = tensors[f"small.{small}.mp{count}.attention_mask"]
    torch.testing.assert_close((patches[:, 0] > 0).float(), mask)


@pytest.mark.parametrize("case", ["rgb_300x200.mp24", "gray_L_384x191.mp30"])  # the second ends in padding
def test_encoder(golden, expert, case):
    tensors, _ = golden("pix2struct")
    embedded = []
    handle = expert.encoder.layer[0].register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    features = expert({"flattened_patches": tensors[f"small.{case}"][None]})
    handle.remove()
    close(embedded[0], tensors[f"enc.{case}.hidden0"])
    close(features.tokens, tensors[f"enc.{case}.last_hidden_state"])


def test_encoder_on_the_whole_path(golden, expert):
    tensors, _ = golden("pix2struct")
    picture = golden.dir / "images" / "rgb_square_101.png"
    for compat in ("published", "fixed"):
        features = expert(expert.preprocess([picture], compat))
        assert features.grid == (45, 45)
        close(features.tokens, tensors["enc.official_2025.rgb_square_101"])


def test_sides_that_the_published_path_shears(golden, expert):
    bad = set(golden("pix2struct/bad_sides")[1]["sides_1_to_8192_giving_44_rows"])
    grids = {side: published_grid(side, side, 2025, 16) for side in range(1, 8193)}
    assert {side for side, grid in grids.items() if grid != (45, 45)} == bad
    for side in [*sorted(bad)[:3], 9, 448]:
        picture = Image.new("RGB", (side, side), (10, 200, 30))
        picture.putpixel((0, 0), (255, 0, 0))
        published = expert.preprocess([picture], "published")["flattened_patches"][0]
        assert published[:, 0].max() == (44 if side in bad else 45)
        assert int((published[:, 0] == 0).sum()) == (89 if side in bad else 0)
        fixed = expert.preprocess([picture])["flattened_patches"][0]
        assert fixed[:, 0].max() == fixed[:, 1].max() == 45 and bool((fixed[:, 0] > 0).all())


def test_fixed_patches_of_flawed_pictures(golden):
    one = load_image(golden.dir / "images" / "rgb_pixel_1x1.png")
    assert torch.equal(
        square_patches(one, 45, 16)[:, 2:].reshape(2025, 256, 3).amax(1), square_patches(one, 45, 16)[:, 2:5]
    )
    three = np.asarray(load_image(golden.dir / "images" / "rgb_square_3x3.png"))
    enlarged = Image.fromarray(
        np.kron(three, np.ones((16, 16, 1), dtype=np.uint8))
    )  # 48 px: read rightly by the published path
    right = published_patches(np.asarray(enlarged), 9, 16)[:, 2:].reshape(9, 256, 3)
    ours = square_patches(load_image(three), 3, 16)[:, 2:].reshape(9, 256, 3)
    centre = 7 * 16 + 7  # next to a pixel's centre the interpolation gives nearly the pixel itself
    torch.testing.assert_close(ours[:, centre], right[:, centre], atol=0.2, rtol=0)


@pytest.mark.parametrize("cls, slot", [(Pix2Struct, 4), (Deplot, 5)])
def test_full_size_names(golden, cls, slot):
    names = golden("state_dict_names")[1]["names"]
    prefix = f"model.vision_tower.vision_tower_{slot}."
    published = {name.removeprefix(prefix): entry["shape"] for name, entry in names.items() if name.startswith(prefix)}
    with torch.device("meta"):
        expert = cls(cls.card.full)
    assert {name: list(tensor.shape) for name, tensor in expert.state_dict().items()} == published
    full_model = {f"encoder.{name}": tensor for name, tensor in expert.state_dict().items()}
    full_model["decoder.embed_tokens.weight"] = torch.empty(2, 2, device="meta")
    assert cls.from_public(full_model, expert.arch).keys() == published.keys()

"""The pixels' path byte for byte: padding, PIL bicubic, normalisation and patches as the published code gives them."""

import hashlib
import json

import numpy as np
import pytest
import torch

from mova_core.experts import load_expert
from mova_core.experts.dinov2 import MEAN, STD
from mova_core.images import (
    CLIP_MEAN,
    ImageError,
    clip_pixels,
    load_image,
    mean_colour,
    pad_to_square,
    square_pixels,
)

TOLERANCE = 5e-5
UNREADABLE = "rgb_pixel_1x1"  # the published path raises on it


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "picture" in metafunc.fixturenames:
        folder = metafunc.config.golden_dir  # type: ignore[attr-defined]  # set by conftest.py
        facts = json.loads((folder / "preprocess" / "preprocess.json").read_text())
        metafunc.parametrize("picture", sorted(facts["images"]))


def digest(array: np.ndarray | torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.asarray(array)).tobytes()).hexdigest()[:16]


@pytest.fixture
def facts(golden, picture):
    return golden("preprocess")[1]["images"][picture]


@pytest.fixture
def path(golden, picture):
    return golden.dir / "images" / f"{picture}.png"


@pytest.fixture(scope="module")
def pix2struct():
    return load_expert("pix2struct", size="mini", arch={"image_size": 720})  # only its preprocessing is used


def test_padding(path, facts):
    square = pad_to_square(load_image(path, "published"), mean_colour(CLIP_MEAN))
    assert list(square.size) == facts["expand2square"]["size"]
    assert digest(np.asarray(square)) == facts["expand2square"]["sha256_16_of_rgb_bytes"]


def test_square_pixels(path, facts, picture):
    if picture == UNREADABLE:
        with pytest.raises(ImageError, match="one pixel"):
            clip_pixels([path], 672, "published")
        return
    clip, dinov2 = clip_pixels([path], 672, "published")[0], square_pixels([path], 672, MEAN, STD, "published")[0]
    assert digest(torch.cat([clip, dinov2])) == facts["image"]["sha256_16"]
    assert digest(clip_pixels([path], 1024, "published")[0]) == facts["high"]["sha256_16"]


def test_bicubic_bytes(path, facts, picture):
    if picture == UNREADABLE:
        return
    for fact, side, mean in (
        ("uint8_clip", 672, CLIP_MEAN),
        ("uint8_dino", 672, MEAN),
        ("uint8_high", 1024, CLIP_MEAN),
    ):
        assert list(mean_colour(mean)) == facts[fact]["pad_color"]
        pixels = square_pixels([path], side, mean, (1, 1, 1), "published")[0] + torch.tensor(mean).view(3, 1, 1)
        assert digest((pixels * 255).round().to(torch.uint8)) == facts[fact]["sha256_16"]


def test_flattened_patches(path, facts, picture, pix2struct):
    if picture == UNREADABLE:
        with pytest.raises(ImageError, match="published path"):
            pix2struct.preprocess([path], "published")
        return
    patches = pix2struct.preprocess([path], "published")["flattened_patches"]
    assert digest(patches[0]) == facts["flattened"]["sha256_16"]


def test_samples(golden, path, facts, picture, pix2struct):
    """The same against stored numbers, which say how far off a failing path is."""
    if picture == UNREADABLE:
        return
    tensors = golden("preprocess")[0]
    image = torch.cat([clip_pixels([path], 672, "published")[0], square_pixels([path], 672, MEAN, STD, "published")[0]])
    high = clip_pixels([path], 1024, "published")[0]
    patches = pix2struct.preprocess([path], "published")["flattened_patches"][0]
    for name, values in (
        ("image", image[:, 8::16, 8::16]),
        ("high", high[:, 12::24, 12::24]),
        ("flattened", patches.flatten()[::519]),
    ):
        torch.testing.assert_close(values, tensors[f"{picture}.{name}.sample"], atol=TOLERANCE, rtol=0)


def test_the_default_differs_only_where_the_published_path_is_flawed(path, picture, pix2struct):
    flawed = {UNREADABLE, "rgb_square_3x3", "rgba_200x360"}
    if picture in flawed:
        assert torch.isfinite(clip_pixels([path], 672)).all()
        return
    assert torch.equal(clip_pixels([path], 672), clip_pixels([path], 672, "published"))
    fixed, published = (pix2struct.preprocess([path], compat)["flattened_patches"] for compat in ("fixed", "published"))
    if published[0, -1, 0] == 0:  # the published path made 44x44 of it
        assert fixed[0, -1, 0] == 45
        return
    torch.testing.assert_close(fixed, published, atol=TOLERANCE, rtol=0)

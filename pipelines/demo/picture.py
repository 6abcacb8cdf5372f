"""A drawn picture with the facts that may be asked about it, and the drawing steps that several kinds of picture share."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFont

from pipelines.demo.sources import shipped

Facts = dict[str, str]  # form of question -> its answer for this picture
Traits = Mapping[str, Any]  # what a picture must show; values are dealt evenly, so that no answer is the most common

CORNERS = ("top left", "top right", "bottom left", "bottom right")
INKS = {"red": (205, 40, 40), "green": (30, 140, 60), "blue": (40, 80, 200), "orange": (240, 140, 20)}


@dataclass(frozen=True)
class Picture:
    """A drawn picture, its sources, and the answers to everything that may be asked about it."""

    image: Image.Image
    sources: tuple[str, ...]
    facts: Facts


def crop(rng: Generator, picture: Image.Image, least: float, sides: tuple[int, int] = (176, 480)) -> np.ndarray:
    """Crops a random part whose shorter side is at least `least` of the picture's; (H, W, 3) in 0..1."""
    ratio = float(rng.choice((1.0, 4 / 3, 3 / 4)))
    scale = rng.uniform(least, 1.0)
    width, height = picture.size
    w = scale * min(width, height * ratio)
    h = w / ratio
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    longest = rng.integers(*sides, endpoint=True)
    size = (round(longest * min(1.0, ratio)), round(longest * min(1.0, 1 / ratio)))
    part = picture.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + w, y + h), reducing_gap=3.0)
    return np.asarray(part, dtype=np.float64) / 255


def chroma(picture: Image.Image | np.ndarray) -> float:
    """Mean distance of the colours from grey: 0 for a grey picture, 1 for pure colours."""
    pixels = picture if isinstance(picture, np.ndarray) else np.asarray(picture.reduce(8), dtype=np.float64) / 255
    return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())


def corner_means(grey: np.ndarray, part: float) -> dict[str, float]:
    """Mean brightness of the four corners, each `part` of the height and width."""
    h, w = (max(1, round(part * n)) for n in grey.shape)
    corners = (grey[:h, :w], grey[:h, -w:], grey[-h:, :w], grey[-h:, -w:])
    return {name: float(values.mean()) for name, values in zip(CORNERS, corners, strict=True)}


def turn_to(pixels: np.ndarray, corner: str) -> np.ndarray:
    """Mirrors (H, W, 3) pixels so that the brightest corner becomes `corner`."""
    means = corner_means(pixels.mean(axis=2), 0.5)
    brightest = max(means, key=means.__getitem__)
    if brightest.split()[0] != corner.split()[0]:
        pixels = pixels[::-1]
    if brightest.split()[1] != corner.split()[1]:
        pixels = pixels[:, ::-1]
    return pixels


def lit_from(pixels: np.ndarray, corner: str, strength: float) -> np.ndarray:
    """Lights (H, W, 3) pixels from one corner: the opposite corner loses `strength` of its light."""
    y = np.linspace(0, 1, pixels.shape[0])[:, None]
    x = np.linspace(0, 1, pixels.shape[1])[None, :]
    far = ((1 - y if "bottom" in corner else y) + (1 - x if "right" in corner else x)) / 2
    return pixels * (1 - strength * far)[..., None]


def brighter_side(grey: np.ndarray, margin: float) -> Facts:
    """The brighter half as {"side": ...}; empty where the halves differ by less than `margin` in 0..1."""
    half = grey.shape[1] // 2
    difference = grey[:, :half].mean() - grey[:, -half:].mean()
    return {} if abs(difference) < margin else {"side": "left" if difference > 0 else "right"}


def to_image(pixels: np.ndarray) -> Image.Image:
    """Converts pixels in 0..1 to an 8-bit image; a grey picture becomes a one-channel image, as photographs in grey are."""
    eight = (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(eight[..., 0] if (eight == eight[..., :1]).all() else eight)


def box_in(rng: Generator, corner: str, outer: tuple[int, int], inner: tuple[int, int]) -> tuple[int, int]:
    """Random top left point of a box of size `inner` in a corner of `outer`, 2 to 8 % off the edges.

    Sizes are (width, height) in pixels.
    """
    off = [round(rng.uniform(0.02, 0.08) * side) for side in outer]
    x = outer[0] - inner[0] - off[0] if "right" in corner else off[0]
    y = outer[1] - inner[1] - off[1] if "bottom" in corner else off[1]
    return x, y


@cache
def font_of(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = shipped(f"matplotlib/mpl-data/fonts/ttf/{name}.ttf")
    return ImageFont.truetype(
        path, size, layout_engine=ImageFont.Layout.BASIC
    )  # the raqm layout is not on every machine, and draws other pixels

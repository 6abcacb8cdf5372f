"""Pictures drawn from photographs and scans: photographs, handwritten digits on photographs, and medical pictures."""

from functools import cache

import numpy as np
import pydicom
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from pipelines.demo.picture import (
    CORNERS,
    Facts,
    Picture,
    Traits,
    box_in,
    brighter_side,
    chroma,
    corner_means,
    crop,
    font_of,
    lit_from,
    to_image,
    turn_to,
)
from pipelines.demo.sources import SOURCES, digits, photograph, scan, shipped

# (left, top, right, bottom) of the picture on screens with letters around it, which mirroring would show.
AREAS = {
    "ultrasound doppler": (44, 106, 598, 352),
    "ultrasound sector": (336, 62, 650, 345),
    "ultrasound heart": (36, 16, 290, 215),
}
TINTS = {"red": (0.85, 0.2, 0.2), "green": (0.2, 0.7, 0.3), "blue": (0.2, 0.4, 0.9), "yellow": (0.85, 0.75, 0.15)}
DIGIT_INKS = {"black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "red": (0.85, 0.0, 0.0), "yellow": (1.0, 0.9, 0.1)}


def _sharpness(grey: np.ndarray) -> float:
    """Share of the contrast that a one-pixel blur removes, at the 168 pixels that the mini model sees."""
    small = Image.fromarray((grey * 255).astype(np.uint8))
    small.thumbnail((168, 168), Image.Resampling.BICUBIC)
    values, soft = (np.asarray(i, dtype=np.float64) for i in (small, small.filter(ImageFilter.GaussianBlur(1))))
    return float((values - soft).std() / (values.std() + 4))


def photo(rng: Generator, split: str, traits: Traits) -> Picture:
    """A photograph or texture, cropped, mirrored, lit from a corner, exposed, toned, sharp or blurred."""
    named = SOURCES["photo"][split]
    suitable = [name for name, path in named.items() if traits["tone"] != "colour" or chroma(photograph(path)) > 0.15]
    name = str(rng.choice(suitable))
    pixels = crop(rng, photograph(named[name]), least=0.45)
    pixels = lit_from(turn_to(pixels, traits["corner"]), traits["corner"], rng.uniform(0.4, 0.8))
    target = rng.uniform(0.2, 0.28) if traits["light"] == "dark" else rng.uniform(0.62, 0.72)
    low, high = 0.05, 8.0
    for _ in range(20):  # bisect the exposure (a gamma) for this mean brightness
        gamma = (low * high) ** 0.5
        low, high = (gamma, high) if (pixels**gamma).mean() > target else (low, gamma)
    pixels = pixels**gamma
    facts: Facts = {}
    grey = pixels.mean(axis=2, keepdims=True)
    if traits["tone"] == "colour":
        if chroma(pixels) > 0.1:
            facts["photo-tone"] = "colour"
    elif traits["tone"] == "grey":
        pixels = np.repeat(grey, 3, axis=2)
        facts["photo-tone"] = "grey"
    else:  # toned: from black over the tint to white
        tint = np.array(TINTS[traits["tint"]])
        pixels = np.where(grey < 0.5, tint * 2 * grey, tint + (1 - tint) * (2 * grey - 1))
        facts["photo-tint"] = traits["tint"]
    image = to_image(pixels)
    if traits["focus"] == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(2.5, 4) * max(image.size) / 168))
    seen = np.asarray(image.convert("L"), dtype=np.float64) / 255
    sharp = _sharpness(seen)
    if traits["focus"] == "blurred" and sharp < 0.03:
        facts["photo-focus"] = "blurred"
    elif traits["focus"] == "sharp" and sharp > 0.06:
        facts["photo-focus"] = "sharp"
    if abs(seen.mean() - 0.44) > 0.1:
        facts["photo-light"] = "dark" if seen.mean() < 0.44 else "bright"
    facts |= {f"photo-{key}": value for key, value in brighter_side(seen, 0.05).items()}
    quarters, corners = (sorted(corner_means(seen, part).items(), key=lambda item: -item[1]) for part in (0.5, 0.3))
    if quarters[0][0] == corners[0][0] and min(c[0][1] - c[1][1] for c in (quarters, corners)) > 0.04:
        facts["photo-corner"] = quarters[0][0]
    return Picture(image, (f"photo:{name}",), facts)


def digit(rng: Generator, split: str, traits: Traits) -> Picture:
    """A handwritten digit in one corner of a photograph."""
    named = SOURCES["photo"][split]
    name = str(rng.choice(list(named)))
    pixels = turn_to(crop(rng, photograph(named[name]), least=0.5), str(rng.choice(CORNERS)))
    faded = (
        0.5 if traits["ink"] in ("black", "red") else 0.0
    )  # lighten the photograph under dark ink, dim it under light ink
    pixels = 0.45 * pixels + faded
    samples = digits(split)[traits["value"]]
    sample = int(rng.integers(len(samples)))
    share = rng.uniform(0.36, 0.44) if traits["size"] == "large" else rng.uniform(0.2, 0.25)
    side = round(share * min(pixels.shape[:2]))
    written = Image.fromarray(np.pad(samples[sample] * 255 // 16, 1).astype(np.uint8))
    strength = np.asarray(written.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)[..., None] / 255
    alpha = np.clip((strength - 0.3) / 0.35, 0, 1)
    x, y = box_in(rng, traits["corner"], (pixels.shape[1], pixels.shape[0]), (side, side))
    under = pixels[y : y + side, x : x + side]
    pixels[y : y + side, x : x + side] = under * (1 - alpha) + np.array(DIGIT_INKS[traits["ink"]]) * alpha
    facts = {f"digit-{key}": traits[key] for key in ("corner", "value", "ink", "size")}
    return Picture(to_image(pixels), (f"photo:{name}", f"digit:{split}-{traits['value']}-{sample}"), facts)


@cache
def _palette(name: str) -> np.ndarray:
    """A standard colour palette of DICOM as (256, 3) in 0..1."""
    lut = pydicom.dcmread(shipped(f"pydicom/data/palettes/{name}.dcm"))
    planes = [lut[f"{colour}PaletteColorLookupTableData"].value for colour in ("Red", "Green", "Blue")]
    return np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=1) / 255


def medical(rng: Generator, split: str, traits: Traits) -> Picture:
    """A part of a scan or microscope picture in colour, grey or negative, with a side marker in one corner."""
    named = SOURCES["scan"][split]
    modality, look = traits["view"]
    name = str(rng.choice([n for n in named if n.startswith(modality)]))
    original = scan(named[name])
    original = original.crop(AREAS.get(name, (0, 0, *original.size)))
    least = {"eye": 0.15 if original.width > 500 else 0.6, "microscope": 0.3}.get(modality, 0.7)
    pixels = crop(rng, original, least)
    while pixels.std() < 0.04:
        pixels = crop(rng, original, least)
    corner = f"{rng.choice(('top', 'bottom'))} {traits['side']}"
    pixels = lit_from(turn_to(pixels, corner), corner, rng.uniform(0.1, 0.5))
    facts: Facts = {"medical-kind": modality}
    grey = pixels[..., 1]  # red-free, as fundus pictures are often taken
    if look != "colour":
        pixels = np.repeat(grey[..., None], 3, axis=2)
        facts["medical-tone"] = "grey"
        border = np.concatenate([grey[:4].ravel(), grey[-4:].ravel(), grey[:, :4].ravel(), grey[:, -4:].ravel()]).mean()
        if border < 0.2:
            facts["medical-background"] = "white" if look == "negative" else "black"
        if look == "negative":
            pixels = 1 - pixels
    else:
        if chroma(pixels) < 0.1:
            shade = (np.clip(grey, 0, 1) * 255).astype(np.uint8)
            pixels = _palette(str(rng.choice(("hotiron", "hotmetalblue", "pet"))))[shade]
        facts["medical-tone"] = "colour"
    image = to_image(pixels).convert("RGB")
    side = round(rng.uniform(0.15, 0.2) * min(image.size))
    x, y = box_in(rng, traits["corner"], image.size, (side, side))
    draw = ImageDraw.Draw(image)
    draw.rectangle((x, y, x + side, y + side), fill=(15, 15, 15), outline=(240, 240, 240), width=max(1, side // 20))
    font = font_of("DejaVuSans-Bold", round(0.8 * side))
    draw.text((x + side / 2, y + side / 2), traits["marker"], fill=(250, 250, 250), font=font, anchor="mm")
    seen = np.asarray(image.convert("L"), dtype=np.float64) / 255
    facts |= {f"medical-{key}": value for key, value in brighter_side(seen, 0.05).items()}
    facts |= {"medical-corner": traits["corner"], "medical-marker": traits["marker"]}
    return Picture(to_image(np.asarray(image) / 255), (f"scan:{name}",), facts)

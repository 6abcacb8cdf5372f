"""Pages of real text, and forms and tables of real rows, with a stamp."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from pipelines.demo.picture import INKS, Picture, Traits, box_in, font_of, to_image
from pipelines.demo.sources import SOURCES, Table, paragraphs, table

PAPERS = {"white": (251, 251, 248), "yellow": (250, 238, 170), "blue": (190, 216, 245), "pink": (250, 205, 216)}
INK, PEN = (25, 25, 30), (30, 40, 140)  # of print and of handwriting
STAMPS = ("paid", "copy", "draft", "final")


@dataclass
class _Page:
    """A page while it is written: the drawing, the letters, and the box in pixels that is still free."""

    draw: ImageDraw.ImageDraw
    face: str  # a font family with "", "-Bold"
    size: int  # of the body's letters, pixels
    left: int
    top: int
    right: int
    bottom: int

    def font(self, scale: float = 1.0, bold: bool = False) -> ImageFont.FreeTypeFont:
        return font_of(self.face + ("-Bold" if bold else ""), round(self.size * scale))

    def line(self, x: int, text: str, bold: bool = False, scale: float = 1.0) -> None:
        self.draw.text((x, self.top), text, fill=INK, font=self.font(scale, bold))
        self.top += round(self.size * scale * 1.35)

    def column(self, words: list[str], left: int, right: int, bottom: int) -> None:
        """Sets words (taken from the list) flush left from `top` down to `bottom`."""
        font, y = self.font(), self.top
        while words and y + self.size < bottom:
            line = [words.pop(0)]
            while words and font.getlength(" ".join([*line, words[0]])) <= right - left:
                line.append(words.pop(0))
            self.draw.text((left, y), " ".join(line), fill=INK, font=font)
            y += round(self.size * 1.3)


def _words(rng: Generator, path: str) -> list[str]:
    """Words for a page, from a random paragraph on, without words too long for a narrow column."""
    blocks = paragraphs(path)
    start = int(rng.integers(len(blocks)))
    return [word for word in " ".join((blocks[start:] + blocks[:start]) * 6).split() if len(word) < 15]


def _cells(data: Table, row: int) -> list[tuple[str, str]]:
    cells = [(key, values[row]) for key, values in data.words.items()]
    cells += [(key, f"{values[row]:.4g}") for key, values in data.numbers.items()]
    return ([("time", data.order[row])] if data.order else []) + cells


def _write_article(page: _Page, words: list[str], columns: int) -> None:
    gutter = round(1.6 * page.size)
    width = (page.right - page.left - gutter * (columns - 1)) // columns
    for index in range(columns):
        left = page.left + index * (width + gutter)
        page.column(words, left, left + width, page.bottom)


def _write_letter(rng: Generator, page: _Page, words: list[str]) -> None:
    sender = page.left if rng.random() < 0.5 else page.left + round(0.6 * (page.right - page.left))
    for line in (" ".join(words[:2]), " ".join(words[2:4])):
        page.line(sender, line[:18])
    page.line(sender, f"{rng.integers(1, 29)} May {rng.integers(1970, 2025)}")
    page.top += round(2.2 * page.size)
    page.line(page.left, "Dear reader,")
    page.top += page.size
    end = page.top + round(rng.uniform(0.4, 0.55) * (page.bottom - page.top))
    page.column(words, page.left, page.right, end)
    page.top = end + page.size
    page.line(page.left, "Yours sincerely,")
    x = page.left + np.linspace(0, 9 * page.size, 40)  # the signature: a scribble
    y = page.top + 1.5 * page.size + np.cumsum(rng.normal(0, 0.45, 40)) * page.size * np.hanning(40)
    page.draw.line([(float(a), float(b)) for a, b in zip(x, y, strict=True)], fill=PEN, width=2, joint="curve")


def _write_form(rng: Generator, page: _Page, data: Table) -> None:
    fields = _cells(data, int(rng.integers(data.rows())))[: int(rng.integers(5, 9))]
    height, middle = round(2.1 * page.size), page.left + round(0.4 * (page.right - page.left))
    for key, value in fields:
        if page.top + 3 * height > page.bottom:
            break
        page.draw.text((page.left, page.top + 4), key[:14], fill=INK, font=page.font())
        page.draw.rectangle((middle, page.top, page.right, page.top + height - 4), outline=INK, fill="white")
        page.draw.text((middle + 5, page.top + 4), value[:20], fill=PEN, font=page.font())
        page.top += round(1.35 * height)
    ticked = str(rng.choice(("yes", "no")))
    for label in ("yes", "no"):
        left, top, right, bottom = page.left, page.top, page.left + page.size, page.top + page.size
        page.draw.rectangle((left, top, right, bottom), outline=INK, fill="white")
        if label == ticked:
            page.draw.line((left, top, right, bottom), fill=PEN, width=2)
            page.draw.line((left, bottom, right, top), fill=PEN, width=2)
        page.line(page.left + 2 * page.size, label)


def _write_table(rng: Generator, page: _Page, data: Table) -> None:
    start = int(rng.integers(max(1, data.rows() - 20)))
    columns = min(int(rng.integers(3, 6)), len(_cells(data, start)))
    height = round(1.7 * page.size)
    rows = min(int(rng.integers(9, 18)), (page.bottom - page.top) // height - 1)
    width = (page.right - page.left) / columns
    for index in range(rows + 1):
        y = page.top + index * height
        for column, (key, value) in enumerate(_cells(data, start + max(0, index - 1))[:columns]):
            text, font = (value, page.font()) if index else (key, page.font(bold=True))
            while font.getlength(text) > width - 4:
                text = text[:-1]
            page.draw.text((page.left + column * width + 3, y + 2), text, fill=INK, font=font)
        page.draw.line((page.left, y, page.right, y), fill=INK)
    bottom = page.top + (rows + 1) * height
    page.draw.line((page.left, bottom, page.right, bottom), fill=INK)
    for column in range(columns + 1):
        x = round(page.left + column * width)
        page.draw.line((x, page.top, x, bottom), fill=INK)


def _stamp(rng: Generator, word: str, width: int) -> Image.Image:
    """A rubber stamp, `width` pixels wide and rotated by up to 8 degrees, on transparent ground."""
    colour = INKS[str(rng.choice(("red", "green", "blue")))]
    font = font_of("DejaVuSans-Bold", round(width / 4.4))
    text = word.upper()
    height = round(1.6 * font.size)
    stamp = Image.new("RGBA", (width, height), (*colour, 240))
    draw = ImageDraw.Draw(stamp)
    draw.rectangle((3, 3, width - 4, height - 4), outline="white", width=max(1, width // 60))
    draw.text((width / 2, height / 2), text, fill="white", font=font, anchor="mm")
    return stamp.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, expand=True)


def document(rng: Generator, split: str, traits: Traits) -> Picture:
    """A page of real text or of a real table's rows, with a stamp, on coloured paper, scanned at an angle."""
    width = int(rng.integers(260, 371))
    size = (width, round(width * rng.uniform(1.1, 1.29)))
    paper = PAPERS[traits["paper"]]
    image = Image.new("RGB", size, paper)
    margin = round(width * rng.uniform(0.06, 0.1))
    face = str(rng.choice(("DejaVuSans", "DejaVuSerif", "DejaVuSansMono")))
    letters = round(width / rng.uniform(28, 34))
    page = _Page(ImageDraw.Draw(image), face, letters, margin, margin, width - margin, size[1] - margin)
    named = SOURCES["text" if traits["type"] in ("article", "letter") else "table"][split]
    name = str(rng.choice(list(named)))
    facts = {f"document-{key}": traits[key] for key in ("type", "heading", "corner", "stamp", "paper")}
    if traits["corner"] == "top left":  # where the stamp may cover the heading
        del facts["document-heading"]
    if traits["heading"] == "yes":
        page.line(page.left, name.title(), bold=True, scale=2.4)
        page.top += page.size // 2
    if traits["type"] in ("article", "letter"):
        source = f"text:{name}"
        words = _words(rng, named[name])
        if traits["type"] == "article":
            facts["document-columns"] = str(traits["columns"])
            _write_article(page, words, traits["columns"])
        else:
            _write_letter(rng, page, words)
    else:
        source = f"table:{name}"
        (_write_form if traits["type"] == "form" else _write_table)(rng, page, table(name, named[name]))
    image = image.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=paper)
    stamp = _stamp(rng, traits["stamp"], round(0.4 * width))
    image.paste(stamp, box_in(rng, traits["corner"], size, stamp.size), stamp)
    grain = rng.normal(0, 3, (size[1], size[0], 1))
    return Picture(to_image((np.asarray(image) + grain) / 255), (source,), facts)

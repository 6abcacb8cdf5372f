"""Routing samples for training: the pool shuffled, cut and described in other words (paper section 3.3)."""

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mova_core.routing.prompt import build_routing_prompt, build_routing_reply

# Each expert's card in other words, good sides and bad, so that a router learns to read and not to know by heart.
REWRITTEN = {
    "dinov2": (
        "Sees where things are in photographs and how they look up close; it cannot read and knows no charts.",
        "A detailed eye for everyday scenes: shapes, parts, counts and positions, but not for text.",
    ),
    "vary": (
        "Reads dense printed pages and screenshots line by line; of little use on ordinary photographs.",
        "Made for documents full of text; give it a natural scene and it sees next to nothing.",
    ),
    "codetr": (
        "Finds the objects of a scene and says precisely where each one is; it does not read text.",
        "Strong at detecting, counting and locating things in photographs, weak on documents and diagrams.",
    ),
    "pix2struct": (
        "Reads words in pictures of every kind, from web pages to signs and forms, even in odd layouts.",
        "Understands how text and layout belong together in a page; it sees little in scenes without words.",
    ),
    "deplot": (
        "Turns plots back into their numbers: bars, lines, axes and legends; it is no help with photographs.",
        "Knows charts and their values very well and hardly anything else.",
    ),
    "biomedclip": (
        "Trained on medical pictures such as X-rays, CT scans and slides; unfit for everyday scenes.",
        "Relates biomedical images to clinical words; choose it for medicine and for nothing else.",
    ),
    "sam": (
        "Outlines every region of a picture sharply, whatever it shows, but does not know what it is called.",
        "Excellent at borders and masks of things, even unknown ones; it neither reads nor names.",
    ),
}


def shuffle_pool(
    cards: Sequence[str], mask: Sequence[bool], rng: random.Random, keep: int | None = None
) -> tuple[list[str], list[bool]]:
    """Model-pool augmentation (paper section 3.3): the pool in random order, cut to `keep` experts, the labelled ones kept first.

    Returns descriptions and mask in the new order, so letters never stand for the same expert twice.
    """
    order = sorted(range(len(cards)), key=lambda index: (not mask[index], rng.random()))[: keep or len(cards)]
    rng.shuffle(order)
    return [cards[index] for index in order], [bool(mask[index]) for index in order]


def routing_turns(
    question: str,
    routing: Collection[str],
    pool: Sequence[Mapping[str, Any]],
    rng: random.Random | None = None,
    rewritten: Mapping[str, Sequence[str]] | None = None,
) -> tuple[tuple[str, str], tuple[str, str]]:
    """The routing sample of a labelled question: the pool and the question in, the labelled letters out.

    With `rng` the pool is augmented as in section 3.3 of the paper: shuffled, cut to at least two experts among which are
    all labelled ones, and each expert described by its card or, by chance, in other words.

    Args:
        routing: labelled experts.
        pool: mappings with name and description in routing order, as `MoVAConfig.pool`.
        rng: the source of chance; None leaves the pool as it is.
        rewritten: other descriptions by expert, `REWRITTEN` or your own; None takes the cards alone.
    """
    cards = [expert["description"] for expert in pool]
    mask = [expert["name"] in routing for expert in pool]
    if rng is not None:
        if rewritten is not None:
            named = zip(cards, (expert["name"] for expert in pool), strict=True)
            cards = [rng.choice([card, *rewritten.get(name, ())]) for card, name in named]
        keep = rng.randint(min(len(cards), max(2, sum(mask))), len(cards))
        cards, mask = shuffle_pool(cards, mask, rng, keep)
    return ("user", build_routing_prompt(question, cards)), ("assistant", build_routing_reply(mask))

"""Coarse-grained routing in words: the prompt that shows the pool, the reply that names experts, the labels that teach it.

The prompt is the published one (paper Table 2); letters exist only in here, everywhere else routing is a boolean mask
over the pool in its declared order.
"""

import re
from collections.abc import Mapping, Sequence

from mova_core.experts import EXPERTS, expert_card
from mova_core.experts.base import PreprocessingMode

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_EXPERTS = 3
NONE = "none"

_INSTRUCTION = (
    "You are a helpful assistant router. Based on the visual content, questions, and model pool the user provides, "
    "you need to consider the expertise of these models to select the most 3 suitable models to help you answer the "
    "questions. Answer with the model's letter from the given choices directly. If no models are selected, just "
    "answer 'none'."
)
_WORD = re.compile(r"[A-Za-z]+")
_CONNECTORS = frozenset(("and", "or", "answer", "the", "is", "both", "model", "models", NONE))


def pool_descriptions(names: Sequence[str] = EXPERTS) -> list[str]:
    """What the published prompt says of each expert, in the order of `names`."""
    return [expert_card(name).description for name in names]


def build_routing_prompt(question: str, cards: Sequence[str] | None = None) -> str:
    """The user's turn of the routing pass; `cards` are the pool's descriptions in routing order (default: the published seven)."""
    cards = pool_descriptions() if cards is None else cards
    if not 1 <= len(cards) <= len(LETTERS):
        raise ValueError(f"a routing prompt holds 1 to {len(LETTERS)} experts, got {len(cards)}")
    pool = "".join(f"\n{letter}. {card}" for letter, card in zip(LETTERS, cards, strict=False))
    return f"{_INSTRUCTION}\nModel pool:{pool}\n\nQuestion:\n{question}"


def build_routing_reply(mask: Sequence[bool]) -> str:
    """The reply a router is trained to give: letters in pool order, as in `A, D`, or `none`."""
    return ", ".join(letter for letter, chosen in zip(LETTERS, mask, strict=False) if chosen) or NONE


def read_reply(reply: str, num_experts: int = 7, max_experts: int = MAX_EXPERTS) -> list[int] | None:
    """Experts a reply names, first named first, at most `max_experts`; [] for an explicit none, None when it says neither.

    A letter counts when it stands alone as a word. Lower case counts only in a reply made of letters and connecting
    words: the article in "a chart" is not expert A.
    """
    words = _WORD.findall(reply)
    if words and words[0].lower() == NONE:
        return []
    plain = all(len(word) == 1 or word.lower() in _CONNECTORS for word in words)
    pool = LETTERS[:num_experts]
    chosen = [
        pool.index(letter) for word in words if (letter := word.upper() if plain else word) in pool and len(word) == 1
    ]
    if chosen:
        return list(dict.fromkeys(chosen))[:max_experts]
    return [] if plain and NONE in (word.lower() for word in words) else None


def parse_routing(
    reply: str, num_experts: int = 7, max_experts: int = MAX_EXPERTS, compat: PreprocessingMode = "fixed"
) -> list[bool]:
    """A router's reply as a mask over the pool. A reply that names nothing readable routes to no expert (see `read_reply`).

    compat="published" is the released parser: the text of the first three comma-separated fields is searched for every
    upper-case letter, anywhere and without a cap, so "Because" is expert B.
    """
    if compat == "published":
        fields = "".join(reply.split(",")[:3])
        return [letter in fields for letter in LETTERS[:num_experts]]
    chosen = read_reply(reply, num_experts, max_experts) or []
    return [index in chosen for index in range(num_experts)]


def label_experts(loss_without: float, losses: Mapping[str, float], max_experts: int = MAX_EXPERTS) -> list[str]:
    """Routing label of one sample: experts whose LM loss is below the loss without any, lowest first (paper section 3.3)."""
    useful = sorted((loss, name) for name, loss in losses.items() if loss < loss_without)
    return [name for _, name in useful[:max_experts]]

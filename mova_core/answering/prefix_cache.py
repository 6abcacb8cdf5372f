"""Keys and values of what the LLM read."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

CONVERSATIONS = 32  # most that the LLM's keys and values are kept of, however small they are


@dataclass(frozen=True)
class ImageView:
    """One picture as one question sees it; equal views have equal visual tokens."""

    key: str  # of the picture
    experts: frozenset[str] = frozenset()
    asked: str = ""  # what the gate reads; empty without experts, as then it weighs nothing


@dataclass(frozen=True)
class CachedPrefix:
    """What the LLM read and said, and the keys and values (1, H, L, d) per layer that came of it."""

    read: list[int | ImageView]  # per position; longer than L by what was said last
    prompt: int  # how many of them were read before the reply
    layers: list[tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def common(self, read: Sequence[int | ImageView]) -> int:
        """How many positions from the first on hold the same, so have the same keys and values."""
        length = min(len(read), self.layers[0][0].shape[-2])
        return next((at for at in range(length) if self.read[at] != read[at]), length)


class PrefixCache:
    """The last conversations with the LLM, for those that begin like one of them; the longest unused let go first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.conversations: list[CachedPrefix] = []
        self.lock = threading.Lock()

    def begun(self, read: Sequence[int | ImageView]) -> DynamicCache | None:
        """Keys and values of the longest beginning the LLM has read; the last token is left for it to go on from."""
        with self.lock:
            begun = [conversation.common(read[:-1]) for conversation in self.conversations]
            length = max(begun, default=0)
            if not length:
                return None
            last = self.conversations.pop(begun.index(length))
            self.conversations.append(last)
        return DynamicCache([(keys[..., :length, :], values[..., :length, :]) for keys, values in last.layers])

    def put(self, read: Sequence[int | ImageView], said: Sequence[int], cache: Any) -> None:
        """Keeps a reply's cache, in place of those of the turns before it, if it holds every position of one row."""
        layers = getattr(cache, "layers", [])
        if not layers or not all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
            return  # a sliding window or a state of its own: it cannot be cut back
        kept = [(layer.keys, layer.values) for layer in layers]
        new = CachedPrefix([*read, *said], len(read), kept)
        if len(new.layers[0][0]) > 1 or new.nbytes > self.limit:
            return
        with self.lock:
            others = [one for one in self.conversations if one.common(read) < one.prompt]
            self.conversations = [*others, new][-CONVERSATIONS:]
            while sum(one.nbytes for one in self.conversations) > self.limit:
                del self.conversations[0]


def _rescales(llm: Any) -> bool:
    """Whether the LLM turns its keys by how long all it reads is, so that those of a beginning are not its own."""
    rope = str(getattr(llm, "rope_parameters", None))
    return "dynamic" in rope or "longrope" in rope

"""PrefixCache: keys and values of earlier prompts, for prompts that begin the same way.

A conversation that goes on, or a second question on an image, repeats a long beginning: text and visual tokens. Its keys
and values depend on nothing after it, so the LLM reads such a prompt only from the first difference on.
"""

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

MAX_PREFIXES = 32  # most prompts in the cache, however small they are: each look-up compares with all of them


@dataclass(frozen=True)
class CachedPrefix:
    """What the LLM read and replied, and the keys and values (1, H, L, d) of each layer."""

    content: Sequence[Hashable]  # per position what stands there; longer than L by the last token, which was not read
    prompt_length: int  # positions of `content` that were read before the reply
    layers: list[tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def common_length(self, content: Sequence[Hashable]) -> int:
        """Positions from the first on at which both hold the same, which therefore have the same keys and values."""
        length = min(len(content), self.layers[0][0].shape[-2])
        pairs = zip(self.content[:length], content[:length], strict=True)
        return next((position for position, (ours, theirs) in enumerate(pairs) if ours != theirs), length)


class PrefixCache:
    """The last prompts with their keys and values, least recently used out first. Any number of threads may use it.

    Args:
        max_bytes: of keys and values together; 0 stores nothing.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._prefixes: list[CachedPrefix] = []  # least recently used first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(prefix.nbytes for prefix in self._prefixes)

    def find(self, content: Sequence[Hashable]) -> DynamicCache | None:
        """Keys and values of the longest known beginning; None if there is none.

        Args:
            content: what stands at each position of the prompt. Its last position is never taken from the cache, because
                the LLM must read one token to continue.
        """
        with self._lock:
            lengths = [prefix.common_length(content[:-1]) for prefix in self._prefixes]
            length = max(lengths, default=0)
            if not length:
                return None
            prefix = self._prefixes.pop(lengths.index(length))
            self._prefixes.append(prefix)
        return DynamicCache([(keys[..., :length, :], values[..., :length, :]) for keys, values in prefix.layers])

    def put(self, prompt: Sequence[Hashable], reply: Sequence[Hashable], cache: Any) -> None:
        """Stores what the LLM read, in place of prompts of which this one is a continuation.

        Nothing is stored of a cache that is too large, holds several rows, or cannot be cut back to a beginning (a sliding
        window, or a recurrent state).

        Args:
            prompt, reply: what stands at each position.
            cache: as transformers' `generate` returns it in `past_key_values`.
        """
        layers = getattr(cache, "layers", [])
        if not layers or not all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
            return
        new = CachedPrefix([*prompt, *reply], len(prompt), [(layer.keys, layer.values) for layer in layers])
        if len(new.layers[0][0]) > 1 or new.nbytes > self.max_bytes:
            return
        with self._lock:
            others = [prefix for prefix in self._prefixes if prefix.common_length(prompt) < prefix.prompt_length]
            self._prefixes = [*others, new][-MAX_PREFIXES:]
            while sum(prefix.nbytes for prefix in self._prefixes) > self.max_bytes:
                del self._prefixes[0]


def keys_depend_on_length(llm_config: Any) -> bool:
    """Whether the LLM rotates its keys by the length of the whole prompt, so that those of a beginning cannot be reused."""
    rope = str(getattr(llm_config, "rope_parameters", None))
    return "dynamic" in rope or "longrope" in rope

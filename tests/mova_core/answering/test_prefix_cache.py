from typing import Any

import pytest
import torch
from transformers import DynamicCache

from mova_core.answering.prefix_cache import MAX_PREFIXES, PrefixCache, keys_depend_on_length

POSITION_BYTES = 2 * 2 * 1 * 4  # keys and values of two layers with one float32 each


def cache_of(content, rows=1):
    """Keys (and values) that say at which position they stand; two layers with one head of width 1."""
    keys = torch.arange(len(content), dtype=torch.float32).expand(rows, 1, -1)[..., None]
    return DynamicCache([(keys, -keys)] * 2)


def put(prefixes, prompt, reply="!"):
    prefixes.put(prompt, reply, cache_of(prompt + reply[:-1]))  # the last token of a reply is never read


def found_length(prefixes, content) -> int:
    found = prefixes.find(content)
    return found.get_seq_length() if found else 0


def test_the_longest_common_beginning_is_found():
    prefixes = PrefixCache(10_000)
    assert prefixes.find("anything") is None
    put(prefixes, "a cat sat", "down!")
    put(prefixes, "a cow ran", "off!")
    found: Any = prefixes.find("a cat ran")
    assert found.get_seq_length() == len("a cat ")
    assert found.layers[0].keys.flatten().tolist() == list(range(6))
    assert found_length(prefixes, "a cow ranoff!?") == len("a cow ranoff"), "the reply's beginning too"
    assert prefixes.find("b") is None


def test_the_last_position_is_left_to_be_read():
    prefixes = PrefixCache(10_000)
    put(prefixes, "left?")
    assert found_length(prefixes, "left?") == 4
    assert prefixes.find("l") is None


def test_a_continuation_replaces_what_it_continues():
    prefixes = PrefixCache(10_000)
    put(prefixes, "what?", "cat!")
    put(prefixes, "what?cat!left?", "no!")
    assert len(prefixes) == 1
    put(prefixes, "where?")
    assert len(prefixes) == 2


def test_least_recently_used_prefixes_go_first():
    prefixes = PrefixCache(3 * 5 * POSITION_BYTES)
    for prompt in ("aaaaa", "bbbbb", "ccccc"):
        put(prefixes, prompt)
    assert found_length(prefixes, "aaaa.") == 4
    put(prefixes, "ddddd")
    assert prefixes.nbytes == 3 * 5 * POSITION_BYTES
    assert prefixes.find("bbbbb") is None and prefixes.find("aaaaa") is not None
    put(prefixes, "e" * 16)
    assert len(prefixes) == 3 and prefixes.find("e" * 16) is None, "larger than the whole cache"


def test_the_number_of_prefixes_is_bounded():
    prefixes = PrefixCache(10**9)
    for number in range(MAX_PREFIXES + 5):
        prefixes.put([number, 0], [1], cache_of("ab"))
    assert len(prefixes) == MAX_PREFIXES


@pytest.mark.parametrize("cache", [None, DynamicCache(), cache_of("ab", rows=2)])
def test_prefixes_that_cannot_be_reused_are_not_stored(cache):
    prefixes = PrefixCache(10_000)
    prefixes.put("ab", "!", cache)
    assert len(prefixes) == 0


def test_llms_that_rescale_their_positions_are_known():
    class Config:
        rope_parameters = {"rope_type": "dynamic", "factor": 2.0}  # noqa: RUF012

    assert keys_depend_on_length(Config()) and not keys_depend_on_length(object())
    Config.rope_parameters = {"rope_type": "longrope"}
    assert keys_depend_on_length(Config())

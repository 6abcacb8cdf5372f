"""Routing: the prompt that the LLM reads, the reply that names experts, the label criterion (paper section 3.3)."""

from mova_core.routing.augmentation import REWRITTEN, routing_turns, shuffle_pool
from mova_core.routing.prompt import (
    LETTERS,
    MAX_EXPERTS,
    build_routing_prompt,
    build_routing_reply,
    label_experts,
    parse_routing,
    pool_descriptions,
    read_reply,
)

__all__ = [
    "LETTERS",
    "MAX_EXPERTS",
    "REWRITTEN",
    "build_routing_prompt",
    "build_routing_reply",
    "label_experts",
    "parse_routing",
    "pool_descriptions",
    "read_reply",
    "routing_turns",
    "shuffle_pool",
]

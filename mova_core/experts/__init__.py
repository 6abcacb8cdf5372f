"""The pool of vision experts: their cards, their registry, and how each is loaded."""

from mova_core.experts.base import ExpertCard, Features, VisionExpert, fingerprint
from mova_core.experts.loading import load_expert
from mova_core.experts.registry import (
    BASE,
    EXPERTS,
    expert_card,
    expert_class,
    expert_module,
    expert_names,
    register,
)
from mova_core.experts.weights import WeightsError, found_here

__all__ = [
    "BASE",
    "EXPERTS",
    "ExpertCard",
    "Features",
    "VisionExpert",
    "WeightsError",
    "expert_card",
    "expert_class",
    "expert_module",
    "expert_names",
    "fingerprint",
    "found_here",
    "load_expert",
    "register",
]

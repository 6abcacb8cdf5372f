"""The pool of vision experts, listed without importing any network."""

import importlib
from typing import TypeVar

from mova_core.experts.base import ExpertCard, VisionExpert

BASE = "clip"
EXPERTS = ("dinov2", "vary", "codetr", "pix2struct", "deplot", "biomedclip", "sam")  # routing order A..G

_MODULES = {name: f"mova_core.experts.{name}" for name in (BASE, *EXPERTS)}  # imported at first use
_REGISTRY: dict[str, type[VisionExpert]] = {}

_Expert = TypeVar("_Expert", bound=type[VisionExpert])


def register(expert: _Expert) -> _Expert:
    """Class decorator: registers a VisionExpert under its card's name. docs/custom_expert.md shows a complete expert.

    A class of the same module and name replaces the registered one, as when a notebook cell runs twice.

    Raises:
        ValueError: another class has this name.
    """
    name = expert.card.name
    registered = _REGISTRY.get(name, expert)
    same = (registered.__module__, registered.__qualname__) == (expert.__module__, expert.__qualname__)
    if not same or _MODULES.get(name, expert.__module__) != expert.__module__:
        taken = _REGISTRY[name].__qualname__ if name in _REGISTRY else _MODULES[name]
        raise ValueError(f"expert name {name!r} is taken by {taken}; choose another for {expert.__qualname__}")
    _REGISTRY[name] = expert
    return expert


def expert_class(name: str) -> type[VisionExpert]:
    """The class registered under `name`.

    Raises:
        ValueError: no expert has this name; the message lists the names.
    """
    if name not in _REGISTRY and name in _MODULES:
        importlib.import_module(_MODULES[name])
    if name not in _REGISTRY:
        raise ValueError(f"unknown expert {name!r}; there are {', '.join(expert_names())}")
    return _REGISTRY[name]


def expert_names() -> tuple[str, ...]:
    """The names of all experts: the base encoder, A..G, and experts registered since."""
    return tuple(dict.fromkeys((*_MODULES, *_REGISTRY)))


def expert_module(name: str) -> str:
    """The module that another process imports so that the expert is registered there, too.

    Raises:
        ValueError: no expert has this name, or its class is defined in `__main__`, which no other process can import.
    """
    module = expert_class(name).__module__
    if module == "__main__":
        raise ValueError(
            f"expert {name!r} is defined in the script or notebook that runs, which other processes cannot import: "
            "put its class into a module of its own and import that"
        )
    return module


def expert_card(name: str) -> ExpertCard:
    """The card of an expert, without building its network.

    Raises:
        ValueError: no expert has this name; the message lists the names.
    """
    return expert_class(name).card

"""Published tensor names <-> the state dicts of our modules. A conversion renames and never computes."""

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mova_core.experts import BASE, EXPERTS, WeightsError, expert_card, expert_class

LLM, ADAPTER = "language_model", "adapter"
TOWERS = {name: f"model.vision_tower.vision_tower_{index}." for index, name in enumerate((BASE, *EXPERTS))}
PREFIXES = TOWERS | {ADAPTER: "model.mm_projector."}  # every other published name belongs to the LLM
OURS = {BASE: "base_encoder.", ADAPTER: "adapter.", LLM: "language_model."}  # in `MoVAForConditionalGeneration`

# Tensors that some checkpoints hold and MoVA never reads: heads of the text encoder, tables that follow from the config.
UNUSED = re.compile(r".*\.text_encoder\.(cls\.|bert\.pooler\.)|.*\.position_ids$|.*\.rotary_emb\.inv_freq$")


@dataclass(eq=False)
class PublishedParts(MutableMapping[str, dict[str, Tensor]]):
    """A mapping from part ("language_model", "adapter", "clip" and each expert) to the state dict of our module.

    The other fields keep what `to_published` needs to restore the published state dict exactly.
    """

    states: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    archs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by vision tower
    rest: dict[str, Tensor] = field(
        default_factory=dict
    )  # published tensors, by full name, that no module of ours holds
    derived: set[str] = field(default_factory=set)  # published names that our modules yield but the source lacks

    def __getitem__(self, part: str) -> dict[str, Tensor]:
        return self.states[part]

    def __setitem__(self, part: str, state: dict[str, Tensor]) -> None:
        self.states[part] = state

    def __delitem__(self, part: str) -> None:
        del self.states[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)


def part_of(published_name: str) -> str:
    """The part that a published tensor belongs to."""
    return next((part for part, prefix in PREFIXES.items() if published_name.startswith(prefix)), LLM)


def published_name(part: str, name: str) -> str:
    """The published name of our tensor `name`; `part` is one of `OURS`, whose tensors are renamed one by one."""
    if part == BASE:
        [name] = expert_class(BASE).to_public({name: torch.empty(0, device="meta")}, {})
    return PREFIXES.get(part, "") + name


def from_published(
    state_dict: Mapping[str, Tensor], archs: Mapping[str, Mapping[str, Any]] | None = None
) -> PublishedParts:
    """Splits a published state dict, or some of it, into the state dicts of our modules. Meta tensors work as well.

    Args:
        state_dict: tensors by published name.
        archs: by expert, arch words that replace those read from the shapes. The shapes do not determine the number of
            heads of most networks (assumed: one per 64 channels), nor the image size of Pix2Struct and DePlot.

    Returns:
        A mapping from "language_model", "adapter", "clip" and each expert to the state dict of our module.

    Raises:
        WeightsError: a name of a vision tower that MoVA does not have.
    """
    parts = PublishedParts()
    published: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        part = part_of(name)
        if part == LLM and name.startswith("model.vision_tower."):
            raise WeightsError(
                f"{name}: there is no such tower; MoVA has vision_tower_0 to vision_tower_{len(EXPERTS)}"
            )
        if UNUSED.match(name):
            parts.rest[name] = tensor
        else:
            published.setdefault(part, {})[name.removeprefix(PREFIXES.get(part, ""))] = tensor
    for part in sorted(published, key=[LLM, ADAPTER, *TOWERS].index):
        if part in TOWERS:
            _add_tower(parts, part, published[part], (archs or {}).get(part, {}))
        else:
            parts[part] = published[part]
    return parts


def _add_tower(parts: PublishedParts, name: str, published: dict[str, Tensor], overrides: Mapping[str, Any]) -> None:
    """Adds one vision tower, its arch, and the tensors in which the way there and back would differ."""
    expert = expert_class(name)
    arch = expert.arch_from_weights(published)
    if "picture_size" in arch and BASE in parts.archs:
        arch["picture_size"] = parts.archs[BASE][
            "image_size"
        ]  # the published towers all read the base encoder's pixels
    arch |= overrides
    parts.archs[name] = arch
    parts[name] = expert.from_public(published, arch)
    back = expert.to_public(parts[name], arch)
    lost = {key: it for key, it in published.items() if key not in back or not _same(back[key], it)}
    parts.rest |= {TOWERS[name] + key: tensor for key, tensor in lost.items()}
    parts.derived |= {TOWERS[name] + key for key in back.keys() - published.keys()}


def to_published(
    parts: Mapping[str, Mapping[str, Tensor]], archs: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Tensor]:
    """The inverse of `from_published`: one state dict in published names.

    Args:
        parts: from `from_published`, or state dicts of our modules by the same names.
        archs: by expert; default those that came with `parts`, else the published ones.

    Raises:
        ValueError: a part that a published checkpoint does not have.
    """
    if archs is None:
        archs = parts.archs if isinstance(parts, PublishedParts) else {}
    published: dict[str, Tensor] = {}
    for part, state in parts.items():
        if part not in PREFIXES and part != LLM:
            raise ValueError(f"no part {part!r} in a published checkpoint: there are {', '.join([LLM, *PREFIXES])}")
        if part in TOWERS:
            state = expert_class(part).to_public(state, archs.get(part) or expert_card(part).full)
        published |= {PREFIXES.get(part, "") + name: tensor for name, tensor in state.items()}
    if isinstance(parts, PublishedParts):
        published = {name: it for name, it in published.items() if name not in parts.derived} | parts.rest
    return published


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Equal values; meta tensors are compared by shape and dtype."""
    if tensor is other:
        return True
    alike = (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
    return alike and (tensor.is_meta or other.is_meta or torch.equal(tensor, other))

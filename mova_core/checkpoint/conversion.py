"""`mova convert`: a published MoVA folder to ours and back.

Bytes are copied and never computed, so what goes there and back is the same to the bit. Experts keep their published
names, which `load_expert` reads; what no module of ours holds lies beside the model in the folder `published`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mova_core.checkpoint.config import (
    detect_chat_format,
    our_config,
    read_llm_tokenizer,
    read_published_config,
    read_text_encoder,
)
from mova_core.checkpoint.names import (
    OURS,
    TOWERS,
    PublishedParts,
    from_published,
    published_name,
    to_published,
)
from mova_core.checkpoint.output import PUBLISHED, REST, copy_files, split_into_files, write_folder
from mova_core.checkpoint.tensors import safetensors_tensors, stored_tensors
from mova_core.config import MoVAConfig
from mova_core.data import IMAGE_MARK
from mova_core.experts import BASE, EXPERTS, WeightsError, expert_card, expert_class
from mova_core.experts.weights import mismatch
from mova_core.model import ROUTING_LORA, MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor, prepare_tokenizer

# Co-DETR's rotary tables: shared by its blocks, so that a file may hold each only once; they follow from the arch.
SHARED = re.compile(re.escape(TOWERS["codetr"]) + r"(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    experts: str | Sequence[str] = "keep",
    text_encoder: str | None = None,
    chat_format: str | None = None,
    shard_gb: float = 4.0,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda _: None,
    begin: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Converts a published MoVA folder to ours.

    The folder appears under its name only when it is complete. A conversion that was killed leaves a folder
    `.NAME-*.tmp` beside it, which may be deleted.

    `target` becomes a folder for `MoVAForConditionalGeneration.from_pretrained` and `MoVAProcessor.from_pretrained`. In it
    are `experts/NAME`, which `load_expert(NAME, weights=...)` and the feature servers read; `published` with what only
    the way back needs; and `conversion.json`, the report.

    Args:
        source: config.json, tokenizer and weights, as safetensors or .bin, sharded or not. `expert_archs` in its
            config.json may hold arch words that the shapes do not determine.
        experts: "keep", "drop", or the names to keep.
        text_encoder: folder or hub id of the adapter's text encoder, for its tokenizer and, where a config.json is there,
            its config; default what the published config names.
        chat_format: one of `CHAT_FORMATS`; default detected by the tokenizer's special tokens.
        shard_gb: largest weights file, GB.
        dry_run: check everything, write nothing.
        overwrite: replace `target` if it is a folder that holds something, once the new folder is complete.
        progress, begin: called with the bytes of every piece written, and before the first with their sum.

    Returns:
        The report: every tensor by published name, where it went and why.

    Raises:
        WeightsError: missing, unexpected or misshapen tensors (all are named), a missing shard, no config or tokenizer.
        FileExistsError: `target` is a file, or holds something and `overwrite` is not set.
        OSError: the disk is too small.
    """
    source, target = Path(source), Path(target)
    kept = chosen_experts(experts)
    config = read_published_config(source)
    stored = stored_tensors(source)
    metas = {name: tensor.meta() for name, tensor in stored.items()}
    parts = from_published(metas, config.get("expert_archs"))
    tokenizer = read_llm_tokenizer(source)
    chat_format = chat_format or detect_chat_format(tokenizer)
    prepare_tokenizer(tokenizer, chat_format)
    text_tokenizer, bert = read_text_encoder(text_encoder or config.get("mm_projector_text_encoder"), parts)
    ours = our_config(config, parts, bert, tokenizer.get_vocab()[IMAGE_MARK])
    rederived = _check(source, parts, metas, ours)

    weights = {
        prefix + name: stored[published_name(part, name)]
        for part, prefix in OURS.items()
        for name in parts.get(part, {})
    }
    files = split_into_files(weights, shard_gb)
    for name in kept:
        prefix = TOWERS[name]
        files[f"experts/{name}/model.safetensors"] = {
            full_name.removeprefix(prefix): it for full_name, it in stored.items() if full_name.startswith(prefix)
        }
    expert_prefixes = tuple(TOWERS[name] for name in EXPERTS)
    if rest := {name: stored[name] for name in parts.rest if not name.startswith(expert_prefixes)}:
        files[f"{PUBLISHED}/{REST}"] = rest
    notes = {name: "left out with its expert" for name in stored if name.startswith(expert_prefixes)}
    notes |= {name: "not read by MoVA, kept for the way back" for name in parts.rest if name not in notes}
    notes |= {name: "not in the source: follows from the arch" for name in rederived}

    def finish(folder: Path) -> None:
        ours.save_pretrained(folder)
        MoVAProcessor.for_model(ours, tokenizer, text_tokenizer, chat_format=chat_format).save_pretrained(folder)
        for name in kept:
            about = {"expert": name, "arch": parts.archs[name]}
            (folder / "experts" / name / "config.json").write_text(json.dumps(about, indent=2))
        copy_files(source, folder / PUBLISHED)

    return write_folder(source, target, stored, files, notes, finish, dry_run, overwrite, progress, begin)


def convert_back(
    source: str | Path,
    target: str | Path,
    *,
    shard_gb: float = 4.0,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda _: None,
    begin: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Converts a folder made by `convert`, whose weights may have been trained since, back to the published form.

    Arguments as in `convert`.

    The report's `left_out` names what has no published form: the expert-routing LoRA.

    Raises:
        WeightsError: as `convert`; also where the folder `published` or one of `experts` is not there.
        FileExistsError, OSError: as `convert`.
    """
    source, target = Path(source), Path(target)
    if not (source / PUBLISHED).is_dir():
        raise WeightsError(
            f"{source}: only a model that `mova convert` made from a published one can go back, and this one has no folder "
            f"{PUBLISHED} from such a conversion"
        )
    config = read_published_config(source / PUBLISHED)
    if absent := [name for name in EXPERTS if not (source / "experts" / name).is_dir()]:
        folders = ", ".join(f"experts/{name}" for name in absent)
        raise WeightsError(f"{source}: no {folders}, which a published checkpoint holds: copy them there")
    ours = MoVAConfig.from_pretrained(source)
    model = stored_tensors(source)
    if foreign := [name for name in model if not name.startswith(tuple(OURS.values()))]:
        raise WeightsError(
            f"{source}: a published checkpoint has no place for {mismatch({}, {name: model[name] for name in foreign})}"
        )
    stored = {
        published_name(part, name.removeprefix(prefix)): tensor
        for part, prefix in OURS.items()
        for name, tensor in model.items()
        if name.startswith(prefix)
    }
    for name in EXPERTS:
        tensors = stored_tensors(source / "experts" / name)
        stored |= {TOWERS[name] + key: tensor for key, tensor in tensors.items()}
    rest = source / PUBLISHED / REST
    if rest.is_file():
        stored |= safetensors_tensors(rest)
    metas = {name: tensor.meta() for name, tensor in stored.items()}
    parts = from_published(metas, config.get("expert_archs"))
    rederived = _check(source, parts, metas, ours)
    notes = {name: "not read by MoVA" for name in parts.rest}
    notes |= {name: "not in the source: follows from the arch" for name in rederived}

    def finish(folder: Path) -> None:
        copy_files(source / PUBLISHED, folder)

    files = split_into_files(stored, shard_gb)
    report = write_folder(source, target, stored, files, notes, finish, dry_run, overwrite, progress, begin)
    return report | {"left_out": [ROUTING_LORA] if (source / ROUTING_LORA).is_dir() else []}


def chosen_experts(experts: str | Sequence[str]) -> tuple[str, ...]:
    """Names in routing order.

    Args:
        experts: "keep" (all), "drop" (none), or names, as a list or separated by commas.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(experts, str):
        if experts in ("keep", "drop"):
            return EXPERTS if experts == "keep" else ()
        experts = [name.strip() for name in experts.split(",")]
    if unknown := sorted(set(experts) - set(EXPERTS)):
        raise ValueError(f"no expert {', '.join(unknown)}: give keep, drop, or some of {', '.join(EXPERTS)}")
    return tuple(name for name in EXPERTS if name in experts)


def _check(source: Path, parts: PublishedParts, metas: Mapping[str, Tensor], ours: MoVAConfig) -> list[str]:
    """Compares names and shapes with those of the modules. Returns the absent names that may be absent.

    Raises:
        WeightsError: they differ; the message names the tensors.
    """
    archs = {name: parts.archs.get(name) or dict(expert_card(name).full) for name in TOWERS}
    archs[BASE] = ours.base_arch
    with torch.device("meta"):
        whole = MoVAForConditionalGeneration(ours).state_dict()
        modules = {name: expert_class(name)(archs[name]).state_dict() for name in EXPERTS}
    for part, prefix in OURS.items():
        modules[part] = {name.removeprefix(prefix): it for name, it in whole.items() if name.startswith(prefix)}
    wanted = to_published(modules, archs)
    absent = [name for name in wanted if name not in metas]
    optional = [name for name in absent if SHARED.match(name)]
    if ours.text_config.tie_word_embeddings:
        optional += ["lm_head.weight"] if "lm_head.weight" in absent else []
    given = {name: tensor for name, tensor in metas.items() if name not in parts.rest}
    problem = mismatch(wanted, given, optional)
    if problem:
        raise WeightsError(f"{source} is no whole MoVA of its config.json: {problem}")
    return optional

"""The folder that a conversion writes, and its report."""

import json
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from mova_core.checkpoint.names import part_of
from mova_core.checkpoint.tensors import StoredTensor, write_tensors
from mova_core.experts.weights import SAFE, TORCH
from mova_core.io.atomic import atomic_path

PUBLISHED = "published"  # folder beside our model: the published files, and tensors that no module of ours holds
REST = "rest.safetensors"
REPORT = "conversion.json"


def split_into_files(tensors: Mapping[str, StoredTensor], shard_gb: float) -> dict[str, dict[str, StoredTensor]]:
    """Weights files of at most so many GB, in the order of `tensors`, under the names that transformers looks for."""
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda stored: stored.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(shard_gb * 1e9),
    )
    return {file: {name: tensors[name] for name in names} for file, names in split.filename_to_tensors.items()}


def copy_files(source: Path, target: Path) -> None:
    """Everything of a published folder but its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        weights = file.suffix in SAFE + TORCH or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != REPORT:
            shutil.copyfile(file, target / file.name)


def write_folder(
    source: Path,
    target: Path,
    stored: Mapping[str, StoredTensor],
    files: Mapping[str, Mapping[str, StoredTensor]],
    notes: Mapping[str, str],
    finish: Callable[[Path], None],
    dry_run: bool,
    overwrite: bool,
    progress: Callable[[int], Any],
    begin: Callable[[int], Any],
) -> dict[str, Any]:
    """Writes the files of a conversion under a temporary name, then renames the folder to `target`.

    Args:
        stored: every tensor of the source, by published name.
        files: file in `target` -> tensors by their name in it.
        notes: published name -> why the tensor was left out or moved.
        finish: writes all else (config, processor) into the folder under its temporary name.

    Returns:
        The report.

    Raises:
        FileExistsError: `target` is a file, or a folder that is not empty and not to be overwritten.
        OSError: the disk is too small.
    """
    report = _report(source, target, stored, files, notes)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise FileExistsError(f"{target} is there already: name a folder that is missing or empty")
    if dry_run:
        return report
    parent = next(folder for folder in target.absolute().parents if folder.is_dir())
    total, free = report["bytes"], shutil.disk_usage(parent).free
    if total > free:
        raise OSError(f"{target}: {total / 1e9:.1f} GB to write, but {parent} has {free / 1e9:.1f} GB free")
    target.parent.mkdir(parents=True, exist_ok=True)
    begin(total)
    with atomic_path(target) as draft:
        for name, tensors in files.items():
            write_tensors(draft / name, tensors, progress)
        sharded = {file: tensors for file, tensors in files.items() if file.startswith("model-")}
        if sharded:
            size = sum(tensor.size for tensors in sharded.values() for tensor in tensors.values())
            weight_map = {name: file for file, tensors in sharded.items() for name in tensors}
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
        finish(draft)
        (draft / REPORT).write_text(json.dumps(report, indent=1))
    return report


def _report(
    source: Path,
    target: Path,
    stored: Mapping[str, StoredTensor],
    files: Mapping[str, Mapping[str, StoredTensor]],
    notes: Mapping[str, str],
) -> dict[str, Any]:
    """The report of a conversion: every tensor by published name, and sums by part."""
    placed = {tensor: (file, name) for file, tensors in files.items() for name, tensor in tensors.items()}
    rows: list[dict[str, Any]] = []
    parts: dict[str, dict[str, int]] = {}
    for published in (*stored, *(name for name in notes if name not in stored)):
        part = part_of(published)
        sums = parts.setdefault(part, {"tensors": 0, "parameters": 0, "bytes": 0, "written": 0})
        row: dict[str, Any] = {"published": published, "part": part, "name": None, "file": None}
        tensor = stored.get(published)
        if tensor is not None:
            row |= {"dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.size}
            sums["tensors"] += 1
            sums["parameters"] += prod(tensor.shape)
            sums["bytes"] += tensor.size
            if tensor in placed:
                row["file"], row["name"] = placed[tensor]
                sums["written"] += tensor.size
        if published in notes and (row["file"] is None or row["file"].endswith(REST)):
            row["note"] = notes[published]
        rows.append(row)
    written = sum(sums["written"] for sums in parts.values())
    return {"source": str(source), "target": str(target), "bytes": written, "parts": parts, "tensors": rows}

"""Reads weights into one state dict from a folder, a file (sharded or not) or a hub id.

Only tensors are read: safetensors, or .bin/.pth with `weights_only`. Files are memory-mapped, so tensors that nobody uses
are not read from disk.
"""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAFE = (".safetensors",)
TORCH = (".bin", ".pth", ".pt")
# What Trainer, accelerate and DeepSpeed leave beside the weights in the folder of a checkpoint.
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler)([._-]|$)")
NESTED = ("state_dict", "model", "module")  # keys under which training code saves the state dict in a .pth


class WeightsError(ValueError):
    """Weights that cannot be found, read or fitted; the message is one line that names them and the fix."""


def read_weights(source: str | os.PathLike[str], part: str = "") -> dict[str, Tensor]:
    """Reads all tensors of `source` by name, on the CPU.

    Args:
        source: a folder as `save_pretrained` writes it, a .safetensors, .bin, .pth or .pt file, or a hub id. A path
            that exists wins over a hub id of the same name.
        part: prefix of tensor names. Where some names start with it, only those tensors are read, and the prefix is
            removed.

    Raises:
        WeightsError: `source` does not exist, cannot be reached or is torn, the folder has several weights files, or a
            pickle holds more than tensors.
    """
    path = Path(source)
    files = weight_files(path if path.exists() else _download(str(source)))
    readers: dict[str, Callable[[str], Tensor]] = {}
    for file in files:
        readers |= _readers(file)
    if not any(name.startswith(part) for name in readers):
        part = ""
    try:
        return {name.removeprefix(part): read(name) for name, read in readers.items() if name.startswith(part)}
    except Exception as error:  # safetensors and torch document no common class of errors
        raise _torn(files[0], error) from error


def found_here(source: str | os.PathLike[str]) -> bool:
    """Whether weights are on this machine: a file, a folder, or in the hub's cache. Opens no connection."""
    path = Path(source)
    if source and path.exists():
        return True
    from huggingface_hub import snapshot_download

    try:
        return bool(weight_files(Path(snapshot_download(str(source), local_files_only=True))))
    except (OSError, ValueError):  # not in the cache, incomplete, or not the form of a repository id
        return False


def mismatch(needed: Mapping[str, Any], given: Mapping[str, Any], optional: Iterable[str] = ()) -> str:
    """Says in one line which tensors differ in name or shape from the needed ones; empty if none does.

    Args:
        optional: names that may be missing.
    """
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in needed.items()
        if name in given and given[name].shape != tensor.shape
    ]
    missing, unexpected = needed.keys() - given.keys() - set(optional), given.keys() - needed.keys()
    parts = []
    for title, listed in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names := sorted(listed):
            more = f" and {len(names) - 20} more" if len(names) > 20 else ""
            parts.append(f"{len(names)} {title}: {', '.join(names[:20])}{more}")
    return "; ".join(parts)


def _download(repository: str) -> Path:
    """Downloads the weights of a hub repository and returns their folder; uses the local cache where the hub is down.

    Raises:
        WeightsError: the hub has no such repository or cannot be reached, or the repository holds no weights file.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise WeightsError(f"{repository}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        for suffixes in (SAFE, TORCH):  # many repositories hold both: download one kind only
            patterns = [f"*{suffix}{tail}" for suffix in suffixes for tail in ("", ".index.json")]
            folder = Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))
            if any(file.suffix in suffixes for file in folder.iterdir()):
                return folder
    except (OSError, ValueError) as error:  # base classes of every error of huggingface_hub
        raise WeightsError(f"{repository}: no file or folder here, and {hub_problem(error)}") from error
    raise WeightsError(f"{repository}: this hub repository holds no {', '.join(SAFE + TORCH)} file")


def hub_problem(error: BaseException) -> str:
    """Why the hub gave nothing, and the fix, in a part of one line."""
    from huggingface_hub import errors

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):  # also one that needs a login
        return "the hub has no such repository for you: check the id, or log in with `hf auth login`"
    offline = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if any(isinstance(cause, offline) for cause in causes):
        return (
            "this machine does not reach the hub and its cache holds no copy: download it where there is a connection and "
            "pass its folder, or point HF_HOME at a cache that holds it (experts of size mini need no download)"
        )
    return f"it cannot be loaded ({' '.join(str(error).split())[:160]}): pass a folder that holds it, or another hub id"


def weight_files(path: Path) -> list[Path]:
    """The weight files of a folder, safetensors before pickles; or the file itself.

    Raises:
        WeightsError: the folder holds no weights file, several without an index, or not every shard of its index.
    """
    if path.is_file():
        if path.suffix not in SAFE + TORCH:
            raise WeightsError(f"{path}: weights must be a folder or a {', '.join(SAFE + TORCH)} file")
        return [path]
    for suffixes in (SAFE, TORCH):
        indices = [file for suffix in suffixes for file in sorted(path.glob(f"*{suffix}.index.json"))]
        if indices:
            shards = [path / name for name in _shard_names(indices[0])]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise WeightsError(f"{path}: {indices[0].name} names shards that are not there: {', '.join(missing)}")
            return shards
        files = sorted(
            file for suffix in suffixes for file in path.glob(f"*{suffix}") if not _TRAINING.match(file.name)
        )
        if len(files) > 1:
            raise WeightsError(
                f"{path}: more than one weights file ({', '.join(f.name for f in files)}); pass one of them"
            )
        if files:
            return files
    raise WeightsError(f"{path}: no {', '.join(SAFE + TORCH)} file in this folder")


def _shard_names(index: Path) -> list[str]:
    """The files that an index names, each once, without folders: an index never leads out of its own."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        shards = sorted({Path(name).name for name in names})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _torn(index, error) from error
    if not shards or not all(name.endswith(SAFE + TORCH) for name in shards):
        raise _torn(index, ValueError(f"it must name {', '.join(SAFE + TORCH)} files"))
    return shards


def _readers(file: Path) -> dict[str, Callable[[str], Tensor]]:
    """Tensor names of one file, each with the function that reads a tensor by name."""
    try:
        if file.suffix in SAFE:
            from safetensors import safe_open

            handle = safe_open(file, framework="pt")
            return dict.fromkeys(handle.keys(), handle.get_tensor)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file}: torn, or a pickle that holds more than tensors, which is never read. "
            "Fix: save its state dict alone with torch.save or as safetensors"
        ) from error
    except Exception as error:
        raise _torn(file, error) from error
    for key in NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise WeightsError(f"{file}: holds a {type(state).__name__}, not a state dict")
    return {name: state.__getitem__ for name, value in state.items() if isinstance(value, Tensor)}


def _is_zip(file: Path) -> bool:
    """Whether torch wrote the file as a zip archive (since torch 1.6): only such a file can be memory-mapped."""
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _torn(file: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{file}: torn or not what its name says ({' '.join(str(error).split())[:160]}); download it again"
    )

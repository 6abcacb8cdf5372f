"""Tensors in weights files: found by reading headers only, copied from file to file in pieces.

A model of any size therefore converts in the memory that one piece takes.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mova_core.experts.weights import SAFE, TORCH, WeightsError, weight_files
from mova_core.io.safetensors_header import build_header, read_header

PIECE = 1 << 24  # bytes held at once
WINDOW = 1 << 26  # bytes of a .bin file that stay mapped

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64},
    **{"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a weights file."""

    file: Path
    name: str  # in the file
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    size: int  # bytes
    start: int  # where in the file they begin; of a .bin, how much its tensors before this one hold

    def meta(self) -> Tensor:
        """Its shape and dtype without its numbers."""
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Its bytes. Read, not mapped: pages of a mapping would count as memory until the whole file is done."""
        if self.file.suffix in TORCH:
            tensor = _mapped(self.file, self.start // WINDOW)[self.name]
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            yield from (data[at : at + PIECE] for at in range(0, self.size, PIECE))
            return
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            for at in range(0, self.size, PIECE):
                piece = opened.read(min(PIECE, self.size - at))
                if len(piece) < min(PIECE, self.size - at):
                    raise WeightsError(f"{self.file}: ends inside {self.name}; download it again")
                yield piece


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's weights by name; nothing but headers is read.

    Raises:
        WeightsError: no weights, a shard that is missing or torn, or two that hold the same name.
    """
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(Path(folder)):
        tensors = safetensors_tensors(file) if file.suffix in SAFE else _pickle_tensors(file)
        if twice := sorted(stored.keys() & tensors.keys()):
            raise WeightsError(f"{file}: holds {twice[0]}, which {stored[twice[0]].file.name} holds too")
        stored |= tensors
    return stored


def safetensors_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, from its header.

    Raises:
        WeightsError: the file is torn, no safetensors file, or holds a dtype that torch does not have.
    """
    try:
        with safe_open(file, framework="pt"):  # checks that header and file length agree
            pass
        with file.open("rb") as opened:
            header = read_header(lambda offset, size: os.pread(opened.fileno(), size, offset))
    except Exception as error:  # safetensors raises an exception type of its own besides OSError and ValueError
        raise WeightsError(
            f"{file}: torn or no safetensors ({' '.join(str(error).split())[:160]}); download it again"
        ) from error
    tensors = {}
    for name, (dtype, shape, start, size) in header.tensors.items():
        if dtype not in DTYPES:
            raise WeightsError(f"{file}: {name} is of type {dtype}; there are {', '.join(DTYPES)}")
        tensors[name] = StoredTensor(file=file, name=name, dtype=dtype, shape=shape, size=size, start=start)
    return tensors


def _load_pickle(file: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise WeightsError(
            f"{file}: torn, older than torch 1.6, or more than tensors, which is never read "
            f"({' '.join(str(error).split())[:120]}). Fix: save its state dict as safetensors"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{file}: holds more than a state dict. Fix: save its state dict alone")
    return state


@lru_cache(maxsize=1)
def _mapped(file: Path, window: int) -> Mapping[str, Tensor]:
    """A .bin file, mapped anew for every window of it, so that pages already read are let go."""
    return _load_pickle(file)


def _pickle_tensors(file: Path) -> dict[str, StoredTensor]:
    words = {dtype: word for word, dtype in DTYPES.items()}
    stored, at = {}, 0
    for name, tensor in _load_pickle(file).items():
        size = tensor.numel() * tensor.element_size()
        word, shape = words[tensor.dtype], tuple(tensor.shape)
        stored[name] = StoredTensor(file=file, name=name, dtype=word, shape=shape, size=size, start=at)
        at += size
    return stored


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor], progress: Callable[[int], Any]) -> None:
    """One safetensors file of tensors that lie in others; `progress` takes the bytes of every piece written."""
    # The widest first, so that all are aligned; else as they lie in their files, so that these are read from end to end.
    order = sorted(tensors, key=lambda name: (-DTYPES[(it := tensors[name]).dtype].itemsize, str(it.file), it.start))
    ordered = {name: tensors[name] for name in order}
    header = build_header({name: (it.dtype, it.shape, it.size) for name, it in ordered.items()}, {"format": "pt"})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as opened:
        opened.write(header)
        for stored in ordered.values():
            for piece in stored.pieces():
                opened.write(piece)
                progress(len(piece))
    _mapped.cache_clear()  # of the last .bin

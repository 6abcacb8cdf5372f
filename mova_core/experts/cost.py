"""The cost of an expert: FLOPs counted on its shapes, speed and memory per batch size measured on a device."""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mova_core.experts import expert_class
from mova_core.experts.base import ExpertCard, VisionExpert
from mova_core.io.atomic import write_atomic

__all__ = [
    "Measured",
    "Profile",
    "ProfileError",
    "count_flops",
    "device_kind",
    "expert_costs",
    "feature_bytes",
    "measure",
    "read_profiles",
    "shapes_of",
    "write_profiles",
]

VERSION = 1
GROWTH = 1.05  # a doubled batch that is not at least this much faster is not worth its memory
LARGEST = 512  # images per forward pass, at most
REPEAT_SECONDS = 0.1  # shorter passes are repeated for this long, and the fastest one counts


class ProfileError(ValueError):
    """A profile that cannot be read; the message names the file and the fix."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One batch size on one device."""

    batch: int  # images per forward pass
    images_per_second: float  # from pixels on the CPU to features on the CPU
    peak_bytes: int | None  # peak device memory of this process, weights included; None: this system does not report it


@dataclass(frozen=True, kw_only=True)
class Profile:
    """An expert measured on one kind of device, in one dtype."""

    expert: str
    arch: Mapping[str, Any]
    dtype: str
    device: str  # as `device_kind` returns it
    threads: int  # CPU threads of PyTorch
    batches: Sequence[Measured]  # by rising batch size
    accelerator: str | None = None  # Ray's accelerator-type label of the GPU; None: a CPU, or measured without Ray

    def is_of(self, card: ExpertCard, size: str, dtype: str) -> bool:
        """Whether the profile was measured on this expert at this size, computing in this dtype."""
        arch = card.mini if size == "mini" else card.full
        return (self.expert, dict(self.arch), self.dtype) == (card.name, _plain(arch), dtype)

    def fits(self, expert: VisionExpert, device: torch.device) -> bool:
        """Whether the profile was measured on an expert of this name, arch and dtype, on this kind of device."""
        measured = (self.expert, dict(self.arch), self.dtype, self.device)
        return measured == (expert.card.name, _plain(expert.arch), _dtype(expert), device_kind(device))

    def at(self, batch: int) -> Measured:
        """The measurement of this batch size: of the next larger one that was measured, else of the largest."""
        return next((measured for measured in self.batches if measured.batch >= batch), self.batches[-1])

    def best(self, memory: float | None = None) -> Measured:
        """The smallest batch within 5 % of the fastest, among those whose peak fits `memory` bytes; else the smallest."""
        fits = [run for run in self.batches if memory is None or (run.peak_bytes or 0) <= memory] or self.batches[:1]
        fastest = max(run.images_per_second for run in fits)
        return next(run for run in fits if run.images_per_second * GROWTH >= fastest)


def device_kind(device: torch.device) -> str:
    """The kind of device that a profile is valid for: the GPU's model name, or "cpu" and the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without a model name
        model = platform.processor() or platform.machine()
    return f"cpu {model}"


def example(expert: VisionExpert) -> dict[str, Tensor]:
    """A batch of one grey image, preprocessed."""
    return expert.preprocess([np.full((64, 64, 3), 127, dtype=np.uint8)])


def shapes_of(name: str, size: str) -> VisionExpert:
    """An expert on the meta device: shapes without weights, as `count_flops` needs it.

    Raises:
        ValueError: no expert has this name.
    """
    kind = expert_class(name)
    with torch.device("meta"):
        return kind(kind.card.mini if size == "mini" else kind.card.full).eval()


def count_flops(expert: VisionExpert) -> int | None:
    """Counts floating-point operations per image in matrix products and convolutions; a multiply-add is two.

    Needs shapes only: the expert's parameters are on the meta device. None where the forward pass branches on values,
    which the meta device does not have.
    """
    batch = {name: tensor.to("meta") for name, tensor in example(expert).items()}
    try:
        with FlopCounterMode(display=False) as counter, _ValuesAreTrue(), torch.no_grad():
            expert(batch)
    except RuntimeError:  # NotImplementedError too: an operation needs values
        return None
    return counter.get_total_flops()


class _ValuesAreTrue(TorchDispatchMode):
    """Answers True where a forward pass on the meta device reads a value, such as whether every patch is real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def measure(
    expert: VisionExpert, run: Callable[[int], object], device: torch.device, *, seconds: float, largest: int = LARGEST
) -> Profile:
    """Measures batches of 1, 2, 4, ... images until speed stops growing, memory runs out or the time is over.

    Args:
        run: computes features of that many images, and returns when they are on the CPU.
        device: the device of the expert, whose peak memory is read.
        seconds: approximate time to spend. A batch that would exceed it is not tried, but one image always is.
        largest: most images per forward pass.

    Raises:
        RuntimeError, MemoryError: even one image cannot be computed.
    """
    started = time.perf_counter()
    batches: list[Measured] = []
    batch, fastest, where = 1, 0.0, 1
    best: float | None
    while batch <= largest:
        with _peak(device) as peak:
            try:
                run(batch)  # warm-up: compiles kernels and allocates memory
                best = spent = _timed(run, batch)
                while spent < REPEAT_SECONDS:
                    again = _timed(run, batch)
                    best, spent = min(best, again), spent + again
            except (RuntimeError, MemoryError) as error:
                if batch == 1 or not out_of_memory(error):
                    raise
                best = None
        if best is None:
            clear_device_cache()
            break
        speed = batch / best
        batches.append(Measured(batch=batch, images_per_second=speed, peak_bytes=peak()))
        left = seconds - (time.perf_counter() - started)
        if speed >= GROWTH * fastest:
            fastest, where = speed, batch
        if (
            batch >= 4 * where or left < 4 * best
        ):  # two batches without gain (one may be chance), or no time for two passes
            break
        batch *= 2
    return Profile(
        expert=expert.card.name,
        arch=_plain(expert.arch),
        dtype=_dtype(expert),
        device=device_kind(device),
        threads=torch.get_num_threads(),
        batches=tuple(batches),
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, so that a smaller batch may succeed."""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def read_profiles(path: str | os.PathLike[str]) -> list[Profile]:
    """Reads the profiles of a file that `write_profiles` or a person wrote (docs/json.md).

    Raises:
        ProfileError: the file cannot be read or holds no profiles; the message names the profile and the key.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}; `mova profile` writes one") from None
    except ValueError as error:
        raise ProfileError(f"{path} is no JSON ({error}): `mova profile` writes the file") from None
    if not isinstance(content, dict) or not isinstance(content.get("profiles"), list) or "version" not in content:
        raise ProfileError(f"{path} is no profile: write `version` and a list of `profiles`, as docs/json.md shows")
    if content["version"] != VERSION:
        raise ProfileError(f"{path} has version {content['version']}, this is {VERSION}: run `mova profile` anew")
    return [_profile(f"{path}, profile {number}", row) for number, row in enumerate(content["profiles"], start=1)]


def _profile(where: str, row: Any) -> Profile:
    """One profile of a file. A person may write the size in place of the arch, and leave out keys that have a default."""
    row = {"dtype": "float32", "threads": 1} | _keys(
        where, row, Profile, {"size"}, {"arch", "dtype", "threads", "accelerator"}
    )
    if not isinstance(row["batches"], list) or not row["batches"]:
        raise ProfileError(f"{where}: `batches` must be a list of at least one batch")
    batches = []
    for number, batch in enumerate(row["batches"], start=1):
        place = f"{where}, batch {number}"
        measured = Measured(**{"peak_bytes": None} | _keys(place, batch, Measured, set(), {"peak_bytes"}))
        numbers = {
            "batch": measured.batch,
            "images_per_second": measured.images_per_second,
            "peak_bytes": measured.peak_bytes,
        }
        for name, value in numbers.items():
            usable = isinstance(value, int if name == "batch" else int | float) and 0 < value < math.inf
            if not usable and not (name == "peak_bytes" and value is None):
                raise ProfileError(f"{place}: `{name}` is {value!r}, but must be a number above 0")
        batches.append(measured)
    size = row.pop("size", "full")
    if "arch" not in row:
        if size not in ("full", "mini"):
            raise ProfileError(f"{where}: `size` is {size!r}, but must be full or mini")
        try:
            card = expert_class(row["expert"]).card
        except (ValueError, TypeError) as error:
            raise ProfileError(f"{where}: {error}") from None
        row["arch"] = _plain(card.mini if size == "mini" else card.full)
    return Profile(**row | {"batches": tuple(sorted(batches, key=lambda measured: measured.batch))})


def _keys(where: str, row: Any, kind: type, further: set[str], optional: set[str]) -> dict[str, Any]:
    """Checks that the keys of a JSON object are fields of a dataclass or in `further`; `optional` ones may be missing."""
    known = {field.name for field in fields(kind)}
    if not isinstance(row, dict):
        raise ProfileError(f"{where} is no object: write one with {', '.join(sorted(known))}")
    if missing := sorted(known - optional - row.keys()):
        raise ProfileError(f"{where}: `{'`, `'.join(missing)}` is missing (docs/json.md shows a profile)")
    if unknown := sorted(row.keys() - known - further):
        raise ProfileError(
            f"{where}: no such key as `{'`, `'.join(unknown)}`; there are {', '.join(sorted(known | further))}"
        )
    return dict(row)


def write_profiles(path: str | os.PathLike[str], profiles: Iterable[Profile]) -> None:
    """Writes profiles into a file; profiles of other experts, archs, dtypes and devices in the file stay.

    Raises:
        ProfileError: the file exists and holds no profiles.
        OSError: the file cannot be written.
    """
    merged = {_key(profile): profile for profile in (read_profiles(path) if Path(path).exists() else ())}
    merged |= {_key(profile): profile for profile in profiles}
    rows = [asdict(profile) for _, profile in sorted(merged.items())]
    write_atomic(path, json.dumps({"version": VERSION, "profiles": rows}, indent=1))


def _key(profile: Profile) -> tuple[str, ...]:
    return profile.expert, json.dumps(profile.arch, sort_keys=True), profile.dtype, profile.device


def _plain(arch: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(arch))


def _dtype(expert: VisionExpert) -> str:
    return str(next(expert.parameters()).dtype).removeprefix("torch.")


def _timed(run: Callable[[int], object], batch: int) -> float:
    started = time.perf_counter()
    run(batch)
    return time.perf_counter() - started


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that returns, after the body, the peak memory in bytes that this process took of the device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_reserved(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of resident memory, VmHWM
    except OSError:
        yield lambda: None
        return
    yield _resident_peak


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def expert_costs(
    experts: Sequence[str],
    size: str,
    dtypes: Mapping[str, str],
    stated: Mapping[str, float] | None = None,
    profile: str | Path | None = None,
) -> dict[str, float]:
    """Expert -> cost of one image, for a budget: as stated, else measured on this CPU in ms, else counted in GFLOPs.

    Args:
        experts: the experts to price.
        size: their size, "full" or "mini".
        dtypes: expert -> dtype it computes in; float32 by default.
        stated: expert -> cost in a unit of the caller's own; each expert must have one.
        profile: file of `write_profiles`, whose speed at batch size 1 is used.

    Raises:
        ValueError: an expert has no cost, or both `stated` and `profile` are given; the message names the fix.
    """
    if stated:
        if profile is not None:
            raise ValueError("--cost and --profile have different units: give one of them")
        costs, fix = dict(stated), "give a --cost for each expert, or none for GFLOPs"
    elif profile is not None:
        device = device_kind(torch.device("cpu"))
        costs = {
            row.expert: 1000 / row.at(1).images_per_second
            for row in read_profiles(profile)
            if row.device == device
            and row.expert in experts
            and row.is_of(expert_class(row.expert).card, size, dtypes.get(row.expert, "float32"))
        }
        fix = f"{profile} has none on {device} at size {size}: run `mova profile` here"
    else:
        counted = {name: count_flops(shapes_of(name, size)) for name in experts}
        costs = {name: flops / 1e9 for name, flops in counted.items() if flops is not None}
        fix = "the FLOPs cannot be counted: give a --cost for each expert"
    if unpriced := [name for name in experts if name not in costs]:
        raise ValueError(f"--budget: no cost of {', '.join(unpriced)}; {fix}")
    return costs


def feature_bytes(name: str, size: str, dtype: str) -> int:
    """Bytes of one image's features of an expert, stored in `dtype`."""
    height, width = (expert := shapes_of(name, size)).grid
    return height * width * expert.channels * getattr(torch, dtype).itemsize

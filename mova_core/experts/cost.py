"""What an expert costs: FLOPs counted on its shapes, and speed and memory per batch size as measured on a device."""

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
GROWTH = 1.05  # a doubled batch that brings less than this is not worth its memory
LARGEST = 512  # pictures per forward pass, never more
REPEAT_SECONDS = 0.1  # passes shorter than this are repeated and the fastest counts


class ProfileError(ValueError):
    """A profile that cannot be read; the message names the file and the fix."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One batch size on one device."""

    batch: int  # pictures per forward pass
    images_per_second: float  # from pixels on the CPU to features on the CPU
    peak_bytes: int | None  # most memory of the device this process took, weights included; None: cannot be told here


@dataclass(frozen=True, kw_only=True)
class Profile:
    """An expert measured on one kind of device, in one dtype."""

    expert: str
    arch: Mapping[str, Any]
    dtype: str
    device: str  # its kind, see `device_kind`
    threads: int  # of the CPU, that PyTorch used
    batches: Sequence[Measured]  # by batch size, rising

    def is_of(self, card: ExpertCard, size: str, dtype: str) -> bool:
        """Whether it was measured on this expert at this size, computing in this dtype."""
        arch = card.mini if size == "mini" else card.full
        return (self.expert, dict(self.arch), self.dtype) == (card.name, _plain(arch), dtype)

    def fits(self, expert: VisionExpert, device: torch.device) -> bool:
        """Whether it was measured on such an expert on such a device."""
        measured = (self.expert, dict(self.arch), self.dtype, self.device)
        return measured == (expert.card.name, _plain(expert.arch), _dtype(expert), device_kind(device))

    def at(self, batch: int) -> Measured:
        """What is known of a batch: of the next larger one measured, else of the largest."""
        return next((one for one in self.batches if one.batch >= batch), self.batches[-1])

    def best(self, memory: float | None = None) -> Measured:
        """The smallest batch that is nearly as fast as any whose peak stays within `memory` bytes."""
        within = [one for one in self.batches if memory is None or (one.peak_bytes or 0) <= memory] or self.batches[:1]
        fastest = max(one.images_per_second for one in within)
        return next(one for one in within if one.images_per_second * GROWTH >= fastest)


def device_kind(device: torch.device) -> str:
    """What a profile is good for: the accelerator's model name, or "cpu" and the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that tells no name
        model = platform.processor() or platform.machine()
    return f"cpu {model}"


def example(expert: VisionExpert) -> dict[str, Tensor]:
    """A batch of one grey picture, as `preprocess` gives it."""
    return expert.preprocess([np.full((64, 64, 3), 127, dtype=np.uint8)])


def shapes_of(name: str, size: str) -> VisionExpert:
    """An expert of the pool on the meta device: its shapes without weights, as `count_flops` takes it.

    Raises:
        ValueError: no such expert.
    """
    kind = expert_class(name)
    with torch.device("meta"):
        return kind(kind.card.mini if size == "mini" else kind.card.full).eval()


def count_flops(expert: VisionExpert) -> int | None:
    """Floating-point operations per picture, a multiply-add as two, of the matrix products and convolutions.

    Works on shapes alone, on an expert whose parameters are on the meta device. None where the forward pass decides by
    its numbers in a way that shapes do not tell.
    """
    batch = {name: tensor.to("meta") for name, tensor in example(expert).items()}
    try:
        with FlopCounterMode(display=False) as counter, _Decided(), torch.no_grad():
            expert(batch)
    except RuntimeError:  # NotImplementedError too: there are no numbers on the meta device
        return None
    return counter.get_total_flops()


class _Decided(TorchDispatchMode):
    """Answers yes where a forward pass on the meta device asks its numbers, such as whether every patch is real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


def measure(
    expert: VisionExpert, run: Callable[[int], object], device: torch.device, *, seconds: float, largest: int = LARGEST
) -> Profile:
    """Doubles the batch from 1 on until speed stops growing, memory runs out or the time is up.

    Args:
        run: computes that many pictures, and returns when their features are there.
        seconds: time to spend, about; a batch size that would take longer is not tried, but one picture always is.
        largest: most pictures per forward pass.

    Raises:
        RuntimeError: even one picture cannot be computed.
    """
    started = time.perf_counter()
    batches: list[Measured] = []
    batch, fastest, where = 1, 0.0, 1
    best: float | None
    while batch <= largest:
        with _peak(device) as peak:
            try:
                run(batch)  # compiles and allocates
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
        if batch >= 4 * where or left < 4 * best:  # twice no gain, once may be chance; two passes of twice as long
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
    """Whether a smaller batch may do."""
    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def read_profiles(path: str | os.PathLike[str]) -> list[Profile]:
    """The profiles of a file that `write_profiles` wrote, or a person (docs/json.md).

    Raises:
        ProfileError: no such file, or not one of profiles; the message names the profile and the key.
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
    """One profile of a file. A person may name the size instead of the arch, and leave out what has a usual value."""
    row = {"dtype": "float32", "threads": 1} | _keys(where, row, Profile, {"size"}, {"arch", "dtype", "threads"})
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
    """A JSON object whose keys are the fields of a dataclass, and `further` ones; those of `optional` may be missing."""
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
    """Puts profiles into a file, beside those of other experts, dtypes and devices that are there."""
    path = Path(path)
    known = {_key(one): one for one in (read_profiles(path) if path.exists() else ())}
    known |= {_key(one): one for one in profiles}
    rows = [asdict(one) for _, one in sorted(known.items())]
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
    """Gives what tells, after the body, the most memory in bytes that this process took of the device within it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_reserved(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: begins the high-water mark anew
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
    """Expert -> cost of one picture, for a budget: as stated, else measured on this CPU in ms, else counted in GFLOPs.

    Args:
        experts: the experts to price.
        size: their size, "full" or "mini".
        dtypes: expert -> dtype it computes in; float32 by default.
        stated: expert -> cost in a unit of the caller's own; each expert must have one.
        profile: file of `write_profiles`; the throughput at batch size 1 counts.

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
    """Bytes of one picture's features of an expert, stored in `dtype`."""
    height, width = (expert := shapes_of(name, size)).grid
    return height * width * expert.channels * getattr(torch, dtype).itemsize

"""ExpertServer: one vision expert on one slice of a device, as a plain class.

Ray Data runs it as the callable of an actor pool (`__call__`: features go into the store, a line per shard goes on); under
`ray.remote` with several threads, or as a Serve deployment, callers ask for `features` side by side. Neither needs a
line of it changed, because it does its own batching: pictures of all callers wait in one queue, one thread gathers them
into batches and prepares their pixels while another computes the batch before.
"""

import importlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from actors.ray_metrics import RayTelemetry
from mova_core.experts import Features, fingerprint, load_expert
from mova_core.experts.cost import Profile, example, measure, out_of_memory
from mova_core.features import FeatureStore
from mova_core.images import ImageError, ImageRef, ImageUnavailable
from mova_core.telemetry import Telemetry

logger = logging.getLogger(__name__)

_FAILED = pa.struct({"image": pa.string(), "key": pa.string(), "reason": pa.string()})
DONE = pa.schema({"shard": pa.string(), "stored": pa.int64(), "bytes": pa.int64(), "failed": pa.list_(_FAILED)})
FAULTS = 4  # pictures in a row that fail each by itself: then it is not the pictures


class ServerBusy(RuntimeError):
    """The queue is full; ask again later, or another server."""


class ServerError(RuntimeError):
    """The expert itself fails, or the server was closed; it answers nothing any more and must be started again."""


@dataclass(kw_only=True, eq=False)
class _Asked:
    """A picture that somebody waits for."""

    image: ImageRef
    answer: "Future[Features | ImageError]" = field(default_factory=Future)
    at: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        return self.image.path or f"picture {self.image.key[:12]}"


class ExpertServer:
    """Serves the features of one expert. It is warm, and its batch size settled, when the constructor returns.

    Args:
        expert: name in the registry.
        weights, size: as `load_expert` takes them.
        device: torch device; default the GPU this process was given, else the CPU.
        dtype: name of the dtype the expert computes in, e.g. "bfloat16".
        stored: name of the dtype the store keeps, e.g. "int8"; default that.
        batch_size: most pictures per forward pass; default that of the profile measured on such a device, else it is
            measured at the start.
        wait_ms: longest time, milliseconds, that a picture waits for others to fill its batch.
        queue: most pictures that wait; more are refused with `ServerBusy`.
        profiles: as `mova profile` measures them.
        memory_share: part of the GPU's memory it may take, 0 to 1: several servers on one GPU leave each other theirs.
        measure_seconds: time to spend where the batch size must be measured, about.
        fixed_shapes: run only batch sizes that were warmed up, padding to the next; default on an accelerator, where
            the first pass of a new shape compiles and tunes.
        module: imported first; the one that registers the expert, where it is not one of the published eight.
        store: the feature store that `__call__` writes to.
        watch: takes what `load` tells, about once a second while `__call__` works.
        telemetry: takes the server's numbers; default Ray's metrics.

    Raises:
        ValueError: unknown expert or size, or no room in a batch or the queue.
        WeightsError: as `load_expert`.
        ServerError: the expert cannot compute even one picture on this device.
    """

    def __init__(
        self,
        expert: str,
        *,
        weights: str | None = None,
        size: str = "full",
        device: str | None = None,
        dtype: str = "float32",
        stored: str | None = None,
        batch_size: int | None = None,
        wait_ms: float = 10.0,
        queue: int = 256,
        profiles: Sequence[Profile] = (),
        memory_share: float = 1.0,
        measure_seconds: float = 10.0,
        fixed_shapes: bool | None = None,
        module: str | None = None,
        store: str | None = None,
        watch: Callable[[dict[str, Any]], None] | None = None,
        telemetry: Telemetry | None = None,
    ):
        if queue < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(f"batch_size {batch_size} and queue {queue} must be at least 1")
        if module is not None:
            importlib.import_module(module)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = getattr(torch, dtype)
        on_accelerator = self.device.type != "cpu"
        if self.device.type == "cuda" and memory_share < 1:
            torch.cuda.set_per_process_memory_fraction(memory_share, self.device)
        self.expert = load_expert(expert, weights=weights, size=size, device=str(self.device), dtype=self.dtype)
        self.name = expert
        self.description = self.expert.describe(None if stored is None else getattr(torch, stored))
        self.fingerprint = fingerprint(self.description)
        self.store = FeatureStore(store) if store is not None else None
        self.wait, self.queue = wait_ms / 1000, queue
        self.fixed_shapes = on_accelerator if fixed_shapes is None else fixed_shapes
        self.shapes: tuple[int, ...] = ()  # batch sizes whose first pass is behind us
        self.profile: Profile | None = next((one for one in profiles if one.fits(self.expert, self.device)), None)
        self._telemetry: Telemetry = RayTelemetry() if telemetry is None else telemetry
        self._load: dict[str, Any] = {
            "server": uuid.uuid4().hex,
            "computed": 0,
            "stored": 0,
            "busy": 0.0,
            "prepare": 0.0,
            "splits": 0,
        }
        self._watch, self._watched = watch, 0.0
        self._feeding = threading.Lock()
        self._example = example(self.expert)
        self._warm_up(batch_size, memory_share, measure_seconds)

        self._faults = 0
        self._broken: ServerError | None = None
        self._closed = False
        self._waiting: deque[_Asked] = deque()
        self._unanswered: set[_Asked] = set()  # those, and those in the batches under way
        self._changed = threading.Condition()  # of the five above
        self._decoding = 4 if on_accelerator else 1  # threads
        self._decoders = ThreadPoolExecutor(self._decoding, thread_name_prefix=f"{expert}-decode")
        # One batch being gathered, one here, one on the device: what bounds the memory that pixels take.
        self._ready: Queue[tuple[list[_Asked], dict[str, Tensor]] | None] = Queue(maxsize=1)
        self._threads = [
            threading.Thread(target=work, name=f"{expert}-{work.__name__}", daemon=True)
            for work in (self._gather, self._compute)
        ]
        for thread in self._threads:
            thread.start()

    def identity(self) -> dict[str, Any]:
        """The `fingerprint` of what is served and the `description` it covers."""
        return {"fingerprint": self.fingerprint, "description": self.description}

    def check_health(self) -> dict[str, Any]:
        """Its settings and load, as soon as it is ready; Serve asks by this name.

        Raises:
            ServerError: it answers nothing any more.
        """
        if self._broken is not None:
            raise ServerError(*self._broken.args)
        return {
            "expert": self.name,
            "device": str(self.device),
            "batch_size": self.batch_size,
            "warm": list(self.shapes),
            "waiting": len(self._waiting),
        }

    def features(self, images: Sequence[ImageRef]) -> list[Features | ImageError]:
        """Features of each picture, tokens (H*W, C) on the CPU; of one that cannot be used its error instead.

        Any number of threads may ask at once; their pictures are computed together.

        Raises:
            ServerBusy: the queue has no room for them.
            ServerError: the expert itself fails.
        """
        return [asked.answer.result() for asked in self._ask(images)]

    def __call__(self, shards: pa.Table) -> Iterator[pa.Table]:
        """Computes and stores whole shards. Two threads may call at once: one's pictures are computed while the other writes.

        Args:
            shards: one row per shard with its `shard` id, and the `keys` (sha256, 32 bytes) and `images` of its pictures.

        Yields:
            One row per shard: how many features and bytes it has in the store, and the `failed` images, each with a reason.
        """
        if self.store is None:
            raise ValueError(f"ExpertServer({self.name!r}) was given no store to write to")
        partition = self.store.partition(self.name, self.fingerprint)
        for shard in shards.to_pylist():
            images = [
                ImageRef(path=path, key=key.hex()) for path, key in zip(shard["images"], shard["keys"], strict=True)
            ]
            done: dict[str, Any] = {"shard": shard["shard"], "stored": 0, "bytes": 0, "failed": []}
            with self._feeding:  # shard after shard, so that one is whole while the next is computed
                there = partition.committed(shard["shard"])  # by this actor before it died, or by another run
                asked = [] if there else self._ask(images, patient=True)
            if there:
                yield pa.Table.from_pylist([done], schema=DONE)
                continue
            computed: dict[str, Features] = {}
            bad: list[dict[str, Any]] = []
            for one in asked:
                image, result = one.image, one.answer.result()
                if isinstance(result, ImageError):
                    reason = str(result)
                    done["failed"].append({"image": image.path, "key": image.key, "reason": reason})
                    if not isinstance(result, ImageUnavailable):  # what is away may come back
                        bad.append({"image": image.path, "sha256": image.key, "reason": reason, "expert": self.name})
                else:
                    computed[image.key] = result
                self._tell_watch()
            rows = partition.write(shard["shard"], computed)
            done["stored"], done["bytes"] = len(computed), sum(row["length"] for row in rows)
            self._load["stored"] += len(computed)
            self.store.quarantine(bad)
            self._tell_watch(every=0.0)
            yield pa.Table.from_pylist([done], schema=DONE)

    def load(self) -> dict[str, Any]:
        """What it did since its start: pictures `computed`, features `stored`, `splits` by out-of-memory, and seconds `busy`
        on its device and spent to `prepare` pixels (of all threads); and `waiting`, pictures in its queue now."""
        return self._load | {"waiting": len(self._waiting)}

    def _tell_watch(self, every: float = 1.0) -> None:
        if self._watch is not None and time.monotonic() - self._watched >= every:
            self._watched = time.monotonic()
            self._watch(self.load())

    def close(self) -> None:
        """Ends its threads; pictures that still wait get a `ServerError`."""
        with self._changed:
            self._closed = True
        self._break(ServerError(f"the server of {self.name} was closed"))
        for thread in self._threads:
            thread.join()
        self._decoders.shutdown()

    def _warm_up(self, batch_size: int | None, memory_share: float, seconds: float) -> None:
        """Settles the batch size and makes the first pass of each shape."""
        try:
            if batch_size is None and self.profile is not None:
                total = (
                    torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None
                )
                batch_size = self.profile.best(total and total * memory_share).batch
            if batch_size is None:
                self.profile = measure(self.expert, self._pass, self.device, seconds=seconds)
                self.batch_size = self.profile.best().batch
                self.shapes = tuple(one.batch for one in self.profile.batches if one.batch <= self.batch_size)
                return
            powers = (2**power for power in range(batch_size.bit_length()))
            self.batch_size = 1
            for shape in sorted({*powers, batch_size} if self.fixed_shapes else {1}):
                self._pass(shape)
                self.shapes = (*self.shapes, shape)
            self.batch_size = batch_size
        except (RuntimeError, MemoryError) as error:
            if not self.shapes or not out_of_memory(error):
                reason = " ".join(str(error).split())[:300]
                raise ServerError(f"{self.name} cannot compute on {self.device}: {reason}") from error
            self.batch_size = self.shapes[-1]
            clear_device_cache()

    def _pass(self, batch: int) -> None:
        self._forward({name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in self._example.items()})

    def _ask(self, images: Sequence[ImageRef], patient: bool = False) -> list[_Asked]:
        """Puts pictures into the queue; where it is full it refuses all of them, or waits if `patient`."""
        everything = [_Asked(image=image) for image in images]
        with self._changed:
            if not patient and len(self._waiting) + len(everything) > self.queue:
                self._tell("refused_total", len(everything))
                raise ServerBusy(
                    f"the server of {self.name} has {len(self._waiting)} pictures waiting and room for {self.queue}, "
                    f"so it takes no {len(everything)} more: ask again later, for fewer at once, or start more servers"
                )
            for asked in everything:
                self._changed.wait_for(lambda: len(self._waiting) < self.queue or self._broken is not None)
                if self._broken is not None:
                    raise ServerError(*self._broken.args)
                asked.at = time.monotonic()
                self._waiting.append(asked)
                self._unanswered.add(asked)
                self._changed.notify_all()
            self._tell("queue_depth", len(self._waiting))
        return everything

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """A thread that dies would leave its callers waiting for ever."""
        try:
            yield
        except Exception as error:
            logger.exception("the server of %s failed", self.name)
            self._break(ServerError(f"the server of {self.name} failed ({type(error).__name__}: {error})"))

    def _gather(self) -> None:
        """Batches out of what waits: full, or as large as they got when the first picture has waited long enough."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    break
                until = self._waiting[0].at + self.wait
                self._changed.wait_for(
                    lambda: len(self._waiting) >= min(self.batch_size, self.queue) or self._closed,
                    max(0.0, until - time.monotonic()),
                )
                group = [self._waiting.popleft() for _ in range(min(self.batch_size, len(self._waiting)))]
                self._changed.notify_all()
                self._tell("queue_depth", len(self._waiting))
            with self._surviving():
                if (prepared := self._prepare(group)) is not None:
                    self._ready.put(prepared)
        self._ready.put(None)

    def _prepare(self, group: Sequence[_Asked]) -> tuple[list[_Asked], dict[str, Tensor]] | None:
        share = -(-len(group) // self._decoding)
        parts = [group[at : at + share] for at in range(0, len(group), share)]
        made = [one for part in self._decoders.map(self._pixels, parts) for one in part]
        if not made:
            return None
        batch = made[0][1]
        if len(made) > 1:
            batch = {name: torch.cat([pixels[name] for _, pixels in made]) for name in batch}
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return [asked for part, _ in made for asked in part], batch

    def _pixels(self, part: Sequence[_Asked]) -> list[tuple[Sequence[_Asked], dict[str, Tensor]]]:
        """Pictures with their pixels: all in one where they are good, else one by one; those that are not get their error."""
        started = time.monotonic()
        try:
            pixels = self.expert.preprocess([asked.image for asked in part])
        except Exception as error:
            failure = error
        else:
            return [(part, pixels)]
        finally:
            self._load["prepare"] += time.monotonic() - started
        if len(part) > 1:
            return [one for asked in part for one in self._pixels([asked])]
        if not isinstance(failure, ImageError):
            failure = ImageError(f"{part[0]}: {self.name} cannot prepare it ({type(failure).__name__}: {failure})")
        self._give(part[0], failure)
        return []

    def _compute(self) -> None:
        while (work := self._ready.get()) is not None:
            with self._surviving():
                self._answer(*work)

    def _answer(self, group: list[_Asked], batch: Mapping[str, Tensor]) -> None:
        """Computes a batch and answers it; in parts where that is what it takes."""
        if self._broken is not None:
            return
        if len(group) > self.batch_size:  # gathered before the memory ran out
            self._in_parts(group, batch, self.batch_size)
            return
        started = time.monotonic()
        try:
            rows = self._forward(batch)
        except Exception as error:
            failure = error.with_traceback(None)  # its frames hold the memory that the parts will need
        else:
            self._tell("batch_size", len(group))
            self._tell("images_per_second", len(group) / (time.monotonic() - started))
            self._load["computed"] += len(group)
            self._load["busy"] += time.monotonic() - started
            for asked, row in zip(group, rows, strict=True):
                if row is None:
                    self._fail(asked, f"its features are not finite in {self.description['dtype']}")
                else:
                    self._faults = 0
                    self._give(asked, row)
            return
        if isinstance(failure, torch.AcceleratorError):  # nothing runs in this process's context any more
            self._break(ServerError(f"{self.name} lost {self.device}: {failure}"))
            return
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        if out_of_memory(failure):
            clear_device_cache()
            reason = f"does not fit the memory of {self.device} even alone ({reason})"
            if len(group) > 1:
                smaller = len(group) // 2  # for all that come, too
                self.batch_size = max(s for s in self.shapes if s <= smaller) if self.fixed_shapes else smaller
                self._tell("splits_total", 1)
                self._load["splits"] += 1
        if len(group) > 1:
            self._in_parts(group, batch, self.batch_size if out_of_memory(failure) else 1)
        else:
            self._fail(group[0], reason)

    def _in_parts(self, group: list[_Asked], batch: Mapping[str, Tensor], size: int) -> None:
        for at in range(0, len(group), size):
            self._answer(group[at : at + size], {name: tensor[at : at + size] for name, tensor in batch.items()})

    @torch.no_grad()  # not inference_mode: who trains an adapter on these tensors saves them for its backward pass
    def _forward(self, batch: Mapping[str, Tensor]) -> list[Features | None]:
        """Features of each row of a batch; None for one that came out infinite or not a number."""
        count = len(next(iter(batch.values())))
        if self.fixed_shapes:
            padding = next((shape for shape in self.shapes if shape >= count), count) - count
            batch = {
                name: torch.cat((rows, rows[-1:].expand(padding, *rows.shape[1:]))) for name, rows in batch.items()
            }
        on_device = {name: rows.to(self.device, self.dtype, non_blocking=True) for name, rows in batch.items()}
        tokens_BNC, grid = self.expert(on_device)
        tokens_BNC = tokens_BNC[:count]
        finite_B = tokens_BNC.isfinite().flatten(1).all(1).tolist()
        # Cloned, so that a picture's features do not carry along the whole batch, other callers' pictures in it.
        return [
            Features(row_NC.clone(), grid) if finite else None
            for row_NC, finite in zip(tokens_BNC.cpu(), finite_B, strict=True)
        ]

    def _give(self, asked: _Asked, result: Features | ImageError) -> None:
        self._tell("latency_seconds", time.monotonic() - asked.at)
        self._tell("errors_total" if isinstance(result, ImageError) else "images_total", 1)
        with self._changed:
            if asked in self._unanswered:  # not told meanwhile that the server is broken
                self._unanswered.remove(asked)
                asked.answer.set_result(result)

    def _fail(self, asked: _Asked, reason: str) -> None:
        """A picture that failed by itself gets its error, unless that happens to one after the other."""
        self._faults += 1
        if self._faults < FAULTS:
            self._give(asked, ImageError(f"{asked}: {self.name}: {reason}"))
        else:
            self._break(ServerError(f"{self.name} failed on {FAULTS} pictures in a row, the last: {asked}: {reason}"))

    def _break(self, error: ServerError) -> None:
        """From now on everything asked, under way or new, is answered with the first such error."""
        with self._changed:
            self._broken = self._broken or error
            self._waiting.clear()
            while self._unanswered:
                self._unanswered.pop().answer.set_exception(self._broken)
            self._changed.notify_all()

    def _tell(self, name: str, value: float) -> None:
        self._telemetry.observe(f"mova_expert_{name}", value, expert=self.name)

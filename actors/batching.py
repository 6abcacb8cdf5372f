"""MicroBatcher: images of many callers, computed together in batches by one model on one device.

Images wait in one queue. A thread gathers them into batches and has their pixels prepared while another thread computes
the batch before. A batch that does not fit the device's memory is computed in parts, and later batches are smaller.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from queue import Queue

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from mova_core.experts import Features
from mova_core.experts.cost import out_of_memory
from mova_core.images import ImageError, ImageRef

logger = logging.getLogger(__name__)

FAULTS = 4  # images that fail alone, one after the other, before the model is tried on an image known to work
UNPROVEN = 32  # images that fail alone before any was computed: the model is at fault, not the images
STAGE_SECONDS = 300.0  # longest time, at least, that one forward pass or the preparation of one batch may take, ...
IMAGE_SECONDS = 60.0  # ... and for each image to be prepared so much more: it may have to be fetched
PASSES = 50  # a forward pass may take so many times as long as the warm-up's

Batch = Mapping[str, Tensor]  # the model's inputs, one row per image


class ServerBusy(RuntimeError):
    """The queue is full; ask again later, or another server."""


class ServerError(RuntimeError):
    """The model itself fails, or the server was closed; it answers nothing any more and must be started again."""

    actor: tuple[str, str] | None = None  # (name, namespace) of the server's actor, where Serve runs it


class DeviceLost(ServerError):
    """The device's context is gone, often by one image: only a new process can compute on the device again."""


class State(Enum):
    """What a batcher does with an image that is submitted."""

    SERVING = auto()  # computes it
    BROKEN = auto()  # refuses it: the model or the device failed
    CLOSED = auto()  # refuses it: `close` was called


@dataclass(kw_only=True, eq=False)
class PendingImage:
    """An image that a caller waits for."""

    image: ImageRef
    result: "Future[Features | ImageError]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)  # seconds

    def __str__(self) -> str:
        return self.image.path or f"image {self.image.key[:12]}"


class MicroBatcher:
    """Answers each submitted image with its features or its error. Any number of threads may submit.

    It runs one gathering thread, one computing thread and `prepare_threads` preparing threads, until `close`. Three batches
    exist at most: one being gathered, one waiting for the device, one on the device.

    Args:
        name: of the model, in errors and thread names.
        prepare: images -> batch on the CPU; several threads call it. Its exceptions become the image's error.
        compute: batch -> for each row its features, or the reason why they cannot be used; one thread calls it.
        device: torch device that `compute` runs on.
        batch_size: most images per forward pass.
        wait: longest time, seconds, that an image waits for others to fill its batch.
        queue: most images that wait; more are refused.
        sizes: batch sizes to fall back to when memory runs out; None: any.
        prepare_threads: threads that prepare the pixels of one batch.
        example: a batch of one image that the model has computed; None: there is none.
        pass_seconds: that the model's longest pass took so far.
        observe: takes (metric name, value).
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[[Sequence[ImageRef]], dict[str, Tensor]],
        compute: Callable[[Batch], list[Features | str]],
        *,
        device: torch.device,
        batch_size: int,
        wait: float,
        queue: int,
        sizes: Sequence[int] | None,
        prepare_threads: int,
        observe: Callable[[str, float], None],
        example: Batch | None = None,
        pass_seconds: float = 0.0,
    ):
        self.name, self.device = name, device
        self.batch_size, self.wait, self.queue, self.sizes = batch_size, wait, queue, sizes
        self._prepare_images, self._compute_batch, self._observe = prepare, compute, observe
        self._changed = threading.Condition()  # guards the next four
        self._state = State.SERVING
        self._failure = ServerError()  # what later images are refused with, where the state is not SERVING
        self._waiting: deque[PendingImage] = deque()
        self._unanswered: set[PendingImage] = set()  # the waiting ones, and those in the batches under way
        self._faults = 0  # images that failed alone since one was computed; of the computing thread
        self._proven = False  # whether any image was computed; `_example` is one of them, then
        self._example = example
        self._pass_seconds = max(STAGE_SECONDS, PASSES * pass_seconds)
        self._deadlines: dict[int, float] = {}  # thread -> when its stage must have ended; seconds, monotonic
        self._counting = threading.Lock()  # guards the counters: several threads prepare
        self._counters = {"computed": 0, "splits": 0, "busy": 0.0, "prepare": 0.0}
        self._prepare_threads = prepare_threads
        self._preparing = ThreadPoolExecutor(prepare_threads, thread_name_prefix=f"{name}-prepare")
        self._prepared: Queue[tuple[list[PendingImage], Batch] | None] = Queue(maxsize=1)  # bounds the memory of pixels
        self._threads = [
            threading.Thread(target=work, name=f"{name}-{work.__name__.strip('_')}", daemon=True)
            for work in (self._gather, self._compute)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def state(self) -> State:
        return self._state

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._waiting)

    def load(self) -> dict[str, float]:
        """Counters since the start; see `ExpertServer.load`."""
        with self._counting:
            return self._counters | {"waiting": len(self._waiting)}

    def check(self) -> None:
        """Raises ServerError if the batcher is broken or closed, or a stage has taken longer than it may."""
        if self._state is not State.SERVING:
            raise type(self._failure)(*self._failure.args)
        if late := self.overdue():
            raise ServerError(f"{self.name} {late}")

    def overdue(self) -> str | None:
        """What takes longer than it may, in words; no thread can be stopped, so only a new process helps."""
        late = time.monotonic() - min(list(self._deadlines.values()), default=math.inf)
        return f"hangs: a batch is {late:,.0f} s over its time limit" if late > 0 else None

    @contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        """Sets the deadline of the stage that this thread works on."""
        thread = threading.get_ident()
        self._deadlines[thread] = time.monotonic() + seconds
        try:
            yield
        finally:
            del self._deadlines[thread]

    def submit(self, images: Sequence[ImageRef], wait_for_room: bool = False) -> list[PendingImage]:
        """Puts images into the queue.

        Args:
            images: as many as the queue holds, or any number with `wait_for_room`.
            wait_for_room: whether to wait while the queue is full, instead of refusing all images.

        Raises:
            ServerBusy: the queue has no room for them.
            ServerError: the batcher is broken or closed.
        """
        pending = [PendingImage(image=image) for image in images]
        with self._changed:
            if not wait_for_room and len(self._waiting) + len(pending) > self.queue:
                self._observe("refused_total", len(pending))
                raise ServerBusy(
                    f"the server of {self.name} has {len(self._waiting)} pictures waiting and room for {self.queue}, "
                    f"so it takes no {len(pending)} more: ask again later, for fewer at once, or start more servers"
                )
            for image in pending:
                self._changed.wait_for(lambda: len(self._waiting) < self.queue or self._state is not State.SERVING)
                self.check()
                image.arrived = time.monotonic()
                self._waiting.append(image)
                self._unanswered.add(image)
                self._changed.notify_all()
            self._observe("queue_depth", len(self._waiting))
        return pending

    def close(self) -> None:
        """Ends the threads; images that still wait get a `ServerError`. Waits for the forward pass under way."""
        self._stop(State.CLOSED, ServerError(f"the server of {self.name} was closed"))
        for thread in self._threads:
            thread.join()
        self._preparing.shutdown()

    def _stop(self, state: State, failure: ServerError) -> None:
        """Leaves SERVING: all images, under way or new, are answered with the first failure."""
        with self._changed:
            if self._state is State.SERVING:
                self._failure = failure
            if self._state is not State.CLOSED:
                self._state = state
            self._waiting.clear()
            while self._unanswered:
                self._unanswered.pop().result.set_exception(self._failure)
            self._changed.notify_all()

    @contextmanager
    def _breaking_on_error(self) -> Iterator[None]:
        """Breaks the batcher where its own code fails: a thread that just died would leave callers waiting for ever."""
        try:
            yield
        except Exception as error:
            logger.exception("the server of %s failed", self.name)
            reason = f"the server of {self.name} failed ({type(error).__name__}: {error})"
            self._stop(State.BROKEN, ServerError(reason))

    # Gathering thread

    def _gather(self) -> None:
        while (group := self._next_group()) is not None:
            with self._breaking_on_error():
                if group and (batch := self._prepare(group)) is not None:
                    self._prepared.put(batch)
        self._prepared.put(None)

    def _next_group(self) -> list[PendingImage] | None:
        """A full batch, or what has come until the first image has waited long enough; None: closed.

        The group is empty where the batcher broke meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._state is State.CLOSED)
            if self._state is State.CLOSED:
                return None
            deadline = self._waiting[0].arrived + self.wait
            self._changed.wait_for(
                lambda: len(self._waiting) >= min(self.batch_size, self.queue) or self._state is not State.SERVING,
                max(0.0, deadline - time.monotonic()),
            )
            group = [self._waiting.popleft() for _ in range(min(self.batch_size, len(self._waiting)))]
            self._changed.notify_all()
            self._observe("queue_depth", len(self._waiting))
        return group

    def _prepare(self, group: Sequence[PendingImage]) -> tuple[list[PendingImage], Batch] | None:
        """The images whose pixels could be prepared, as one batch; None if there are none."""
        share = -(-len(group) // self._prepare_threads)
        parts = [group[start : start + share] for start in range(0, len(group), share)]
        # A single part stays in this thread: handing it over costs two switches of threads.
        several = self._preparing.map(self._prepare_part, parts) if len(parts) > 1 else [self._prepare_part(group)]
        prepared = [part for parts in several for part in parts]
        if not prepared:
            return None
        batch = prepared[0][1]
        if len(prepared) > 1:
            batch = {name: torch.cat([pixels[name] for _, pixels in prepared]) for name in batch}
        if self.device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return [image for images, _ in prepared for image in images], batch

    def _prepare_part(self, part: Sequence[PendingImage]) -> list[tuple[Sequence[PendingImage], Batch]]:
        """The part with its pixels; if one image fails, each image by itself, and its error goes to its caller."""
        started = time.monotonic()
        try:
            with self._limited(STAGE_SECONDS + IMAGE_SECONDS * len(part)):
                return [(part, self._prepare_images([pending.image for pending in part]))]
        except Exception as error:
            failure = error
        finally:
            self._add("prepare", time.monotonic() - started)
        if len(part) > 1:
            return [prepared for pending in part for prepared in self._prepare_part([pending])]
        if not isinstance(failure, ImageError):
            failure = ImageError(f"{part[0]}: {self.name} cannot prepare it ({type(failure).__name__}: {failure})")
        self._answer(part[0], failure)
        return []

    # Computing thread

    def _compute(self) -> None:
        while (work := self._prepared.get()) is not None:
            with self._breaking_on_error():
                self._compute_group(*work)

    def _compute_group(self, group: list[PendingImage], batch: Batch) -> None:
        """Computes and answers a batch, in parts where memory or an image demands it."""
        if self._state is not State.SERVING:
            return
        if len(group) > self.batch_size:  # gathered before the memory ran out
            self._compute_in_parts(group, batch, self.batch_size)
            return
        started = time.monotonic()
        try:
            with self._limited(self._pass_seconds):
                rows = self._compute_batch(batch)
        except Exception as error:
            failure = error.with_traceback(None)  # its frames hold the memory that the parts will need
        else:
            self._answer_computed(group, batch, rows, time.monotonic() - started)
            return
        if isinstance(failure, torch.AcceleratorError):  # nothing runs in this process's context any more
            self._stop(State.BROKEN, DeviceLost(f"{self.name} lost {self.device}: {failure}"))
            return
        reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        part_size = 1  # finds the image that fails
        if out_of_memory(failure):
            clear_device_cache()
            reason = f"does not fit the memory of {self.device} even alone ({reason})"
            if len(group) > 1:
                part_size = self._shrink(len(group) // 2)
        if len(group) > 1:
            self._compute_in_parts(group, batch, part_size)
        else:
            self._fail(group[0], reason)

    def _compute_in_parts(self, group: list[PendingImage], batch: Batch, size: int) -> None:
        for start in range(0, len(group), size):
            rows = slice(start, start + size)
            self._compute_group(group[rows], {name: tensor[rows] for name, tensor in batch.items()})

    def _shrink(self, limit: int) -> int:
        """Lowers the batch size, also of later batches, to at most `limit`."""
        self.batch_size = limit if self.sizes is None else max(size for size in self.sizes if size <= limit)
        self._observe("splits_total", 1)
        self._add("splits", 1)
        return self.batch_size

    def _answer_computed(
        self, group: list[PendingImage], batch: Batch, rows: list[Features | str], seconds: float
    ) -> None:
        self._observe("batch_size", len(group))
        self._observe("images_per_second", len(group) / seconds)
        self._add("computed", len(group))
        self._add("busy", seconds)
        for index, (pending, row) in enumerate(zip(group, rows, strict=True)):
            if isinstance(row, str):
                self._fail(pending, row)
                continue
            if not self._proven:
                self._example = {name: tensor[index : index + 1].clone() for name, tensor in batch.items()}
            self._faults, self._proven = 0, True
            self._answer(pending, row)

    def _fail(self, pending: PendingImage, reason: str) -> None:
        """Answers an image that failed alone with its error, or breaks where the model and not the image is at fault.

        Bad images often come together, so a row of them proves nothing. After each `FAULTS` of them the model is tried on
        an image that it has computed before. A model that computes only the example, which is grey, fails by `UNPROVEN`.
        """
        self._faults += 1
        broken = None
        if self._faults % FAULTS == 0 and not self._computes_example():
            again = "an image that was computed before" if self._proven else "its example"
            broken = f"{self.name} failed on {self._faults} pictures in a row and now fails on {again}, too"
        elif not self._proven and self._faults >= UNPROVEN:
            broken = f"{self.name} failed on all of its first {self._faults} pictures"
        if broken is None:
            self._answer(pending, ImageError(f"{pending}: {self.name}: {reason}"))
        else:
            self._stop(State.BROKEN, ServerError(f"{broken}; the last: {pending}: {reason}"))

    def _computes_example(self) -> bool:
        if self._example is None:
            return False
        try:
            with self._limited(self._pass_seconds):
                return not any(isinstance(row, str) for row in self._compute_batch(self._example))
        except Exception:
            return False

    # Any thread

    def _answer(self, pending: PendingImage, result: Features | ImageError) -> None:
        self._observe("latency_seconds", time.monotonic() - pending.arrived)
        self._observe("errors_total" if isinstance(result, ImageError) else "images_total", 1)
        with self._changed:
            if pending in self._unanswered:  # else it was answered when the batcher broke
                self._unanswered.remove(pending)
                pending.result.set_result(result)

    def _add(self, counter: str, amount: float) -> None:
        with self._counting:
            self._counters[counter] += amount

"""ExpertServer: one vision expert on one slice of a device, as a plain class.

Ray Data runs the class as the callable of an actor pool: `__call__` writes features to the store and passes on one row per
shard. Under `ray.remote` with several threads, or as a Serve replica, callers ask for `features` at the same time. Neither
way needs other code, because the server batches the images of all callers itself (`actors.batching.MicroBatcher`).
"""

import importlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils.memory import clear_device_cache

from actors.batching import FAULTS, Batch, DeviceLost, MicroBatcher, PendingImage, ServerBusy, ServerError
from actors.ray_metrics import RayTelemetry
from mova_core.experts import Features, fingerprint, load_expert
from mova_core.experts.cost import Profile, example, measure, out_of_memory
from mova_core.features import FeatureStore
from mova_core.images import ImageError, ImageRef, ImageUnavailable
from mova_core.telemetry import Telemetry

__all__ = ["DONE", "FAULTS", "DeviceLost", "ExpertServer", "ServerBusy", "ServerError"]

_FAILED = pa.struct({"image": pa.string(), "key": pa.string(), "reason": pa.string()})
DONE = pa.schema({"shard": pa.string(), "stored": pa.int64(), "bytes": pa.int64(), "failed": pa.list_(_FAILED)})


class ExpertServer:
    """Serves the features of one expert. It is warm, and its batch size settled, when the constructor returns.

    It runs two threads and those that prepare pixels (one on a CPU, four beside an accelerator), until `close`.

    Args:
        expert: name in the registry.
        weights, size: as `load_expert` takes them.
        device: torch device; default the GPU this process was given, else the CPU.
        dtype: name of the dtype the expert computes in, e.g. "bfloat16".
        stored: name of the dtype that the store holds, e.g. "int8"; default `dtype`.
        batch_size: most images per forward pass; default that of the profile measured on such a device, else it is
            measured at the start.
        wait_ms: longest time, milliseconds, that an image waits for others to fill its batch.
        queue: most images that wait; more are refused with `ServerBusy`.
        profiles: as `mova profile` measures them.
        memory_share: part of the GPU's memory that this server may use, 0 to 1, where several servers share one GPU.
        measure_seconds: seconds to spend, about, where the batch size must be measured.
        fixed_shapes: run only batch sizes that were warmed up, padding to the next; default on an accelerator, where
            the first pass of a new shape compiles and tunes.
        module: Python module that registers an expert that is not one of the published eight; imported first.
        store: the feature store that `__call__` writes to.
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
        self.fixed_shapes = on_accelerator if fixed_shapes is None else fixed_shapes
        self.shapes: tuple[int, ...] = ()  # batch sizes that were warmed up
        fitting = (profile for profile in profiles if profile.fits(self.expert, self.device))
        self.profile: Profile | None = next(fitting, None)
        self._telemetry: Telemetry = RayTelemetry() if telemetry is None else telemetry
        self._id, self._stored = uuid.uuid4().hex, 0
        self._submitting_shard = threading.Lock()
        self._example, self._pass_seconds = example(self.expert), 0.0
        warm_batch_size = self._warm_up(batch_size, memory_share, measure_seconds)
        self._batcher = MicroBatcher(
            expert,
            lambda images: self.expert.preprocess(images),
            self._forward,
            device=self.device,
            batch_size=warm_batch_size,
            wait=wait_ms / 1000,
            queue=queue,
            sizes=self.shapes if self.fixed_shapes else None,
            prepare_threads=4 if on_accelerator else 1,
            observe=self._observe,
            example=self._example,
            pass_seconds=self._pass_seconds,
        )

    def identity(self) -> dict[str, Any]:
        """The `fingerprint` of what is served and the `description` it covers."""
        return {"fingerprint": self.fingerprint, "description": self.description}

    @property
    def batch_size(self) -> int:
        """Most images per forward pass; smaller than at the start where memory has run out since."""
        return self._batcher.batch_size

    def measured(self) -> Profile:
        """Speed and memory per batch size, as measured at the start or given in `profiles`.

        Raises:
            ValueError: neither: the batch size was given.
        """
        if self.profile is None:
            raise ValueError(f"the server of {self.name} was given its batch size, so it measured nothing")
        return self.profile

    def check_health(self) -> dict[str, Any]:
        """Settings, and the number of waiting images. Serve calls the method by this name.

        Raises:
            ServerError: the server answers nothing any more.
        """
        self._batcher.check()
        return {
            "expert": self.name,
            "device": str(self.device),
            "batch_size": self.batch_size,
            "warm": list(self.shapes),
            "waiting": self._batcher.waiting,
        }

    def features(self, images: Sequence[ImageRef]) -> list[Features | ImageError]:
        """Features of each image, tokens (H*W, C) on the CPU; of an image that cannot be used its error instead.

        Any number of threads may ask at once; their images are computed together. The call blocks until all are computed
        and has no timeout of its own: a caller that must not wait for ever bounds the call, as `ExpertPool` does.

        Raises:
            ServerBusy: the queue has no room for them.
            ServerError: the expert itself fails, or the server is closed.
        """
        return [pending.result.result() for pending in self._batcher.submit(images)]

    def __call__(
        self,
        shards: pa.Table,
        refused: Mapping[str, str] | None = None,
        before_each: Callable[[str], None] | None = None,
    ) -> Iterator[pa.Table]:
        """Computes and stores whole shards. Two threads may call at once: one computes while the other one writes.

        Args:
            shards: one row per shard with its `shard` id, and the `keys` (SHA-256, 32 bytes) and `images` (locators).
            refused: key in hex -> reason, of images that are not computed and count as failed.
            before_each: called with the key of each image before it is computed. Images are then computed one after the
                other, so that a process that dies was computing the last of them.

        Yields:
            One row of schema `DONE` per shard: the number of features and bytes that were stored, and the `failed` images,
            each with a reason. A shard that is committed already is not computed again and stores nothing.
        """
        if self.store is None:
            raise ValueError(f"ExpertServer({self.name!r}) was given no store to write to")
        partition = self.store.partition(self.name, self.fingerprint)
        for shard in shards.to_pylist():
            images = [
                ImageRef(path=path, key=key.hex()) for path, key in zip(shard["images"], shard["keys"], strict=True)
            ]
            done: dict[str, Any] = {"shard": shard["shard"], "stored": 0, "bytes": 0, "failed": []}
            failed = [(image, ImageError(refused[image.key])) for image in images if refused and image.key in refused]
            images = [image for image in images if not refused or image.key not in refused]
            with (
                self._submitting_shard
            ):  # one shard after the other, so that a whole shard is ready to be written early
                committed = partition.committed(shard["shard"])  # by this actor before it died, or by another run
                pending = [] if committed else self._submit(images, before_each)
            if not committed:
                computed, failed_now = self._collect(pending)
                failed += failed_now
                rows = partition.write(shard["shard"], computed)
                done["stored"], done["bytes"] = len(computed), sum(row["length"] for row in rows)
                done["failed"] = [
                    {"image": image.path, "key": image.key, "reason": self._reason(image, error)}
                    for image, error in failed
                ]
                self._stored += len(computed)
                self._quarantine(failed)
            yield pa.Table.from_pylist([done], schema=DONE)

    def _submit(self, images: Sequence[ImageRef], before_each: Callable[[str], None] | None) -> list[PendingImage]:
        if before_each is None:
            return self._batcher.submit(images, wait_for_room=True)
        pending = []
        for image in images:
            before_each(image.key)
            pending += self._batcher.submit([image], wait_for_room=True)
            if isinstance(error := pending[-1].result.exception(), ServerError):
                raise error  # before the next image is named: this one ended the server
        return pending

    def _quarantine(self, failed: Sequence[tuple[ImageRef, ImageError]]) -> None:
        assert self.store is not None
        self.store.quarantine(
            [
                {
                    "image": image.path,
                    # Without a key the next run tries again: an image that cannot be read may come back.
                    "sha256": None if isinstance(error, ImageUnavailable) else image.key,
                    "reason": self._reason(image, error),
                    "expert": self.name,
                }
                for image, error in failed
            ]
        )

    def _collect(
        self, pending: Sequence[PendingImage]
    ) -> tuple[dict[str, Features], list[tuple[ImageRef, ImageError]]]:
        """Awaits the features of a shard, by image key, and the images that failed."""
        # All at once: awaited one by one, every picture of a shard would wake this thread while the device's thread computes.
        wait([request.result for request in pending])
        computed: dict[str, Features] = {}
        failed: list[tuple[ImageRef, ImageError]] = []
        for request in pending:
            result = request.result.result()
            if isinstance(result, ImageError):
                failed.append((request.image, result))
            else:
                computed[request.image.key] = result
        return computed, failed

    def _reason(self, image: ImageRef, error: ImageError) -> str:
        """An error without the names of the image and the expert, which stand beside it."""
        return str(error).removeprefix(f"{image.path}: ").removeprefix(f"{self.name}: ")

    def load(self) -> dict[str, Any]:
        """What the server did since its start.

        Returns:
            `server`: its id; `computed`: images; `stored`: features; `splits`: batches split because memory ran out; `busy`:
            seconds of successful forward passes (wall time); `prepare`: seconds spent on pixels, summed over threads;
            `waiting`: images in the queue now.
        """
        return {"server": self._id, "stored": self._stored, **self._batcher.load()}

    def overdue(self) -> str | None:
        """What takes longer than it may, in words: only a new process helps then; see `MicroBatcher.overdue`."""
        return self._batcher.overdue()

    def close(self) -> None:
        """Ends the server's threads; images that still wait get a `ServerError`."""
        self._batcher.close()

    def _warm_up(self, batch_size: int | None, memory_share: float, seconds: float) -> int:
        """Makes the first pass of each shape, in `shapes` afterwards; returns the batch size."""
        try:
            if batch_size is None and self.profile is not None:
                on_gpu = self.device.type == "cuda"
                total = torch.cuda.get_device_properties(self.device).total_memory if on_gpu else None
                batch_size = self.profile.best(total and total * memory_share).batch
            if batch_size is None:
                self.profile = measure(self.expert, self._pass, self.device, seconds=seconds)
                best = self.profile.best().batch
                self.shapes = tuple(measured.batch for measured in self.profile.batches if measured.batch <= best)
                return best
            powers = (2**power for power in range(batch_size.bit_length()))
            for shape in sorted({*powers, batch_size} if self.fixed_shapes else {1}):
                self._pass(shape)
                self.shapes = (*self.shapes, shape)
            return batch_size
        except (RuntimeError, MemoryError) as error:
            if not self.shapes or not out_of_memory(error):
                reason = " ".join(str(error).split())[:300]
                raise ServerError(f"{self.name} cannot compute on {self.device}: {reason}") from error
            clear_device_cache()
            return self.shapes[-1]

    def _pass(self, batch: int) -> None:
        started = time.monotonic()
        self._forward({name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in self._example.items()})
        self._pass_seconds = max(self._pass_seconds, time.monotonic() - started)

    @torch.no_grad()  # not inference_mode: training an adapter on these tensors saves them for the backward pass
    def _forward(self, batch: Batch) -> list[Features | str]:
        """Features of each row of a batch; for a row with an infinite or NaN value what is wrong with it."""
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
        # Cloned, because a view of the batch would hold the memory of all callers' images as long as one lives.
        infinite = f"its features are not finite in {self.description['dtype']}"
        return [
            Features(row_NC.clone(), grid) if finite else infinite
            for row_NC, finite in zip(tokens_BNC.cpu(), finite_B, strict=True)
        ]

    def _observe(self, name: str, value: float) -> None:
        self._telemetry.observe(f"mova_expert_{name}", value, expert=self.name)

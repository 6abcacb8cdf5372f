"""Precompute: warm the feature store in bulk, one Ray Data execution and one actor pool per expert, side by side."""

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from actors.expert_server import ExpertServer
from cluster.planner import PoolSpec, fit_pools, know_memory, plan_pools
from mova_core.data import DataError
from mova_core.experts import EXPERTS, expert_card, expert_module, load_expert
from mova_core.experts.profile import Profile
from mova_core.features import FeatureStore
from pipelines.actor_pool import Stopped, executions_stopped, through_actors
from pipelines.bad_rows import BadRows, read_rows, tell_skipped
from pipelines.errors import root_cause
from pipelines.inspect_images import inspect_images
from pipelines.progress import progress_bar

logger = logging.getLogger(__name__)

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


class PrecomputeError(RuntimeError):
    """Some features could not be made; what was made is in the store."""


@dataclass(kw_only=True)
class Summary:
    """What one run did. Counts are features (one picture through one expert) unless they say otherwise."""

    images: int = 0
    computed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    quarantined: list[dict[str, str]] = field(default_factory=list)  # {"path", "reason"}, one per picture
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_images(
    source: str | Path,
    images: str | Path | None = None,
    bad_rows: BadRows = "raise",
    skipped: list[str] | None = None,
) -> list[Path]:
    """Pictures of a folder (at any depth, by suffix) or those that a LLaVA JSON/JSONL names, each once, sorted.

    Args:
        images: folder the records' images are relative to; default the data file's.
        bad_rows: whether a broken record ends it or is left out.
        skipped: takes what was wrong with each record left out.

    Raises:
        DataError: nothing there, no picture in it, or a broken record.
    """
    source = Path(source).resolve()  # the same in every process: Ray's workers have their own current directory
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise DataError(
                f"folder {source} holds no picture ({', '.join(sorted(SUFFIXES))}): give the folder that does"
            )
        return found
    samples, left_out = read_rows(source, images, bad_rows)
    tell_skipped(left_out)
    if skipped is not None:
        skipped += left_out
    found = sorted({Path(image.path).resolve() for sample in samples for image in sample.images if image.path})
    if not found:
        raise DataError(f"no record of {source} names an image")
    return found


def precompute(
    images: Sequence[Path],
    store_path: str | Path,
    *,
    experts: Sequence[str] = EXPERTS,
    pools: Iterable[str | PoolSpec] = (),
    profiles: Iterable[Profile] = (),
    weights: dict[str, str] | None = None,
    size: str = "full",
    dtype: str = "float32",
    shard_mb: float = 128.0,
    progress: bool = True,
) -> Summary:
    """Computes the features of `images` that the store does not have yet. Needs an open Ray session.

    Args:
        images: files every node can read.
        store_path: the store's folder; made if it is not there.
        pools: what `PoolSpec.parse` reads, per expert; one CPU actor for an expert not named.
        profiles: as `pipelines.profile` measures them: batch sizes, and the memory of actors on CPUs.
        weights: expert -> weights as `load_expert` takes them.
        dtype: dtype computed in and stored.
        shard_mb: size a shard aims at, in MiB.

    Raises:
        PlanError: a pool does not fit the cluster.
        PrecomputeError: an expert failed; the others went on, and a later run resumes.
        StoreError: the store cannot be written.
    """
    started = time.perf_counter()
    profiles = [one for one in profiles if one.expert in experts and one.is_of(expert_card(one.expert), size, dtype)]
    planned = know_memory(plan_pools(experts, pools), profiles)
    fitted = fit_pools(planned, ray.cluster_resources())
    modules = {name: expert_module(name) for name in experts}
    store = FeatureStore(store_path, create=True)
    summary = Summary(images=len(images))
    readable = _inspect(images, store, summary, progress)
    descriptions = {}
    for name in experts:
        with_weights = load_expert(name, weights=(weights or {}).get(name), size=size, dtype=getattr(torch, dtype))
        descriptions[name] = with_weights.describe()
    work = {name: _plan(store, descriptions[name], readable, shard_mb, summary) for name in experts}
    _check_disk(store, work, descriptions)
    server = {"size": size, "dtype": dtype, "profiles": profiles}
    arguments = {name: {**server, "weights": (weights or {}).get(name), "module": modules[name]} for name in experts}
    run = _Run(store, fitted, arguments, progress, summary)
    run.all({name: shards for name, shards in work.items() if shards})
    summary.seconds = time.perf_counter() - started
    return summary


def _inspect(images: Sequence[Path], store: FeatureStore, summary: Summary, progress: bool) -> dict[str, str]:
    """Key -> path of every readable picture, each decoded once here; the others go to the quarantine with their reason."""
    known = {(row["image"], row["reason"]) for row in store.quarantined()}
    readable: dict[str, str] = {}
    refused: list[dict[str, str | None]] = []
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"image": str(path)} for path in images], override_num_blocks=max(1, len(images) // 64))
    checked = rows.map_batches(inspect_images, batch_format="pyarrow", batch_size=64)
    with progress_bar(len(images), "inspect", "images", progress) as bar:
        for row in checked.iter_rows():
            bar.update()
            if row["error"] is None:
                readable.setdefault(row["key"], row["image"])
                continue
            summary.quarantined.append({"path": row["image"], "reason": row["error"]})
            if (
                row["key"] is not None and (row["image"], row["error"]) not in known
            ):  # a file that is away may come back
                refused.append({"image": row["image"], "sha256": row["key"], "reason": row["error"], "expert": None})
    if refused:
        store.quarantine(refused)
    if not readable:
        raise PrecomputeError(
            f"none of {len(images)} pictures can be read; the first: {summary.quarantined[0]['reason']}"
        )
    return dict(sorted(readable.items()))


def _plan(
    store: FeatureStore, description: dict[str, Any], readable: dict[str, str], shard_mb: float, summary: Summary
) -> list[dict[str, Any]]:
    """Shards still to be computed: a set difference between what is wanted and what receipts say is there."""
    name = description["expert"]
    shelf = store.add_expert(description)
    rows = max(1, int(shard_mb * 2**20 / _feature_bytes(description)))
    shards = shelf.plan(list(readable), rows)
    missing = sum(len(shard.keys) for shard in shards)
    summary.reused[name] = len(readable) - missing
    summary.computed[name] = 0
    return [{"shard": s.id, "keys": list(s.keys), "paths": [readable[key] for key in s.keys]} for s in shards]


def _feature_bytes(description: dict[str, Any]) -> int:
    height, width = description["grid"]
    return height * width * description["channels"] * getattr(torch, description["dtype"]).itemsize


def _check_disk(store: FeatureStore, work: dict[str, list[dict[str, Any]]], descriptions: dict[str, Any]) -> None:
    need = sum(
        sum(len(shard["keys"]) for shard in shards) * _feature_bytes(descriptions[name])
        for name, shards in work.items()
    )
    free = store.free_bytes()
    if free is not None and need > free:
        raise PrecomputeError(
            f"the features need {need / 2**20:,.0f} MiB but the disk of {store.location} has {free / 2**20:,.0f} MiB free: "
            "free some, choose another --store, or ask for fewer --experts"
        )


def _divided(
    shards: list[dict[str, Any]], pools: Sequence[PoolSpec]
) -> Iterable[tuple[PoolSpec, list[dict[str, Any]]]]:
    """Each pool of an expert with its part of the shards, in proportion to its rate, else to its actors."""
    rates = [pool.rate or 0.0 for pool in pools]
    if not all(rates):
        rates = [float(pool.max_size) for pool in pools]
    ends = [round(len(shards) * sum(rates[: index + 1]) / sum(rates)) for index in range(len(pools))]
    for pool, begin, end in zip(pools, [0, *ends], ends, strict=False):
        yield pool, shards[begin:end]


class _Run:
    """The executions of one precompute, as many at once as the cluster's CPUs and GPUs carry."""

    def __init__(
        self,
        store: FeatureStore,
        pools: dict[str, tuple[PoolSpec, ...]],
        arguments: dict[str, dict[str, Any]],
        progress: bool,
        summary: Summary,
    ):
        self.store, self.pools, self.arguments = store, pools, arguments
        self.progress, self.summary = progress, summary
        resources = ray.cluster_resources()
        self.free = {
            "cpu": resources.get("CPU", 0.0) - 1,
            "gpu": resources.get("GPU", 0.0),
            "memory": resources.get("memory", 0.0),
        }  # one CPU for reading tasks
        self.changed = threading.Condition()
        self.stopping = False

    def all(self, work: dict[str, list[dict[str, Any]]]) -> None:
        """Runs every expert's shards; an expert that fails does not stop the others."""
        failures: dict[str, BaseException] = {}
        threads = ThreadPoolExecutor(
            max(1, sum(len(self.pools[name]) for name in work)), thread_name_prefix="precompute"
        )
        try:
            running = {
                threads.submit(self.one, pool, part): name
                for name, shards in work.items()
                for pool, part in _divided(shards, self.pools[name])
                if part
            }
            for done in as_completed(running):
                if (error := done.exception()) is not None:
                    failures[running[done]] = error
        finally:
            with self.changed:
                self.stopping = True  # an expert that still waits for room must not start any more
                self.changed.notify_all()
            with executions_stopped():
                threads.shutdown(cancel_futures=True)  # whoever closes Ray next must find nothing that uses it
        if failures:
            name, error = next(iter(failures.items()))
            raise PrecomputeError(f"{', '.join(failures)} did not finish; {name}: {root_cause(error)}") from error

    def one(self, pool: PoolSpec, shards: list[dict[str, Any]]) -> None:
        """One pool's execution: shards in, references out."""
        name = pool.expert
        actors = self._take(pool, len(shards))
        try:
            references = through_actors(
                ExpertServer,
                shards,
                arguments={
                    "expert": name,
                    **self.arguments[name],
                    "batch_size": pool.batch,
                    "store": self.store.location,
                    "device": "cuda" if pool.gpu else "cpu",
                    "memory_share": min(1.0, pool.gpu or 1.0),
                },
                total=sum(len(shard["keys"]) for shard in shards),
                what=name,
                unit="images",
                progress=self.progress,
                sizes=(min(pool.min_size, actors), actors),
                cpus=pool.cpus,
                gpus=pool.gpu,
                memory=pool.memory,
                accelerator=pool.accelerator,
            )
            for row in references:
                if row["error"] is None:
                    with self.changed:
                        self.summary.computed[name] += 1
                else:
                    self.summary.quarantined.append({"path": row["image"], "reason": f"{name}: {row['error']}"})
            self.store.shelf(name).snapshot()
        finally:
            self._give(pool, actors)

    def _take(self, pool: PoolSpec, shards: int) -> int:
        """Waits until the least size fits beside the others, then takes as many actors as do, at most one per shard."""
        least, most = min(pool.min_size, shards), min(pool.max_size, shards)

        def room() -> int:
            return min([most, *(int(self.free[kind] / share + 1e-6) for kind, share in pool.holds.items() if share)])

        with self.changed:
            self.changed.wait_for(lambda: self.stopping or room() >= least)
            if self.stopping:
                raise Stopped(f"{pool.expert} was not started: the run was stopped")
            actors = room()
            self._held(pool, actors)
        return actors

    def _give(self, pool: PoolSpec, actors: int) -> None:
        with self.changed:
            self._held(pool, -actors)
            self.changed.notify_all()

    def _held(self, pool: PoolSpec, actors: int) -> None:
        for kind, share in pool.holds.items():
            self.free[kind] -= actors * share

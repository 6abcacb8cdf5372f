"""Precompute: warm the feature store in bulk, one Ray Data execution per pool of each expert, side by side."""

import json
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from cluster.nodes import PlanError, running_nodes
from cluster.placement import plan_placement
from cluster.pools import PoolSpec, fit_pools, know_memory, plan_pools
from mova_core.experts import EXPERTS, expert_card, expert_module, fingerprint, load_expert
from mova_core.experts.cost import Profile
from mova_core.features import FeatureStore, StoreError
from pipelines.precompute.inspect_images import Inspected, inspect
from pipelines.precompute.progress import ExpertLog, RunLog, draw_run
from pipelines.precompute.scheduler import ExpertWorkload, PrecomputeScheduler, binary, check_nodes
from pipelines.precompute.status_actor import start_status_actor

SHARDS = 256  # per expert, at least: a set of few or small features is divided, too
LEAST_ROWS = 64  # pictures per shard, at least, unless they are large


class PrecomputeError(RuntimeError):
    """Some features could not be made; what was made is in the store."""


@dataclass(kw_only=True)
class Summary:
    """What one run did. Counts are features (one picture through one expert) unless they say otherwise."""

    job: str = ""
    images: int = 0
    computed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    quarantined: list[dict[str, str]] = field(default_factory=list)  # {"path", "reason"}, one per picture
    seconds: float = 0.0
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)  # as `ExpertLog.summary` tells
    events: list[list[Any]] = field(default_factory=list)  # [seconds since the start, what happened]

    def add(self, log: RunLog) -> None:
        """Takes what the log of the run knows."""
        for name, one in log.experts.items():
            self.computed[name], self.reused[name] = one.computed, one.reused
            self.experts[name] = one.summary()
            self.quarantined += [
                {"path": row["image"], "reason": f"{name}: {row['reason']}"} for row in one.failed.values()
            ]
        self.events = [[round(seconds, 1), text] for seconds, text in log.events]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is computed, and how it is stored."""

    experts: Sequence[str] = EXPERTS
    weights: Mapping[str, str] = field(default_factory=dict)  # expert -> as `load_expert` takes them
    size: str = "full"
    dtype: str = "float32"  # computed in
    codecs: Mapping[str, str] = field(default_factory=dict)  # expert -> dtype stored; else that computed in
    shard_mb: float = 128.0  # size a shard aims at, MiB
    retry_quarantined: bool = False  # compute what failed in an earlier run, too


def precompute(
    images: pa.Table,
    store_path: str | Path,
    *,
    pools: Iterable[str | PoolSpec] = (),
    profiles: Iterable[Profile] = (),
    placement: Literal["auto", "pools"] = "auto",
    name: str | None = None,
    summary: str | Path | None = None,
    picture: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Summary:
    """Computes the features of images that the store does not have yet. Needs an open Ray session.

    Args:
        images: as `find_images` gives them; every node can read them.
        store_path: folder or URL of the store; made if it is not there.
        pools: as `PoolSpec.parse` reads them, any number per expert; one CPU actor for an expert not named.
        profiles: as `pipelines.profile` measures them: batch sizes, and the memory of actors on CPUs.
        name: of the run, by which `mova precompute status` and `resize` find it; default the time.
        placement: "auto": where no pool is given, and the profiles hold every expert, what `plan_placement` chooses.
        summary, picture: files that the summary (JSON) and a picture of the run go to, also when it fails.
        settings: of `Settings`.

    Raises:
        PlanError: a pool does not fit the cluster.
        PrecomputeError: an expert failed; the others went on, and a later run resumes.
        RunError: a run of that name is under way.
        StoreError: the store cannot be written.
    """
    started = time.perf_counter()
    of = Settings(**settings)
    profiles, pools = _profiles_of(of, profiles), list(pools)
    planned = fit_pools(know_memory(plan_pools(of.experts, pools), profiles), ray.cluster_resources())
    for specs in planned.values():
        check_nodes(specs)
    store = FeatureStore(store_path, create=True)
    job = name or f"{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:3]}"  # two may begin in one second
    board = start_status_actor(job, store.location)  # starts while images are looked at
    try:
        inspected = _readable(images, store, progress)
        told = Summary(job=job, images=len(images), quarantined=list(inspected.refused))
        works: list[ExpertWorkload] = []
        logs: dict[str, ExpertLog] = {}
        for work, left_out in _work(of, inspected.readable, store):
            absent = work.look()
            work.pools = planned[work.expert]
            work.arguments["profiles"] = profiles
            told.quarantined += left_out
            works.append(work)
            if not absent and work.partition is not None:
                work.partition.snapshot()  # whose run died before it got to that
            logs[work.expert] = ExpertLog(total=len(work.images), reused=len(work.images) - absent)
        _check_disk(store, works)
        lines = _place(works, profiles) if placement == "auto" and not pools else []
        log = RunLog(job, store.location, logs, progress)
        if any(len(work.absent) for work in works):
            log.tell(f"run {job} begins: `mova precompute status {job}` tells how far it is")
        for line in lines:
            log.tell(line)
        run = PrecomputeScheduler(store.location, works, log, board)
        try:
            failures = run.all()
        finally:
            log.close()
            told.add(log)
            told.seconds = time.perf_counter() - started
            if summary is not None:
                Path(summary).write_text(json.dumps(told.to_dict(), indent=2))
            if picture is not None:
                draw_run(log, picture)
    finally:
        ray.kill(board)
    if failures:
        expert, error = next(iter(failures.items()))
        raise PrecomputeError(f"{', '.join(failures)} did not finish; {expert}: {error}") from error
    return told


def preview(
    images: pa.Table,
    store_path: str | Path,
    *,
    profiles: Iterable[Profile] = (),
    progress: bool = True,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """What `precompute` would have to do, per expert: features `wanted`, `there` and `to_compute`, `bytes` to be written,
    and estimated device-`hours` per kind of device profiled (of a whole GPU, or as many CPUs as the profile used).

    Looks at every image and writes nothing. Takes what `precompute` takes.
    """
    of = Settings(**settings)
    try:
        store = FeatureStore(store_path)
    except StoreError:
        store = None
    preview = {}
    with tempfile.TemporaryDirectory() as aside:
        readable = _readable(images, FeatureStore(aside, create=True), progress).readable
    for work, _ in _work(of, readable, store, write=False):
        missing = work.look()
        preview[work.expert] = {
            "wanted": len(work.images),
            "there": len(work.images) - missing,
            "to_compute": missing,
            "bytes": missing * work.feature_bytes,
            "hours": {
                one.device: missing / one.best().images_per_second / 3600
                for one in _profiles_of(of, profiles)
                if one.expert == work.expert
            },
        }
    return preview


def _profiles_of(settings: Settings, profiles: Iterable[Profile]) -> list[Profile]:
    return [
        one
        for one in profiles
        if one.expert in settings.experts and one.is_of(expert_card(one.expert), settings.size, settings.dtype)
    ]


def _readable(images: pa.Table, store: FeatureStore, progress: bool) -> Inspected:
    inspected = inspect(images, store, progress)
    if not len(inspected.readable):
        raise PrecomputeError(
            f"none of {len(images)} pictures can be read; the first: {inspected.refused[0]['reason']}"
        )
    return inspected


def _work(
    settings: Settings, readable: pa.Table, store: FeatureStore | None, write: bool = True
) -> Iterator[tuple[ExpertWorkload, list[dict[str, str]]]]:
    """Each expert's work, and what of it is left out as it failed in an earlier run."""
    failed_before: dict[str, list[dict[str, Any]]] = {}
    if store is not None and not settings.retry_quarantined:
        for row in store.quarantined():
            if row["expert"] and row["sha256"]:
                failed_before.setdefault(row["expert"], []).append(row)
    for name in settings.experts:
        weights = settings.weights.get(name)
        expert = load_expert(name, weights=weights, size=settings.size, dtype=getattr(torch, settings.dtype))
        stored = settings.codecs.get(name, settings.dtype)
        description = expert.describe(getattr(torch, stored))
        del expert  # its weights, before the next one's are loaded
        images, left_out = _wanted(name, readable, failed_before.get(name, []))
        partition, digest = None, fingerprint(description)
        if store is not None and (write or digest in store.experts().get(name, [])):
            partition = store.add_expert(description) if write else store.partition(name, digest)
        height, width = description["grid"]
        feature_bytes = height * width * description["channels"] * getattr(torch, stored).itemsize
        by_size = max(1, int(settings.shard_mb * 2**20 / feature_bytes))
        work = ExpertWorkload(
            expert=name,
            partition=partition,
            images=images,
            # The same for the same images, whatever is there already: runs at once then share their shards.
            rows=min(by_size, max(LEAST_ROWS, -(-len(images) // SHARDS))),
            feature_bytes=feature_bytes,
            arguments={
                "weights": weights,
                "size": settings.size,
                "dtype": settings.dtype,
                "stored": stored,
                "module": expert_module(name),
            },
        )
        yield work, left_out


def _wanted(
    name: str, readable: pa.Table, failed: Sequence[Mapping[str, Any]]
) -> tuple[pa.Table, list[dict[str, str]]]:
    """The images an expert is wanted for, and those left out as they failed."""
    images = readable
    if images["experts"].null_count < len(images):
        lists = images["experts"].combine_chunks()
        counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        names = np.repeat(np.arange(len(lists)), counts)[
            pc.equal(pc.list_flatten(lists), name).to_numpy(zero_copy_only=False)
        ]
        named = lists.is_null().to_numpy(zero_copy_only=False)
        named[names] = True
        images = images.filter(pa.array(named))
    columns = {
        "key": images["key"],
        "image": images["image"].cast(pa.large_string()),
    }  # millions of paths are over 2 GiB
    images = pa.table(columns).combine_chunks()
    if not failed:
        return images, []
    keys = {bytes.fromhex(row["sha256"]): row for row in failed}
    out = np.isin(binary(images["key"]), np.array(list(keys), "S32"))
    told = [
        {"path": row["image"], "reason": f"{name}: {keys[row['key']]['reason']} (in an earlier run)"}
        for row in images.filter(pa.array(out)).to_pylist()
    ]
    return images.filter(pa.array(~out)).combine_chunks(), told


def _place(works: list[ExpertWorkload], profiles: Sequence[Profile]) -> list[str]:
    """Gives experts the pools that `plan_placement` chooses, where it can; returns what to tell of it."""
    missing = {work.expert: len(work.absent) for work in works if len(work.absent)}
    if not missing or not {one.expert for one in profiles} >= missing.keys():
        return []
    try:
        placed = plan_placement(missing, profiles, running_nodes())
    except PlanError as error:
        return [f"no placement from the profiles, so one actor on a CPU per expert: {error}"]
    # In turn: each waits until all its actors find room. Side by side: those that do begin.
    chosen = [replace(pool, min_size=pool.max_size if placed.sequential else 1) for pool in placed.pools]
    fitted = fit_pools(plan_pools(list(missing), chosen), ray.cluster_resources())
    for work in works:
        work.pools = fitted.get(work.expert, work.pools)
    works.sort(key=lambda work: -max(pool.gpu for pool in work.pools))  # larger shares of a GPU first, as planned
    return [*placed.describe(), *(f"pool {pool}" for pool in chosen)]


def _check_disk(store: FeatureStore, works: Sequence[ExpertWorkload]) -> None:
    need = sum(len(work.absent) * work.feature_bytes for work in works)
    free = store.free_bytes()
    if free is not None and need > free:
        raise PrecomputeError(
            f"the features need {need / 2**20:,.0f} MiB but the disk of {store.location} has {free / 2**20:,.0f} MiB free: "
            "free some, choose another --store, or ask for fewer --experts"
        )

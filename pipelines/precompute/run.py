"""Precompute: fill the feature store in bulk with Ray Data, several experts side by side."""

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

from cluster.nodes import running_nodes
from cluster.placement import plan_placement
from cluster.pools import PlanError, PoolSpec, fit_pools, know_memory, plan_pools
from mova_core.experts import EXPERTS, expert_card, expert_module, fingerprint, found_here, load_expert
from mova_core.experts.cost import Profile, shapes_of
from mova_core.features import FeatureStore, StoreError
from mova_core.io import strict_json
from mova_core.io.atomic import write_atomic
from pipelines.precompute.inspect_images import Inspection, inspect
from pipelines.precompute.plot import draw_run
from pipelines.precompute.progress import ExpertLog, RunLog
from pipelines.precompute.scheduler import PrecomputeScheduler, check_nodes
from pipelines.precompute.status_actor import start_status_actor
from pipelines.precompute.workload import ExpertWorkload, ImageTable, without

SHARDS = 256  # per expert, at least, so that several actors share also a set of few or small features
LEAST_ROWS = 64  # pictures per shard, at least, unless their features are large


class PrecomputeError(RuntimeError):
    """Some features could not be computed; the others are in the store."""


@dataclass(kw_only=True)
class Summary:
    """What one run did. Counts are features (one picture through one expert) unless they say otherwise."""

    job: str = ""
    images: int = 0
    computed: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    quarantined: list[dict[str, str]] = field(default_factory=list)  # {"path", "reason"}, one per picture
    seconds: float = 0.0
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)  # see `ExpertLog.summary`
    events: list[list[Any]] = field(default_factory=list)  # [seconds since the start, what happened]

    def add(self, log: RunLog) -> None:
        """Adds what the log of the run holds."""
        for name, expert in log.experts.items():
            self.computed[name], self.reused[name] = expert.computed, expert.reused
            self.experts[name] = expert.summary()
            self.quarantined += [
                {"path": failure["image"], "reason": f"{name}: {failure['reason']}"}
                for failure in expert.failed.values()
            ]
        self.events = [[round(seconds, 1), text] for seconds, text in log.events]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PrecomputeSettings:
    """What is computed, and how it is stored.

    Args:
        experts: names in the registry.
        weights: expert -> weights, as `load_expert` takes them.
        size: of the experts, "full" or "mini".
        dtype: computed in.
        codecs: expert -> dtype stored; default `dtype`.
        shard_mb: size a shard aims at, MiB.
        retry_quarantined: empty the quarantine first, so that what failed in an earlier run is computed too.
    """

    experts: Sequence[str] = EXPERTS
    weights: Mapping[str, str] = field(default_factory=dict)
    size: str = "full"
    dtype: str = "float32"
    codecs: Mapping[str, str] = field(default_factory=dict)
    shard_mb: float = 128.0
    retry_quarantined: bool = False


def precompute(
    images: pa.Table,
    store_path: str | Path,
    *,
    experts: Sequence[str] = EXPERTS,
    weights: Mapping[str, str] | None = None,
    size: str = "full",
    dtype: str = "float32",
    codecs: Mapping[str, str] | None = None,
    shard_mb: float = 128.0,
    retry_quarantined: bool = False,
    pools: Iterable[str | PoolSpec] = (),
    profiles: Iterable[Profile] = (),
    placement: Literal["auto", "pools"] = "auto",
    name: str | None = None,
    summary: str | Path | None = None,
    picture: str | Path | None = None,
    progress: bool = True,
) -> Summary:
    """Computes the features of images that the store does not have yet. Needs an open Ray session.

    Args:
        images: as `find_images` returns them; every node can read them.
        store_path: folder or URL of the store; created if it does not exist.
        experts, weights, size, dtype, codecs, shard_mb, retry_quarantined: see `PrecomputeSettings`.
        pools: as `PoolSpec.parse` reads them, any number per expert; one CPU actor for an expert not named.
        profiles: as `pipelines.profile` measures them: batch sizes, and the memory of actors on CPUs.
        placement: "auto": where no pool is named and the profiles hold every expert, what `plan_placement` chooses.
        name: of the run, for `mova precompute status` and `resize`; default the time.
        summary, picture: files for the summary (JSON) and a picture of the run; written also when the run fails.
        progress: whether to draw bars and lines on stderr.

    Raises:
        PlanError: a pool does not fit the cluster.
        PrecomputeError: an expert failed; the others went on, and a later run resumes.
        RunError: a run of that name is under way.
        StoreError: the store cannot be written.
    """
    started = time.perf_counter()
    settings = PrecomputeSettings(
        experts=experts,
        weights=weights or {},
        size=size,
        dtype=dtype,
        codecs=codecs or {},
        shard_mb=shard_mb,
        retry_quarantined=retry_quarantined,
    )
    profiles, pools = _profiles_of(settings, profiles), list(pools)
    planned = fit_pools(know_memory(plan_pools(experts, pools), profiles), ray.cluster_resources())
    for specs in planned.values():
        check_nodes(specs)
    store = FeatureStore(store_path, create=True)
    job = name or f"{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:3]}"  # two runs may begin in one second
    run = start_status_actor(job, store.location)  # starts while the images are inspected
    try:
        if retry_quarantined:
            store.release()
        inspection = _readable(images, store, progress)
        done = Summary(job=job, images=len(images), quarantined=list(inspection.refused))
        del images  # the caller may let go of them, too: from here on Ray's object store has the locators
        works, logs = _plan(settings, inspection, store, planned, profiles, done)
        _check_disk(store, works)
        lines = _place(works, profiles) if placement == "auto" and not pools else []
        log = RunLog(job, store.location, logs, progress)
        if any(len(work.missing) for work in works):
            log.line(f"run {job} begins; `mova precompute status {job}` shows its progress")
        for line in lines:
            log.line(f"{job}: {line}")
        scheduler = PrecomputeScheduler(store.location, works, log, run)
        try:
            failures = scheduler.run_all()
        finally:
            log.close()
            done.add(log)
            done.seconds = time.perf_counter() - started
            if summary is not None:
                write_atomic(summary, strict_json.dumps(done.to_dict(), indent=2))
            if picture is not None:
                draw_run(log, picture)
    finally:
        ray.kill(run)
    if failures:
        expert, error = next(iter(failures.items()))
        raise PrecomputeError(f"{', '.join(failures)} did not finish; {expert}: {error}") from error
    return done


def _plan(
    settings: PrecomputeSettings,
    inspection: Inspection,
    store: FeatureStore,
    pools: Mapping[str, tuple[PoolSpec, ...]],
    profiles: Sequence[Profile],
    summary: Summary,
) -> tuple[list[ExpertWorkload], dict[str, ExpertLog]]:
    """The work of each expert and a log for each; pictures left out go to the summary."""
    works, logs = [], {}
    for work, left_out in _workloads(settings, inspection.readable, store):
        missing = work.refresh_missing()
        work.pools = pools[work.expert]
        work.arguments["profiles"] = list(profiles)
        summary.quarantined += left_out
        works.append(work)
        if not missing and work.partition is not None:
            work.partition.snapshot()  # an earlier run may have ended just before its snapshot
        logs[work.expert] = ExpertLog(total=len(work), reused=len(work) - missing)
    return works, logs


def preview(
    images: pa.Table,
    store_path: str | Path,
    *,
    experts: Sequence[str] = EXPERTS,
    weights: Mapping[str, str] | None = None,
    size: str = "full",
    dtype: str = "float32",
    codecs: Mapping[str, str] | None = None,
    shard_mb: float = 128.0,
    retry_quarantined: bool = False,
    profiles: Iterable[Profile] = (),
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """What `precompute` would have to do, per expert: features `wanted`, `there` and `to_compute`, `bytes` to be written,
    and estimated device-`hours` per kind of device profiled (of a whole GPU, or as many CPUs as the profile used).

    Inspects every image, writes nothing and downloads no weights: `there` is None for an expert of which the store has
    features while its weights are not on this machine, since weights decide which features are its. Takes what `precompute`
    takes.
    """
    settings = PrecomputeSettings(
        experts=experts,
        weights=weights or {},
        size=size,
        dtype=dtype,
        codecs=codecs or {},
        shard_mb=shard_mb,
        retry_quarantined=retry_quarantined,
    )
    try:
        store = FeatureStore(store_path)
    except StoreError:
        store = None
    rows = {}
    unknown: set[str] = set()
    with tempfile.TemporaryDirectory() as aside:
        readable = _readable(images, FeatureStore(aside, create=True), progress).readable
    for work, _ in _workloads(settings, readable, store, unknown):
        missing = work.refresh_missing()
        rows[work.expert] = {
            "wanted": len(work),
            "there": None if work.expert in unknown else len(work) - missing,
            "to_compute": missing,
            "bytes": missing * work.feature_bytes,
            "hours": {
                profile.device: missing / profile.best().images_per_second / 3600
                for profile in _profiles_of(settings, profiles)
                if profile.expert == work.expert
            },
        }
    return rows


def _profiles_of(settings: PrecomputeSettings, profiles: Iterable[Profile]) -> list[Profile]:
    return [
        profile
        for profile in profiles
        if profile.expert in settings.experts
        and profile.is_of(expert_card(profile.expert), settings.size, settings.dtype)
    ]


def _readable(images: pa.Table, store: FeatureStore, progress: bool) -> Inspection:
    inspection = inspect(images, store, progress)
    if not len(inspection.readable):
        raise PrecomputeError(
            f"none of {len(images)} pictures can be read; the first: {inspection.refused[0]['reason']}"
        )
    return inspection


def _workloads(
    settings: PrecomputeSettings, readable: pa.Table, store: FeatureStore | None, unknown: set[str] | None = None
) -> Iterator[tuple[ExpertWorkload, list[dict[str, str]]]]:
    """Each expert's work, and the pictures left out of it because they failed in an earlier run.

    Args:
        unknown: for a preview, which writes nothing: gets the experts of which it cannot be told what is stored, because
            their weights are not on this machine. None for a run.
    """
    failed_before: dict[str, dict[bytes, str]] = {}  # expert -> key -> reason
    if store is not None and not settings.retry_quarantined:
        for record in store.quarantined():
            if record["expert"] and record["sha256"]:
                failed = failed_before.setdefault(record["expert"], {})
                failed[bytes.fromhex(record["sha256"])] = record["reason"]
    images = ImageTable(readable)
    for name in settings.experts:
        weights = settings.weights.get(name)
        stored = settings.codecs.get(name, settings.dtype)
        digests = [] if store is None else store.experts().get(name, [])
        source = weights or (expert_card(name).weights if settings.size == "full" else "")  # "": a fixed random network
        if unknown is not None and not (digests and (not source or found_here(source))):
            expert, description = shapes_of(name, settings.size), None
            unknown |= {name} if digests else set()
        else:
            expert = load_expert(name, weights=weights, size=settings.size, dtype=getattr(torch, settings.dtype))
            description = expert.describe(getattr(torch, stored))
        (height, width), channels = expert.grid, expert.channels
        del expert  # frees its weights before the next expert's are loaded
        failed = failed_before.get(name, {})
        wanted, out = without(_wanted(name, readable["experts"]), images, failed)
        left_out = [
            {"path": row["image"], "reason": f"{name}: {failed[row['key']]} (in an earlier run)"}
            for row in readable.select(["key", "image"]).take(pa.array(out)).to_pylist()
        ]
        partition = None
        if store is not None and description is not None:
            if unknown is None:
                partition = store.add_expert(description)
            elif (digest := fingerprint(description)) in digests:
                partition = store.partition(name, digest)
        feature_bytes = height * width * channels * getattr(torch, stored).itemsize
        by_size = max(1, int(settings.shard_mb * 2**20 / feature_bytes))
        count = len(images) if wanted is None else len(wanted)
        work = ExpertWorkload(
            expert=name,
            partition=partition,
            images=images,
            wanted=wanted,
            # The same for the same images, whatever is stored already: runs at once then compute the same shards.
            shard_rows=min(by_size, max(LEAST_ROWS, -(-count // SHARDS))),
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


def _wanted(name: str, experts: pa.ChunkedArray) -> np.ndarray | None:
    """Positions of the images that an expert is wanted for; None for all."""
    if experts.null_count == len(experts):
        return None
    lists = experts.combine_chunks()
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    named_rows = np.repeat(np.arange(len(lists)), counts)[
        pc.equal(pc.list_flatten(lists), name).to_numpy(zero_copy_only=False)
    ]
    wanted = lists.is_null().to_numpy(zero_copy_only=False)
    wanted[named_rows] = True
    return np.flatnonzero(wanted)


def _place(works: list[ExpertWorkload], profiles: Sequence[Profile]) -> list[str]:
    """Gives experts the pools that `plan_placement` chooses, where it can; returns lines about it for people."""
    missing = {work.expert: len(work.missing) for work in works if len(work.missing)}
    if not missing or not {profile.expert for profile in profiles} >= missing.keys():
        return []
    try:
        placed = plan_placement(missing, profiles, running_nodes())
    except PlanError as error:
        return [f"no placement from the profiles, so one actor on a CPU per expert: {error}"]
    # Sequential: each expert waits until all its actors find room. Concurrent: the actors that find room begin.
    chosen = [replace(pool, min_size=pool.max_size if placed.sequential else 1) for pool in placed.pools]
    fitted = fit_pools(plan_pools(list(missing), chosen), ray.cluster_resources())
    for work in works:
        work.pools = fitted.get(work.expert, work.pools)
    works.sort(key=lambda work: -max(pool.gpu for pool in work.pools))  # larger shares of a GPU first, as planned
    return [*placed.describe(), *(f"pool {pool}" for pool in chosen)]


def _check_disk(store: FeatureStore, works: Sequence[ExpertWorkload]) -> None:
    need = sum(len(work.missing) * work.feature_bytes for work in works)
    free = store.free_bytes()
    if free is not None and need > free:
        raise PrecomputeError(
            f"the features need {need / 2**20:,.0f} MiB but the disk of {store.location} has {free / 2**20:,.0f} MiB free: "
            "free some, choose another --store, or ask for fewer --experts"
        )

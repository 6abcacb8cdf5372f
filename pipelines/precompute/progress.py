"""Progress of a precompute run: bars, lines, Ray metrics, and the numbers of its status and its summary."""

import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ray.util.metrics import Gauge

from mova_core.figures import number, percent
from pipelines.progress_bar import progress_bar

WINDOW = 15.0  # seconds over which a rate is taken
LINES = 15.0  # seconds between two lines where there is no terminal
SAMPLES = 1000  # per expert, at most: a longer run keeps fewer per minute

_METRICS = {
    "done": "Features that are in the store, of those wanted.",
    "total": "Features wanted.",
    "images_per_second": "Pictures stored per second, from the first batch begun to the last shard written.",
    "eta_seconds": "Seconds until all wanted features are there, at the present rate.",
    "queue": "Blocks of shards that no actor has drawn.",
    "actors": "Actors ready to compute.",
    "bytes": "Bytes written.",
    "busy": "Share of the time since they were ready that the actors' devices computed, 0 to 1.",
}


class Sample(NamedTuple):
    """How one expert stood at one moment of a run."""

    seconds: float  # since the run began
    computed: int  # pictures
    actors: int  # ready to compute


@dataclass(kw_only=True)
class ExpertLog:
    """One expert's part of a run. Counts are features.

    images/s and busy have one definition in the status, the summary and the picture, from the events of the actors themselves:
    images/s is pictures computed and stored, over the seconds from the first batch that any actor began to the last shard that
    any actor wrote; busy is the seconds that the devices computed over the seconds that the actors were ready.
    """

    total: int  # wanted, those in quarantine left out
    reused: int = 0
    computed: int = 0
    bytes: int = 0
    failed: dict[str, dict[str, str]] = field(default_factory=dict)  # key -> {"image", "key", "reason"}
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)  # worker -> its last `ShardWorker.load`
    started: int = 0  # actors that were asked for
    actors: int = 0  # ready to compute
    pending: int = 0  # blocks of shards that no actor has drawn
    pools: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # of the threads that record shards

    def sum_of(self, what: str) -> Any:
        """A sum over all workers of this run, also those that died."""
        return sum(load[what] for load in self.workers.values())

    @property
    def done(self) -> int:
        """Features in the store, as far as is known."""
        return min(self.total, self.reused + max(self.computed, self.sum_of("stored")))

    @property
    def seconds(self) -> float:
        """From the first batch that an actor began to the last shard that an actor wrote; 0 before the first shard."""
        begun = [load["first_at"] for load in self.workers.values() if load["first_at"]]
        written = [load["last_at"] for load in self.workers.values() if load["last_at"]]
        return max(0.0, max(written) - min(begun)) if written else 0.0

    @property
    def images_per_second(self) -> float | None:
        """Pictures computed and stored per second of `seconds`; None before the first shard is written."""
        return self.sum_of("stored") / self.seconds if self.seconds else None

    @property
    def recent_rate(self) -> float:
        """Pictures computed per second over the last `WINDOW` seconds, for the time to go."""
        if len(self.samples) < 2:
            return 0.0
        new = self.samples[-1]
        old = next((sample for sample in self.samples if new.seconds - sample.seconds <= WINDOW), self.samples[0])
        if old is new:
            old = self.samples[-2]
        return max(0.0, (new.computed - old.computed) / (new.seconds - old.seconds))

    @property
    def eta(self) -> float | None:
        """Seconds to go; None where no recent rate is known."""
        left = self.total - self.done - len(self.failed)
        return 0.0 if left <= 0 else left / self.recent_rate if self.recent_rate else None

    @property
    def busy(self) -> float | None:
        """Share of the time since they were ready that the actors' devices computed; None before any actor was ready."""
        ready = self.sum_of("up")
        return min(1.0, self.sum_of("busy") / ready) if ready else None

    def status(self) -> dict[str, Any]:
        """How far this expert is, as `mova precompute status` shows."""
        return {
            "done": self.done,
            "total": self.total,
            "failed": len(self.failed),
            "images_per_second": _rounded(self.images_per_second, 2),
            "eta_seconds": _rounded(self.eta, 0),
            "queue": self.pending,
            "actors": self.actors,
            "bytes": self.bytes,
            "busy": _rounded(self.busy, 3),
            "pools": self.pools,
        }

    def summary(self) -> dict[str, Any]:
        """What this expert did in the run."""
        computed = self.sum_of("computed")
        return {
            "computed": self.computed,
            "reused": self.reused,
            "quarantined": len(self.failed),
            # Computed and not stored: by actors that died before they wrote the shard.
            "lost": max(0, computed - self.computed - len(self.failed)),
            "bytes": self.bytes,
            "seconds": round(self.seconds, 2),
            "images_per_second": _rounded(self.images_per_second, 2),
            "busy": _rounded(self.busy, 3),
            "prepare_ms": round(1000 * self.sum_of("prepare") / computed, 2) if computed else None,
            "compute_ms": round(1000 * self.sum_of("busy") / computed, 2) if computed else None,
            "splits": self.sum_of("splits"),
            "restarts": max(0, len(self.workers) - self.started),
            "actors": [[round(sample.seconds, 1), sample.actors] for sample in changes(self.samples)],
            "pools": self.pools,
        }


def _rounded(value: float | None, digits: int) -> float | int | None:
    return None if value is None else round(value, digits or None)


def changes(samples: list[Sample]) -> list[Sample]:
    """The samples at which the number of actors changed."""
    return [sample for index, sample in enumerate(samples) if not index or sample.actors != samples[index - 1].actors]


class RunLog:
    """Follows a run: each call of `sample`, about once a second, draws the bars, sets Ray's metrics and keeps a sample."""

    def __init__(self, job: str, store: str, experts: Mapping[str, ExpertLog], show: bool):
        self.job, self.store, self.experts, self.show = job, store, dict(experts), show
        self.began = time.monotonic()
        self.events: list[tuple[float, str]] = []
        self._every = 0.0  # seconds between samples that are kept
        self._last_line = self.began
        self._metrics = {
            name: Gauge(f"mova_precompute_{name}", description=text, tag_keys=("job", "expert"))
            for name, text in _METRICS.items()
        }
        self._bars: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.began

    def event(self, text: str) -> None:
        """Something that happened: a line beside the bars, and a mark in the picture."""
        self.events.append((self.seconds, text))
        self.line(f"{self.job}: {text}")

    def line(self, text: str) -> None:
        """A line beside the bars."""
        if self.show:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def sample(self) -> None:
        """Records how every expert stands now."""
        now = self.seconds
        for log in self.experts.values():
            new = Sample(now, max(log.sum_of("computed"), log.computed), log.actors)
            if len(log.samples) > 1 and log.samples[-1].seconds - log.samples[-2].seconds < self._every:
                log.samples[-1] = new  # the last sample is always of now
            else:
                log.samples.append(new)
            if len(log.samples) > SAMPLES:
                del log.samples[1:-1:2]
                self._every = 2 * now / SAMPLES
        self._draw()
        for name, log in self.experts.items():
            for metric, value in log.status().items():
                if metric in self._metrics and value is not None:
                    self._metrics[metric].set(value, {"job": self.job, "expert": name})

    def status(self) -> dict[str, Any]:
        """How far the run is, as `mova precompute status` shows."""
        experts = {name: log.status() for name, log in self.experts.items()}
        return {"job": self.job, "store": self.store, "seconds": round(self.seconds, 1), "experts": experts}

    def _draw(self) -> None:
        if not self.show:
            return
        if sys.stderr.isatty():
            for name, log in self.experts.items():
                if log.total == log.reused:
                    continue
                if name not in self._bars:
                    self._bars[name] = progress_bar(log.total, name, "images")
                    self._bars[name].initial = self._bars[name].n = log.done
                bar = self._bars[name]
                if log.actors and bar.n == bar.initial:
                    bar.unpause()  # the rate is that of the work, without the start of the actors
                bar.set_postfix_str(_beside(log), refresh=False)
                bar.update(log.done - bar.n)
        elif time.monotonic() - self._last_line >= LINES:
            self._last_line = time.monotonic()
            for name, log in self.experts.items():
                if log.done + len(log.failed) < log.total:
                    eta = "?" if log.eta is None else f"{number(round(log.eta))} s"
                    self.line(
                        f"{self.job}: {name} {number(log.done)} of {number(log.total)} features, "
                        f"{number(log.recent_rate)} images/s, {eta} to go, {_beside(log)}"
                    )

    def close(self) -> None:
        """Records a last sample and removes the bars."""
        self.sample()
        for bar in self._bars.values():
            bar.close()


def _beside(log: ExpertLog) -> str:
    busy = "" if log.busy is None else f", {percent(log.busy)} busy"
    return f"{log.actors} actors{busy}, {log.pending} blocks wait, {number(log.bytes / 2**20)} MiB written"

"""What is known of a precompute run while it goes on and afterwards: bars, lines, Ray metrics, the summary and a picture."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ray.util.metrics import Gauge

from pipelines.progress_bar import progress_bar

WINDOW = 15.0  # seconds over which a rate is taken
LINES = 15.0  # seconds between two lines where there is no terminal
SAMPLES = 1000  # per expert, at most: a longer run is sampled more seldom

_METRICS = {
    "done": "Features that are in the store, of those wanted.",
    "total": "Features wanted.",
    "images_per_second": "Pictures computed per second.",
    "eta_seconds": "Seconds until all wanted features are there, at the present rate.",
    "queue": "Blocks of shards that wait for an actor.",
    "actors": "Actors that work.",
    "bytes": "Bytes written.",
    "busy": "Share of their time that the actors' devices computed, 0 to 1.",
}


class Sample(NamedTuple):
    """How things stood at one moment of a run."""

    seconds: float  # since the run began
    computed: int  # pictures
    actors: int
    busy: float  # seconds that all devices together computed
    worked: float  # seconds that all actors together were up


@dataclass(kw_only=True)
class ExpertLog:
    """One expert's part of a run. Counts are features."""

    total: int  # wanted, those in quarantine left out
    reused: int = 0
    computed: int = 0
    bytes: int = 0
    failed: dict[str, dict[str, str]] = field(default_factory=dict)  # key -> {"image", "key", "reason"}
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each told last
    started: int = 0  # actors that were asked for
    actors: int = 0
    queue: int = 0
    pools: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    first: float | None = None  # seconds since the run began when an actor was up, and when the last shard was done
    last: float = 0.0

    def of_servers(self, what: str) -> Any:
        """A sum over all servers of this run, those that died too."""
        return sum(load[what] for load in self.servers.values())

    @property
    def done(self) -> int:
        """Those in the store, as far as is known."""
        return min(self.total, self.reused + max(self.computed, self.of_servers("stored")))

    @property
    def rate(self) -> float:
        """Pictures per second of late."""
        if len(self.samples) < 2:
            return 0.0
        new = self.samples[-1]
        old = next((one for one in self.samples if new.seconds - one.seconds <= WINDOW), self.samples[0])
        if old is new:
            old = self.samples[-2]
        return max(0.0, (new.computed - old.computed) / (new.seconds - old.seconds))

    @property
    def eta(self) -> float | None:
        """Seconds to go; None where that cannot be told."""
        left = self.total - self.done - len(self.failed)
        return 0.0 if left <= 0 else left / self.rate if self.rate else None

    @property
    def busy(self) -> float | None:
        """Share of their time that its devices computed, of the whole run; None before any actor was up."""
        worked = self.samples[-1].worked if self.samples else 0.0
        return min(1.0, self.of_servers("busy") / worked) if worked else None

    def now(self) -> dict[str, Any]:
        """How it stands, as `mova precompute status` shows it."""
        return {
            "done": self.done,
            "total": self.total,
            "failed": len(self.failed),
            "images_per_second": round(self.rate, 2),
            "eta_seconds": None if self.eta is None else round(self.eta),
            "queue": self.queue,
            "actors": self.actors,
            "bytes": self.bytes,
            "busy": None if self.busy is None else round(self.busy, 3),
            "pools": self.pools,
        }

    def summary(self) -> dict[str, Any]:
        """What came of it. Seconds are from its first actor that was up to its last shard."""
        seconds = max(0.0, self.last - self.first) if self.first is not None else 0.0
        computed = self.of_servers("computed")
        return {
            "computed": self.computed,
            "reused": self.reused,
            "quarantined": len(self.failed),
            "lost": max(
                0, computed - self.computed - len(self.failed)
            ),  # computed, and not stored: by actors that died
            "bytes": self.bytes,
            "seconds": round(seconds, 2),
            "images_per_second": round(self.computed / seconds, 2) if seconds else None,
            "busy": None if self.busy is None else round(self.busy, 3),
            "prepare_ms": round(1000 * self.of_servers("prepare") / computed, 2) if computed else None,
            "compute_ms": round(1000 * self.of_servers("busy") / computed, 2) if computed else None,
            "splits": self.of_servers("splits"),
            "restarts": max(0, len(self.servers) - self.started),
            "actors": [[round(one.seconds, 1), one.actors] for one in changes(self.samples)],
            "pools": self.pools,
        }


def changes(samples: list[Sample]) -> list[Sample]:
    """Those at which the number of actors changed."""
    return [one for at, one in enumerate(samples) if not at or one.actors != samples[at - 1].actors]


class RunLog:
    """Follows a run: `sample` about twice a second, and it draws, tells Ray's metrics and remembers."""

    def __init__(self, job: str, store: str, experts: Mapping[str, ExpertLog], show: bool):
        self.job, self.store, self.experts, self.show = job, store, dict(experts), show
        self.began = time.monotonic()
        self.events: list[tuple[float, str]] = []
        self._every = 0.0  # seconds between samples that are kept
        self._told = self.began
        self._metrics = {
            name: Gauge(f"mova_precompute_{name}", description=text, tag_keys=("job", "expert"))
            for name, text in _METRICS.items()
        }
        self._bars: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def say(self, line: str) -> None:
        """Something that happened: a line beside the bars, and a mark in the picture."""
        self.events.append((self.seconds, line))
        self.tell(line)

    def tell(self, line: str) -> None:
        """A line beside the bars."""
        if self.show:
            from tqdm import tqdm

            tqdm.write(f"{self.job}: {line}", file=sys.stderr)

    def sample(self) -> None:
        """Takes down how every expert stands now."""
        now = self.seconds
        for log in self.experts.values():
            old = log.samples[-1] if log.samples else Sample(now, 0, 0, 0.0, 0.0)
            if log.actors and log.first is None:
                log.first = now
            worked = old.worked + (now - old.seconds) * (log.actors + old.actors) / 2
            new = Sample(now, max(log.of_servers("computed"), log.computed), log.actors, log.of_servers("busy"), worked)
            if len(log.samples) > 1 and log.samples[-1].seconds - log.samples[-2].seconds < self._every:
                log.samples[-1] = new  # the last one is always of now
            else:
                log.samples.append(new)
            if len(log.samples) > SAMPLES:
                del log.samples[1:-1:2]
                self._every = 2 * now / SAMPLES
        self._draw()
        for name, log in self.experts.items():
            for metric, value in log.now().items():
                if metric in self._metrics and value is not None:
                    self._metrics[metric].set(value, {"job": self.job, "expert": name})

    def now(self) -> dict[str, Any]:
        """How the run stands."""
        experts = {name: log.now() for name, log in self.experts.items()}
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
                if log.first is not None and bar.n == bar.initial:
                    bar.unpause()  # the rate is that of the work, without the start of the actors
                bar.set_postfix_str(_beside(log), refresh=False)
                bar.update(log.done - bar.n)
        elif time.monotonic() - self._told >= LINES:
            self._told = time.monotonic()
            for name, log in self.experts.items():
                if log.done + len(log.failed) < log.total:
                    eta = "?" if log.eta is None else f"{log.eta:,.0f} s"
                    self.tell(
                        f"{name} {log.done:,} of {log.total:,} features, {log.rate:.1f} images/s, {eta} to go, {_beside(log)}"
                    )

    def close(self) -> None:
        """Takes the bars away, after a last look."""
        self.sample()
        for bar in self._bars.values():
            bar.close()


def _beside(log: ExpertLog) -> str:
    busy = "" if log.busy is None else f", {log.busy:.0%} busy"
    return f"{log.actors} actors{busy}, {log.queue} blocks wait, {log.bytes / 2**20:,.0f} MiB written"


def draw_run(log: RunLog, path: str | Path) -> None:
    """Draws images per second and actors over time, per expert, to a PNG (or what the suffix says)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (rates, sizes) = plt.subplots(
        2, 1, sharex=True, figsize=(10, 6), height_ratios=(3, 2), layout="constrained"
    )
    colors = plt.get_cmap("tab10")
    drawn = [(name, one) for name, one in log.experts.items() if len(one.samples) > 1 and one.first is not None]
    for number, (name, one) in enumerate(drawn):
        seconds = np.array([sample.seconds for sample in one.samples])
        computed = np.array([sample.computed for sample in one.samples], float)
        actors = np.array([sample.actors for sample in one.samples])
        width = max(2.0, seconds[-1] / 40)  # a rate over a moving window: shards and batches come in steps
        before = np.interp(np.maximum(seconds - width, 0), seconds, computed)
        rate = (computed - before) / np.maximum(np.minimum(seconds, width), 1e-9)
        rate[rate <= 0] = np.nan
        rates.plot(seconds, rate, color=colors(number), label=name, linewidth=1.6)
        # Beside each other, not upon: equal pools would hide one another.
        sizes.step(
            seconds,
            actors + 0.05 * number * (actors > 0),
            where="post",
            color=colors(number),
            label=name,
            linewidth=1.6,
        )
    for at, text in log.events:
        for axes in (rates, sizes):
            axes.axvline(at, color="0.6", linewidth=0.8, linestyle=":")
        rates.annotate(
            text[:60],
            (at, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=6,
            color="0.3",
            ha="right",
            va="bottom",
        )
    if drawn:
        rates.set_yscale("log")
        rates.yaxis.set_major_formatter("{x:g}")
        rates.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    rates.set_ylabel("images/s")
    sizes.set_ylabel("actors")
    sizes.set_ylim(bottom=0)
    sizes.yaxis.get_major_locator().set_params(integer=True)
    sizes.set_xlabel("seconds since the run began")
    rates.set_title(f"mova precompute, run {log.job}", loc="left")
    for axes in (rates, sizes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Progress of work in other processes: they report to an actor, and a bar on the driver's terminal follows that actor."""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.progress_bar import progress_bar

REPORT_SECONDS = 0.2  # a worker reports at most this often: a training step may take a millisecond
POLL_SECONDS = 0.5


class Progress(NamedTuple):
    """How far some work is."""

    done: int = 0
    total: int | None = None
    note: str = ""  # written behind the bar, e.g. the loss


class ProgressActor:
    """Holds the last report of the workers, and whether they shall stop."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.stopping = False

    def report(self, done: int, total: int, note: str) -> bool:
        """Returns whether the workers shall stop."""
        self.progress = Progress(done, total, note)
        return self.stopping

    def read(self) -> Progress:
        return self.progress

    def stop(self) -> None:
        self.stopping = True


class ProgressReporter:
    """Reports to a `ProgressActor` without waiting for it. Can be pickled and sent to the workers."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._reported_at = 0.0
        self._answer: Any = None  # to the last report
        self._stop = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ProgressReporter, (self.actor,)

    def report(self, done: int, total: int, note: str = "") -> bool:
        """Reports `done` of `total`; drops reports that follow another within `REPORT_SECONDS`, except the last one.

        Returns:
            Whether `stop` was called, as an earlier report was answered: nobody waits for the answer to this one.
        """
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop, self._answer = ray.get(self._answer), None
        now = time.monotonic()
        if done >= total or now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            self._answer = self.actor.report.remote(done, total, note)
        return self._stop

    def stop(self) -> None:
        """Asks the workers to stop."""
        ray.get(self.actor.stop.remote())


@contextlib.contextmanager
def follow_progress(what: str, unit: str, show: bool = True) -> Iterator[ProgressReporter]:
    """Draws a bar of what workers report while the body runs. Needs an open Ray session.

    Args:
        what: label before the bar.
        unit: of the counts, e.g. "steps".
        show: False draws nothing (`--quiet`, `--json`); the reporter works all the same.

    Yields:
        The reporter for the workers.
    """
    # The actor takes no CPU and lives on the driver's node, so no other node's death ends it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(ProgressActor).options(num_cpus=0, scheduling_strategy=here).remote()
    ended = threading.Event()

    def draw(bar: Any) -> None:
        progress = Progress(*ray.get(actor.read.remote()))
        bar.total = progress.total
        bar.set_postfix_str(progress.note, refresh=False)
        bar.update(progress.done - bar.n)

    def follow() -> None:
        with progress_bar(None, what, unit) as bar, contextlib.suppress(ray.exceptions.RayError):
            while not ended.wait(POLL_SECONDS):
                draw(bar)
            draw(bar)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    if show:
        thread.start()
    try:
        yield ProgressReporter(actor)
    finally:
        ended.set()
        if show:
            thread.join()
        ray.kill(actor)

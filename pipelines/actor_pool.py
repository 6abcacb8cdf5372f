"""Rows through a pool of actors: the one way the pipelines use Ray Data."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback  # what the public DataContext takes
from ray.data.exceptions import ExecutionTimeoutError

from pipelines.progress import progress_bar

_stopping = threading.Event()


class Stopped(ExecutionTimeoutError):  # of a kind for which Ray Data prints no stack trace
    """An execution was asked to stop."""


class StopWhenAsked(ExecutionCallback):
    """Ends an execution from within, between two steps: one still running would use Ray while Ray is closed."""

    def on_execution_step(self, executor: Any) -> None:
        if _stopping.is_set():
            raise Stopped("the run was stopped")


@contextlib.contextmanager
def executions_stopped() -> Iterator[None]:
    """Within it every execution of this process, of whatever thread, ends its actors and raises `Stopped` in a second or two."""
    _stopping.set()
    try:
        yield
    finally:
        _stopping.clear()


def through_actors(
    worker: type,
    rows: Sequence[Mapping[str, Any]],
    *,
    arguments: Mapping[str, Any],
    total: int,
    what: str,
    unit: str,
    progress: bool,
    batch_size: int = 1,
    sizes: tuple[int, int] = (1, 1),
    cpus: float | None = None,
    gpus: float = 0.0,
    memory: int = 0,
    accelerator: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the rows that `worker` makes of `rows`, as they come, with a progress bar over `total` of them.

    Args:
        worker: class whose instances take and give an Arrow table.
        arguments: of its constructor.
        batch_size: rows per call.
        sizes: least and most actors.
        cpus, gpus: held by each actor; default one CPU, or a quarter beside a GPU.
        memory: bytes of the node's memory held by each actor; 0 where it is not known.
        accelerator: Ray's accelerator-type label.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours shows features, not blocks
    context.custom_execution_callback_classes = [StopWhenAsked]
    context.raise_original_map_exception = True  # its message is for the user; Ray's own wrapper hides it
    blocks = max(1, len(rows) // batch_size)
    dataset = ray.data.from_items([dict(row) for row in rows], override_num_blocks=blocks).map_batches(
        worker,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=min(sizes[0], blocks), max_size=min(sizes[1], blocks)),
        fn_constructor_kwargs=dict(arguments),
        num_cpus=cpus if cpus is not None else (0.25 if gpus else 1.0),
        num_gpus=gpus or None,
        memory=memory or None,
        accelerator_type=accelerator,
    )
    with progress_bar(total, what, unit, progress) as bar:
        for row in dataset.iter_rows():
            if bar.n == 0:
                bar.unpause()  # the rate is that of the work, without the start of the actors
            bar.update()
            yield row

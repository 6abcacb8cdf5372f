"""Maps blocks through a pool of actors: all pipelines use Ray Data by these functions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from pipelines.errors import root_cause
from pipelines.progress_bar import progress_bar

BLOCKS = 2048  # at most: Ray Data's driver keeps a few kilobytes per block


def run_actor_pool(
    worker: type,
    blocks: Sequence[pa.Table],
    *,
    arguments: Mapping[str, Any],
    size: int = 1,
    batch_size: int = 1,
    calls: int = 1,
    cpus: float | None = None,
    gpus: float = 0.0,
    memory: int = 0,
    accelerator: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Passes blocks through a pool of actors and yields the rows that the actors return, as they come.

    Only this Dataset's `DataContext` is changed, so other Datasets of the process are not affected.

    Args:
        worker: class whose instances take an Arrow table and return a table or yield several.
        blocks: Arrow tables.
        arguments: of the worker's constructor.
        size: actors. Ray restarts an actor that dies and calls it again with the blocks it had.
        batch_size: rows per call of the worker.
        calls: calls at once on each actor; more than one needs a worker that is safe for several threads.
        cpus, gpus: held by each actor; default one CPU, or a quarter beside a GPU.
        memory: bytes of the node's memory held by each actor; 0: unknown.
        accelerator: Ray's accelerator type of the nodes to run on, e.g. "A100".
    """
    dataset = ray.data.from_arrow(list(blocks)).map_batches(
        worker,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=size,
            # Two tasks per actor, so that no actor waits for the driver; with more, a slow actor would delay the end.
            max_tasks_in_flight_per_actor=max(2, calls),
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        fn_constructor_kwargs=dict(arguments),
        num_cpus=cpus if cpus is not None else (0.25 if gpus else 1.0),
        num_gpus=gpus or None,
        memory=memory or None,
        accelerator_type=accelerator,
    )
    context = dataset.context  # of this Dataset only
    context.enable_progress_bars = False  # our own bar counts features, not blocks
    context.raise_original_map_exception = True  # else Ray Data's wrapper hides our message
    context.max_consecutive_actor_init_deaths = 1  # an actor killed while it starts, e.g. with its node, is replaced
    context.execution_no_progress_timeout_s = -1  # one shard of a slow expert may take longer than Ray's half hour
    try:
        yield from dataset.iter_rows()
    except Exception as error:
        cause = root_cause(error)
        if cause.args and isinstance(cause.args[0], str):  # Ray Data appends advice on settings that mova does not have
            cause.args = (cause.args[0].partition("\nFailed to apply UDF transform")[0], *cause.args[1:])
        raise


def map_with_actors(
    worker: type,
    rows: Sequence[Mapping[str, Any]],
    *,
    arguments: Mapping[str, Any],
    total: int,
    what: str,
    unit: str,
    progress: bool,
    batch_size: int = 1,
    actors: int = 1,
    gpus: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Yields the rows that `worker` returns for `rows`, as they come, with a progress bar over `total` of them.

    Args:
        worker, arguments, batch_size, gpus: as `run_actor_pool` takes them.
        actors: of the pool; at most one per block of rows is started.
    """
    if not rows:
        return
    table = pa.Table.from_pylist([dict(row) for row in rows])
    block_rows = max(batch_size, -(-len(rows) // BLOCKS))
    blocks = [table.slice(start, block_rows) for start in range(0, len(rows), block_rows)]
    size = min(actors, len(blocks))
    computed = run_actor_pool(worker, blocks, arguments=arguments, size=size, batch_size=batch_size, gpus=gpus)
    with progress_bar(total, what, unit, progress) as bar:
        for row in computed:
            if bar.n == 0:
                bar.unpause()  # the rate excludes the start of the actors
            bar.update()
            yield row

"""Work through a pool of actors: the one way the pipelines use Ray Data."""

import contextlib
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback  # what the public DataContext takes
from ray.data.exceptions import ExecutionTimeoutError

from pipelines.errors import root_cause
from pipelines.progress_bar import progress_bar

_stopping = threading.Event()
_running: dict[str, "Execution"] = {}  # Ray Data ships its context to every worker, so that can only name them


class Stopped(ExecutionTimeoutError):  # of a kind for which Ray Data prints no stack trace
    """An execution was asked to stop."""


class Steering(ExecutionCallback):
    """Reaches into an execution between two of its steps, on its own thread: Ray Data has no other way to change one."""

    def on_execution_step(self, executor: Any) -> None:
        if _stopping.is_set():  # one still running would use Ray while Ray is closed
            raise Stopped("the run was stopped")
        if (execution := _running.get(executor._data_context.get_config("mova_execution", ""))) is not None:
            execution.steer(executor._topology)


@contextlib.contextmanager
def executions_stopped() -> Iterator[None]:
    """Within it every execution of this process, of whatever thread, ends its actors and raises `Stopped` in a second or two."""
    _stopping.set()
    try:
        yield
    finally:
        _stopping.clear()


class Execution:
    """One Ray Data execution of `worker` over blocks. Other threads may watch it, resize it and end it while it runs.

    Args:
        worker: class whose instances take an Arrow table and give one, or several one after the other.
        blocks: Arrow tables.
        arguments: of the worker's constructor.
        size: actors to begin with, at least 1; at most one per block is started.
        batch_size: rows per call of the worker.
        calls: calls at once on each actor; for more than one the worker must bear several threads.
        cpus, gpus: held by each actor; default one CPU, or a quarter beside a GPU.
        memory: bytes of the node's memory held by each actor; 0 where it is not known.
        accelerator: Ray's accelerator-type label.

    Attributes:
        size: actors it shall have. More are started at once; fewer never take one from work under way, so to shrink a
            pool with much to do end it and start another.
        actors, starting, restarting: that answer, that have yet to start for the first time, that start again.
        waiting: blocks no actor has been given.
        stuck: whether nothing goes on before an actor has started again, which keeps the blocks it was given.
    """

    def __init__(
        self,
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
    ):
        self.size = min(size, len(blocks))
        self.actors = self.starting = self.restarting = 0
        self.waiting = len(blocks)
        self.stuck = False
        self._lost = ""
        self._most = len(blocks)
        self._ending = False
        self._name = uuid.uuid4().hex
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # ours shows features, not blocks
        context.custom_execution_callback_classes = [Steering]
        context.raise_original_map_exception = True  # its message is for the user; Ray's own wrapper hides it
        context.max_consecutive_actor_init_deaths = 1  # killed while it starts, e.g. with its node: start another
        self._rows = ray.data.from_arrow(list(blocks)).map_batches(
            worker,
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=self.size,
                # So that an actor is never idle; more in one's hands make a long end where actors differ.
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
        self._rows.context.set_config("mova_execution", self._name)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Runs it and yields what the workers give, as it comes. Once only."""
        _running[self._name] = self
        try:
            yield from self._rows.iter_rows()
        except Exception as error:
            cause = root_cause(error)
            if cause.args and isinstance(cause.args[0], str):  # Ray Data adds advice on settings that nobody has here
                cause.args = (cause.args[0].partition("\nFailed to apply UDF transform")[0], *cause.args[1:])
            raise
        finally:
            del _running[self._name]
            self.actors = self.starting = self.restarting = 0

    def end(self) -> None:
        """Gives no further block to an actor; `rows` ends when those given before are done."""
        self._ending = True

    def give_up(self, why: str) -> None:
        """Ends it at once, with a `Stopped` for that reason; what its actors have in hand is lost."""
        self._lost = why

    def steer(self, topology: Mapping[Any, Any]) -> None:
        """Carries out on Ray Data's operators what was asked for. Called by Ray Data's own thread."""
        if self._lost:
            raise Stopped(self._lost)
        for operator, state in topology.items():
            for pool in operator.get_autoscaling_actor_pools():
                if self._ending:
                    for queue in state.input_queues:
                        queue.clear()
                size = min(self.size, self._most)
                if pool.min_size() != size or pool.max_size() != size:  # Ray Data then starts or ends the difference
                    pool._config = replace(pool._config, min_size=size, max_size=size, initial_size=size)
                told = pool.get_actor_info()
                self.actors, self.starting, self.restarting = told.running, told.pending, told.restarting
                self.waiting = state.total_enqueued_input_blocks()
                idle = not self.actors or (not self.waiting and told.active <= told.restarting)
                self.stuck = told.restarting > 0 and idle


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
    """Yields the rows that `worker` makes of `rows`, as they come, with a progress bar over `total` of them.

    Args:
        worker, arguments, batch_size, gpus: as `Execution` takes them.
        actors: that work side by side.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows])
    size = max(batch_size, -(-len(rows) // 2048))
    blocks = [table.slice(at, size) for at in range(0, len(rows), size)]
    if not blocks:
        return
    execution = Execution(worker, blocks, arguments=arguments, size=actors, batch_size=batch_size, gpus=gpus)
    with progress_bar(total, what, unit, progress) as bar:
        for row in execution.rows():
            if bar.n == 0:
                bar.unpause()  # the rate is that of the work, without the start of the actors
            bar.update()
            yield row

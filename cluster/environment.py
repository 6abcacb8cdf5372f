"""Environment variables that Ray and its workers read when they start.

Importing a module of this project sets none: `ray_session` sets those of the workers while it is open, and the `mova`
command, which owns its process, sets those that Ray reads when it is imported.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

# Inherited by every process that Ray starts on this machine.
WORKERS: Mapping[str, str] = {
    # By default glibc returns every freed tensor to the system and faults its pages in again for the next tensor.
    # 32 MiB is the largest threshold that glibc takes.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # one bar per worker that loads a model fills the terminal
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray Data logs an "error" for each actor pool (ray#53727)
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # errors of Ray Data reach the caller as exceptions
    # Else Ray prints the traceback of each call that failed and whose result was not read before the run ended.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
# For a cluster that `ray_session` starts: no node of it is preempted, and the watcher is one more process per training.
OWN_CLUSTER: Mapping[str, str] = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# Read when Ray or huggingface_hub is imported.
COMMAND: Mapping[str, str] = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # else a thread that outlives the session starts another cluster
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def set_for_command() -> None:
    """Sets what a command needs before it imports Ray; variables that the user set stay."""
    for name, value in COMMAND.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables while it is open and removes them at the end; variables that the user set stay as they are."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)

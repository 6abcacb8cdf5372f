"""The Ray session a command works in: the cluster it was submitted to, or one of its own on this machine."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Read by Ray at import and when a process starts, so they stand before the import.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")  # its errors come as exceptions
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives a session must not start another
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one bar per worker that loads a model is noise
# glibc gives every freed tensor back to the system and faults its pages in again for the next; 32 MiB is its limit.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 * 2**20))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(256 * 2**20))
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data logs an "error" per actor pool (ray#53727)
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process per run, for what no worker here asks
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # a cluster started here answers nobody else on this machine

import ray

LOCAL_CPUS = 4  # least slots of a cluster on this machine: three actors side by side and one for reading tasks


class SessionError(RuntimeError):
    """No Ray cluster answers, or it refuses; the message says what to check."""


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None, start: bool = True) -> Iterator[dict[str, Any]]:
    """Connects to the cluster that RAY_ADDRESS names, or starts one on this machine and stops it at the end.

    Args:
        num_cpus: CPU slots of a cluster started here; default its cores, at least `LOCAL_CPUS`.
        start: whether to start one; else without RAY_ADDRESS it connects to the one last started on this machine.

    Yields:
        The cluster's resources. A session that is already open is used and left open.

    Raises:
        SessionError: no cluster answers.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    own: dict[str, Any] = {}
    if not start:
        own = {"address": os.environ.get("RAY_ADDRESS", "auto")}
    elif not os.environ.get("RAY_ADDRESS"):
        cpus = num_cpus or max(LOCAL_CPUS, os.cpu_count() or 1)
        own = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with _quiet():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **own)  # errors of workers come as exceptions
    except (ConnectionError, RuntimeError) as error:
        if own.get("address") == "local":  # this machine could not start one
            raise
        where = os.environ.get("RAY_ADDRESS") or "this machine"
        raise SessionError(
            f"no Ray cluster answers at {where} ({str(error).splitlines()[0]}): check RAY_ADDRESS, and that "
            f"RAY_AUTH_MODE is what the cluster was started with (here: {os.environ.get('RAY_AUTH_MODE', 'not set')})"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own there, which ends without cleaning up
    try:
        yield ray.cluster_resources()
    finally:
        with _quiet():  # executions that were interrupted complain that their cluster is gone
            ray.shutdown()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Ray says on the terminal meanwhile; what fails comes as an exception."""
    sys.stderr.flush()
    with contextlib.redirect_stdout(sys.stderr), open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)

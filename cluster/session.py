"""The Ray session of a command: a connection to the cluster it was submitted to, or a cluster of its own."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray

from cluster.environment import OWN_CLUSTER, WORKERS, environment

LOCAL_CPUS = 4  # fewest CPU slots of a cluster started here: three concurrent actors and one reading task


class SessionError(RuntimeError):
    """No Ray cluster answers, or it refuses the connection; the message says what to check."""


@contextlib.contextmanager
def ray_session(num_cpus: int | None = None, start: bool = True) -> Iterator[dict[str, Any]]:
    """Connects to the cluster that RAY_ADDRESS names, or starts one on this machine and stops it at the end.

    A cluster started here takes connections only with the token that Ray keeps in ~/.ray/auth_token (the default of
    `ray.init`; RAY_AUTH_MODE=disabled turns that off).

    Args:
        num_cpus: CPU slots of a cluster started here; default its cores, at least `LOCAL_CPUS`.
        start: whether to start a cluster where RAY_ADDRESS names none. False: connect to the one that was last
            started on this machine.

    Yields:
        The cluster's resources, as `ray.cluster_resources()` returns them. A session that is already open is used and
        left open.

    Raises:
        SessionError: no cluster answers at RAY_ADDRESS, or it refuses the connection.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    arguments: dict[str, Any] = {}
    starts_cluster = start and not os.environ.get("RAY_ADDRESS")
    if starts_cluster:
        cpus = num_cpus or max(LOCAL_CPUS, os.cpu_count() or 1)
        arguments = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    elif not start:
        arguments = {"address": os.environ.get("RAY_ADDRESS", "auto")}
    with environment({**WORKERS, **(OWN_CLUSTER if starts_cluster else {})}), _ray_data_logs_nothing():
        _connect(arguments)
        try:
            yield ray.cluster_resources()
        finally:
            with stderr_dropped():  # interrupted executions report that their cluster is gone
                ray.shutdown()


def _connect(arguments: dict[str, Any]) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with stderr_dropped():
            ray.init(logging_level=logging.ERROR, log_to_driver=False, **arguments)  # workers' errors raise exceptions
    except (ConnectionError, RuntimeError) as error:
        if arguments.get("address") == "local":  # this machine could not start a cluster
            raise
        where = os.environ.get("RAY_ADDRESS") or "this machine"
        raise SessionError(
            f"no Ray cluster answers at {where} ({str(error).splitlines()[0]}): check RAY_ADDRESS, and that "
            f"RAY_AUTH_MODE is what the cluster was started with (here: {os.environ.get('RAY_AUTH_MODE', 'not set')})"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray installs a handler that ends the process without cleaning up


@contextlib.contextmanager
def _ray_data_logs_nothing() -> Iterator[None]:
    """Silences Ray Data in this process, which reads RAY_DATA_LOG_LEVEL only when it is imported."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(os.environ["RAY_DATA_LOG_LEVEL"])
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def stderr_dropped() -> Iterator[None]:
    """Drops what this process and Ray's C++ threads write to stderr while it is open; failures still raise exceptions."""
    sys.stderr.flush()
    with contextlib.redirect_stdout(sys.stderr), open(os.devnull, "wb") as devnull:
        stderr = os.dup(2)
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)

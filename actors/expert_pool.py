"""ExpertPool: live expert feature servers as a FeatureSource, one Ray Serve application per expert.

Serve owns the servers: it starts, watches, replaces, scales and drains the replicas of each expert separately. The pool is
a client: it spreads images over requests, retries requests that were refused or lost, and computes nothing twice at a time.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from math import ceil
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.api import RunTarget
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_fixed

from actors.expert_deployment import LOGGING, ExpertDeploymentConfig
from actors.expert_server import ServerBusy, ServerError
from actors.ray_metrics import RayTelemetry
from mova_core.experts import Features
from mova_core.features.single_flight import SingleFlight
from mova_core.features.source import wanted_by_expert
from mova_core.images import ImageError, ImageRef
from mova_core.telemetry import Telemetry

__all__ = ["ExpertDeploymentConfig", "ExpertPool"]

REQUEST_IMAGES = 32  # most images per request: a server refuses a request as a whole
REQUEST_THREADS = 64  # requests that a pool has under way; further fetches wait for a thread
STATUS_SECONDS = 2.0  # between looks at Serve's status while an expert does not answer
_ALIVE = (ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY)
_NOT_DEPLOYED = ApplicationStatusOverview(
    status=ApplicationStatus.NOT_STARTED, message="", last_deployed_time_s=0, deployments={}
)

# Ray 2.60 builds a deployment's config under a process-wide mark of cloudpickle (`register_pickle_by_value`) and raises
# ValueError where another thread has removed the mark. This lock covers the threads of all pools; threads of Serve and of
# other code can still interfere, so a ValueError is retried, and raised if it stays.
_building = threading.Lock()
_retry_building = Retrying(
    retry=retry_if_exception_type(ValueError), stop=stop_after_attempt(5), wait=wait_fixed(0.05), reraise=True
)


class ExpertPool:
    """Features from live servers. Needs an open Ray session; an expert's servers start when it is first needed.

    The images of one request share the servers' batches with those of all other callers. Two callers in this process
    that want the same feature at the same time have it computed once. A request that a server refuses, or whose server
    dies, is retried on another server. Any number of threads may use a pool at once.

    Serve starts with the first expert if it does not run yet, and then without HTTP, which a pool does not need and Serve
    cannot add later. Where the same cluster shall also serve HTTP, call `ray.serve.start(http_options=...)`, or deploy the
    HTTP application, before the first expert of a pool starts; a pool joins a Serve instance that runs.

    Args:
        experts: name -> how the expert is served.
        name: the application of an expert is called <name>-<expert>-<version>. Pools of one name, in any process, share
            the servers whose version is equal, i.e. all settings but the number of replicas. A pool whose version of an
            expert is new starts servers of its own, and ends those of other versions when its own run.
        patience: seconds for which a request is retried while every queue is full or its servers die.
        answer_within: seconds after which a request without an answer counts as lost; includes the start of servers.
        hedge_after_ms: milliseconds after which a second server is asked too, and the faster answer counts; None: never.
        telemetry: takes the pool's numbers; default Ray's metrics.
    """

    def __init__(
        self,
        experts: Mapping[str, ExpertDeploymentConfig],
        *,
        name: str = "experts",
        patience: float = 60.0,
        answer_within: float = 900.0,
        hedge_after_ms: float | None = None,
        telemetry: Telemetry | None = None,
    ):
        self.experts = dict(experts)
        self.name = name
        self.patience, self.answer_within = patience, answer_within
        self.hedge_after = None if hedge_after_ms is None else hedge_after_ms / 1000
        self._telemetry: Telemetry = RayTelemetry() if telemetry is None else telemetry
        self._handles: dict[str, DeploymentHandle] = {}
        self._identities: dict[str, dict[str, Any]] = {}
        self._single_flight: SingleFlight[tuple[str, str], Features | ImageError] = SingleFlight()
        self._requests = ThreadPoolExecutor(REQUEST_THREADS, thread_name_prefix=f"{name}-request")
        self._cleanup = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-cleanup")
        self._closed = threading.Event()
        self._lock = threading.RLock()
        self._in_flight = dict.fromkeys(self.experts, 0)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Expert -> fingerprint of the features it serves; starts every expert."""
        return {name: identity["fingerprint"] for name, identity in self._identify().items()}

    @property
    def descriptions(self) -> dict[str, dict[str, Any]]:
        """Expert -> everything that its fingerprint covers; starts every expert."""
        return {name: identity["description"] for name, identity in self._identify().items()}

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`. All experts work at once; the images of one expert are spread over its servers.

        Raises:
            ValueError: an expert that is not in this pool.
            ImageError: an image that cannot be read.
            ServerBusy: an expert's queues stayed full.
            ServerError: an expert fails, on another server too, or none came up in time.
        """
        wanted = wanted_by_expert(images, experts)
        self._start(list(wanted))
        requests = []
        for name, refs in wanted.items():
            keys = list(refs)
            queue = self.experts[name].server.get("queue", REQUEST_IMAGES)
            size = min(REQUEST_IMAGES, queue, ceil(len(keys) / self.experts[name].bounds[1]))
            for start in range(0, len(keys), size):
                group = {(name, key): refs[key] for key in keys[start : start + size]}
                requests.append(self._requests.submit(self._fetch_group, name, group))
        try:
            results = {pair: result for request in requests for pair, result in request.result().items()}
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        out: list[dict[str, Features]] = [{} for _ in images]
        for features, image, names in zip(out, images, experts, strict=True):
            for name in names:
                result = results[name, image.key]
                if isinstance(result, ImageError):
                    raise result
                features[name] = result
        return out

    def scale(self, name: str, replicas: int | tuple[int, int]) -> None:
        """Changes the number of servers of an expert while it serves; no server restarts and no request is dropped.

        Servers that are no longer needed finish their requests first. The new number is agreed with Serve within seconds;
        `replicas` reports it. Of an expert that has not started yet it is the number to start with. If servers are still
        starting, the call waits for the first one.

        Args:
            name: an expert of this pool.
            replicas: how many servers, or (least, most), among which Serve chooses by the requests under way.

        Raises:
            ValueError: an expert that is not in this pool, or bounds that leave no server.
            ServerError: the expert's servers fail or do not come up in time.
        """
        with self._lock:
            config = self.experts[name] = replace(self._config(name), replicas=replicas)
            handle = self._handles.get(name)
        if handle is not None:
            bounds = (*config.bounds, time.time())
            # One server suffices to tell Serve; the others are told too, in case that the first one dies within seconds.
            self._ask_patiently(name, lambda: handle.set_bounds.remote(*bounds))
            with suppress(DeploymentUnavailableError, RayActorError, TimeoutError):
                handle.broadcast("set_bounds", *bounds).results(timeout_s=STATUS_SECONDS)

    def replicas(self) -> dict[str, int]:
        """Expert -> servers that run now; of those experts that were started."""
        running = {}
        for name in list(self._handles):
            deployment = self._status(name).deployments.get(name)
            running[name] = deployment.replica_states.get("RUNNING", 0) if deployment else 0  # type: ignore[call-overload]
        return running

    def close(self) -> None:
        """Ends this pool's servers, also for other pools that share them. Waits until Serve has taken them down.

        Serve itself stays up, because others may be using it.
        """
        self._closed.set()
        self._requests.shutdown(cancel_futures=True)
        self._cleanup.shutdown()
        with self._lock:
            names = list(self._handles)
            self._handles.clear()
        with ThreadPoolExecutor(max(1, len(names))) as threads:
            list(threads.map(lambda name: _delete(self._application(name)), names))

    # Servers

    def _config(self, name: str) -> ExpertDeploymentConfig:
        if name not in self.experts:
            raise ValueError(f"no expert {name!r} in this pool; it serves {', '.join(self.experts)}")
        return self.experts[name]

    def _application(self, name: str) -> str:
        return f"{self.name}-{name}-{self._config(name).version(name)}"

    def _status(self, name: str) -> ApplicationStatusOverview:
        return serve.status().applications.get(self._application(name), _NOT_DEPLOYED)

    def _start(self, names: Sequence[str]) -> None:
        """Joins or deploys experts that have no handle yet; does not wait for their servers."""
        with self._lock:
            new = {name: self._application(name) for name in names if name not in self._handles}
            if not new:
                return
            if self._closed.is_set():
                raise ServerError(f"the pool {self.name} was closed")
            applications = serve.status().applications
            joined = [name for name in new if new[name] in applications and applications[new[name]].status in _ALIVE]
            deployed = [name for name in new if name not in joined]
            self._handles.update({name: serve.get_app_handle(new[name]) for name in joined})
            if deployed:
                self._handles.update(zip(deployed, self._deploy(deployed), strict=True))
            for name in deployed:
                pattern = re.compile(re.escape(f"{self.name}-{name}-") + "[0-9a-f]{16}")
                if replaced := [other for other in applications if pattern.fullmatch(other) and other != new[name]]:
                    self._cleanup.submit(self._delete_when_running, name, replaced)

    def _deploy(self, names: Sequence[str]) -> list[DeploymentHandle]:
        def deploy() -> list[DeploymentHandle]:
            with _building:
                targets = [
                    RunTarget(
                        target=self.experts[name].application(name), name=self._application(name), route_prefix=None
                    )
                    for name in names
                ]
                return serve.run_many(targets, wait_for_applications_running=False)

        serve.start(proxy_location="Disabled", logging_config=LOGGING)  # without effect where Serve runs already
        return _retry_building(deploy)

    def _delete_when_running(self, name: str, replaced: Sequence[str]) -> None:
        """Ends the servers of other versions once those of this pool run; if these fail, the others stay."""
        while not self._closed.wait(STATUS_SECONDS / 4):
            status = self._status(name).status
            if status == ApplicationStatus.RUNNING:
                for application in replaced:
                    _delete(application)
            if status != ApplicationStatus.DEPLOYING:
                return

    def _identify(self) -> dict[str, dict[str, Any]]:
        unknown = [name for name in self.experts if name not in self._identities]
        self._start(unknown)
        requests = {name: self._requests.submit(self._ask_identity, name) for name in unknown}
        self._identities.update({name: request.result() for name, request in requests.items()})
        return {name: self._identities[name] for name in self.experts}

    # Requests

    def _ask_identity(self, name: str) -> dict[str, Any]:
        return self._ask_patiently(name, lambda: self._handles[name].identity.remote())

    def _fetch_group(
        self, name: str, group: Mapping[tuple[str, str], ImageRef]
    ) -> dict[tuple[str, str], Features | ImageError]:
        """The features of one request; those that another thread is computing are awaited instead."""

        def compute(pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Features | ImageError]:
            images = [group[pair] for pair in pairs]
            results = self._ask_patiently(name, lambda: self._handles[name].features.remote(images), hedged=True)
            return dict(zip(pairs, results, strict=True))

        self._count(name, len(group))
        try:
            return self._single_flight.run(
                group, compute, lambda joined: self._observe("joined_total", len(joined), name)
            )
        finally:
            self._count(name, -len(group))

    def _ask_patiently(self, name: str, ask: Callable[[], Any], hedged: bool = False) -> Any:
        """The answer to a request, retried while all queues are full or its server dies or breaks."""
        attempt = _Attempts(self.patience)

        def before_sleep(_: RetryCallState) -> None:
            self._observe("retried_total", 1, name)

        retrying = Retrying(
            retry=attempt.may_be_retried,
            stop=lambda _: False,  # `may_be_retried` decides by the kind of failure
            wait=wait_exponential(multiplier=0.02, max=1.0),  # seconds
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            return retrying(self._ask, name, ask, hedged)
        except DeploymentUnavailableError:
            raise ServerError(self._why_no_answer(name)) from None
        except (BackPressureError, ServerBusy) as error:
            raise ServerBusy(
                f"the servers of {name} had no room for {self.patience:g} s: ask again later, or scale them up "
                f"({str(error).splitlines()[-1]})"
            ) from None
        except RayActorError as error:
            raise ServerError(f"the servers of {name} keep dying ({str(error).splitlines()[0]})") from None

    def _ask(self, name: str, ask: Callable[[], Any], hedged: bool) -> Any:
        """The first answer to a request, which a second server gets too if `hedged` and the first one is slow."""
        started = last_look = time.monotonic()
        hedge_after = self.hedge_after if hedged else None
        hedge_at = None if hedge_after is None else started + hedge_after
        pending = [ask()]
        while (now := time.monotonic()) < started + self.answer_within:
            if hedge_at is not None and now >= hedge_at:
                hedge_at = None
                with suppress(BackPressureError):  # no room for the second request
                    pending.append(ask())
                    self._observe("hedged_total", 1, name)
            if now - last_look > STATUS_SECONDS:  # Serve lets a request wait even where no server will ever take it
                last_look = now
                if self._status(name).status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.NOT_STARTED):
                    raise ServerError(self._why_no_answer(name))
            wait = STATUS_SECONDS if hedge_at is None else min(STATUS_SECONDS, hedge_at - now)
            for response in list(pending):
                try:
                    answer = response.result(timeout_s=max(0.001, wait) if len(pending) == 1 else 0.01)
                except TimeoutError:
                    continue
                except Exception:
                    pending.remove(response)
                    if not pending:
                        raise
                    hedge_at = None if hedge_after is None else now + hedge_after
                    continue
                for slower in pending:
                    if slower is not response:
                        slower.cancel()
                return answer
        raise ServerError(f"{self._why_no_answer(name)} (no answer within {self.answer_within:g} s)")

    def _why_no_answer(self, name: str) -> str:
        """What Serve reports about an expert that gives no answers."""
        status = self._status(name)
        messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
        lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
        reason = lines[-1] if lines else status.status
        if status.status in (ApplicationStatus.NOT_STARTED, ApplicationStatus.DELETING):
            reason = "its servers were ended, by this or another pool of the name: open a new pool"
        return f"no server of {name} answers: {reason}"

    def _count(self, name: str, images: int) -> None:
        with self._lock:
            self._in_flight[name] += images
            self._observe("in_flight", self._in_flight[name], name)

    def _observe(self, name: str, value: float, expert: str) -> None:
        self._telemetry.observe(f"mova_pool_{name}", value, expert=expert)


def _delete(application: str) -> None:
    """Deletes an application and waits, up to a minute, until its replicas have finished their requests."""
    with suppress(TimeoutError):  # Serve goes on deleting
        serve.delete(application)


class _Attempts:
    """Which failures of one request are worth another attempt."""

    def __init__(self, patience: float):
        self.until = time.monotonic() + patience
        self.broken: tuple[str, str] | None = None  # (name, namespace) of the actor that a `ServerError` came from

    def may_be_retried(self, state: RetryCallState) -> bool:
        """Whether to try again. Ends the actor that a `ServerError` came from, so that Serve replaces it at once."""
        error = state.outcome.exception() if state.outcome else None
        in_time = time.monotonic() <= self.until
        if isinstance(error, DeploymentUnavailableError) or error is None:
            return False
        if isinstance(error, (BackPressureError, ServerBusy, RayActorError)):
            return in_time
        if not isinstance(error, ServerError):
            return False
        actor = getattr(getattr(error, "cause", error), "actor", None)  # Ray wraps what an actor raised
        if actor is None:
            return False
        if actor == self.broken:
            return in_time
        if self.broken is not None:  # the expert fails on a fresh server too
            return False
        self.broken = actor
        with suppress(ValueError):  # the actor has ended already
            ray.kill(ray.get_actor(actor[0], namespace=actor[1]))
        return True

"""ExpertPool: live expert feature servers as a FeatureSource, one Ray Serve application per expert.

Serve owns the servers: it starts, watches, replaces, scales and drains them, each expert by itself. The pool is a client
of theirs: it spreads pictures over requests, asks again what was refused or lost, and asks for nothing twice at a time.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.api import RunTarget
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from actors.expert_server import ExpertServer, ServerBusy, ServerError
from actors.ray_metrics import RayTelemetry
from mova_core import __version__
from mova_core.experts import Features, expert_module
from mova_core.features.single_flight import SingleFlight
from mova_core.features.source import wanted_by_expert
from mova_core.images import ImageError, ImageRef
from mova_core.telemetry import Telemetry

REQUEST = 32  # most pictures per request: what is refused is asked for again as a whole
ONGOING = 16  # requests a server holds at once, whose pictures share its batches
QUEUED = 64  # requests that one process may have waiting for a server of an expert; Serve refuses more
ASKING = 64  # requests that a pool has under way; fetches beyond wait for their turn
LOOK = 2.0  # seconds between looks at what Serve says of an expert that does not answer
SERVE_NAMESPACE = "serve"  # where Serve's actors have their names


_Made = TypeVar("_Made")
_marking = threading.Lock()


def _undisturbed(make: Callable[[], _Made]) -> _Made:
    """What `make` gives. Wherever Serve makes a deployment's settings it marks a module of its own for the whole process, and
    fails if another thread has taken the mark away; its own threads make some, too."""
    for left in range(9, -1, -1):
        try:
            with _marking:
                return make()
        except ValueError as error:
            if "pickle by value" not in str(error) or not left:
                raise
            time.sleep(0.02)
    raise AssertionError


@dataclass(frozen=True, kw_only=True)
class ExpertDeploymentConfig:
    """How one expert is served. CPUs and GPUs are per replica and may be fractions."""

    replicas: int | tuple[int, int] = 1  # (least, most): Serve chooses by the requests under way
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    label_selector: Mapping[str, str] = field(default_factory=dict)  # e.g. {"ray.io/accelerator-type": "in(A100,H100)"}
    batch_size: int | None = None  # most pictures per forward pass; None: the server measures it at its start
    ongoing_per_replica: float = 4.0  # requests under way at which Serve holds the number of replicas
    upscale_after: float = 10.0  # seconds
    downscale_after: float = 300.0  # seconds
    server: Mapping[str, Any] = field(
        default_factory=dict
    )  # further arguments of ExpertServer: weights, size, dtype, device, wait_ms, queue, profiles, memory_share

    def __post_init__(self) -> None:
        least, most = self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)
        if not 1 <= least <= most:
            raise ValueError(f"replicas {self.replicas} must be at least 1, or (least, most)")


class _Replica(ExpertServer):
    """`ExpertServer` where Serve calls it: its sync methods each in a thread of their own, up to `ONGOING` at a time."""

    def features(self, images: Sequence[ImageRef]) -> list[Features | ImageError]:
        """See `ExpertServer.features`; its `ServerError` tells in `server` which actor to end."""
        try:
            return super().features(images)
        except ServerError as error:
            error.server = ray.get_runtime_context().get_actor_name()  # type: ignore[attr-defined]
            raise

    async def check_health(self) -> dict[str, Any]:  # type: ignore[override]
        """See `ExpertServer.check_health`. On Serve's event loop: the threads may all be waiting for features."""
        return super().check_health()


class ExpertPool:
    """Features from live servers. Needs an open Ray session; an expert's servers start when it is first asked for.

    The pictures of one request share the servers' batches with those of all other callers. Two callers in this process
    that want the same feature at the same time have it computed once. A request that a server refuses, or with which it
    dies, is asked again elsewhere.

    Args:
        experts: name -> how it is served.
        name: applications are called <name>-<expert>; pools of one name, in any process, share their servers.
        patience: seconds that a request is asked again for while every queue is full or its servers die.
        answer_within: seconds after which a request that got no answer counts as lost; covers the servers' start.
        hedge_after_ms: milliseconds after which another server is asked too, the faster answer counts; None: never.
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
        self._flights: SingleFlight[tuple[str, str], Features | ImageError] = SingleFlight()
        self._asking = ThreadPoolExecutor(ASKING, thread_name_prefix=f"{name}-asking")
        self._lock = threading.RLock()
        self._in_flight = dict.fromkeys(self.experts, 0)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Expert -> fingerprint of the features it serves; starts every expert."""
        return {name: identity["fingerprint"] for name, identity in self._identified().items()}

    @property
    def descriptions(self) -> dict[str, dict[str, Any]]:
        """Expert -> all that its fingerprint covers; starts every expert."""
        return {name: identity["description"] for name, identity in self._identified().items()}

    def fetch(self, images: Sequence[ImageRef], experts: Sequence[Sequence[str]]) -> list[dict[str, Features]]:
        """See `FeatureSource.fetch`. All experts work at once; the pictures of one are spread over its servers.

        Raises:
            ValueError: an expert that is not in this pool.
            ImageError: a picture that cannot be read.
            ServerBusy: an expert's queues stayed full.
            ServerError: an expert fails, on another server too, or none came up in time.
        """
        wanted = wanted_by_expert(images, experts)
        self._start(list(wanted))
        requests = []
        for name, refs in wanted.items():
            keys = list(refs)
            room = self.experts[name].server.get("queue", REQUEST)
            size = min(REQUEST, room, ceil(len(keys) / max(1, self._most(name))))
            for at in range(0, len(keys), size):
                group = {(name, key): refs[key] for key in keys[at : at + size]}
                requests.append(self._asking.submit(self._fetch_group, name, group))
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
        """From now on so many servers for an expert. Drops no request: servers that go finish theirs before.

        Args:
            name: an expert of this pool.
            replicas: how many, or (least, most).
        """
        with self._lock:
            self.experts[name] = replace(self._how(name), replicas=replicas)
            if name in self._handles:
                self._deploy([name])

    def replicas(self) -> dict[str, int]:
        """Expert -> servers that run now; of those experts that were started."""
        told = {name: self._told(name).deployments.get(name) for name in self._handles}
        return {name: one.replica_states.get("RUNNING", 0) if one else 0 for name, one in told.items()}  # type: ignore[call-overload]

    def close(self) -> None:
        """Ends the servers; Serve itself stays up, others may be using it."""
        self._asking.shutdown(cancel_futures=True)
        with self._lock:
            for name in self._handles:
                serve.delete(self._application(name), _blocking=False)
            self._handles.clear()

    # Servers

    def _application(self, name: str) -> str:
        return f"{self.name}-{name}"

    def _how(self, name: str) -> ExpertDeploymentConfig:
        if name not in self.experts:
            raise ValueError(f"no expert {name!r} in this pool; it serves {', '.join(self.experts)}")
        return self.experts[name]

    def _most(self, name: str) -> int:
        replicas = self._how(name).replicas
        return replicas[1] if isinstance(replicas, tuple) else replicas

    def _start(self, names: Sequence[str]) -> None:
        """Deploys experts that are not yet; requests wait for them."""
        with self._lock:
            new = [name for name in names if self._how(name) and name not in self._handles]
            if new:
                self._deploy(new)

    def _deploy(self, names: Sequence[str]) -> None:
        targets = [
            RunTarget(
                target=_undisturbed(partial(self._deployment, name)), name=self._application(name), route_prefix=None
            )
            for name in names
        ]
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns of each refusal; what fails is an exception
        serve.start(proxy_location="Disabled", logging_config=_QUIET)  # callers hold handles, nobody comes by HTTP
        handles = serve.run_many(targets, wait_for_applications_running=False)
        self._handles.update(zip(names, handles, strict=True))

    def _deployment(self, name: str) -> serve.Application:
        how = self.experts[name]
        arguments = {
            "batch_size": how.batch_size,
            "device": "cuda" if how.num_gpus else "cpu",
            "memory_share": min(1.0, how.num_gpus or 1.0),
            "module": expert_module(name),
            **how.server,
        }
        options: dict[str, Any] = {"num_cpus": how.num_cpus, "num_gpus": how.num_gpus}
        if how.label_selector:
            options["label_selector"] = dict(how.label_selector)
        if isinstance(how.replicas, tuple):
            number: dict[str, Any] = {
                "autoscaling_config": {
                    "min_replicas": how.replicas[0],
                    "max_replicas": how.replicas[1],
                    "target_ongoing_requests": how.ongoing_per_replica,
                    "upscale_delay_s": how.upscale_after,
                    "downscale_delay_s": how.downscale_after,
                    "look_back_period_s": min(10.0, how.upscale_after),
                    "metrics_interval_s": min(2.0, how.upscale_after),
                }
            }
        else:
            number = {"num_replicas": how.replicas}
        deployment: Any = serve.deployment(_Replica)
        deployment = deployment.options(
            name=name,
            ray_actor_options=options,
            max_ongoing_requests=ONGOING,
            max_queued_requests=QUEUED,
            max_constructor_retry_count=2,
            max_surge_percent=100,  # other weights come up before those that serve go
            health_check_period_s=2,
            graceful_shutdown_timeout_s=60,
            logging_config=_QUIET,
            # Serve would else take every deployment for new code and start all replicas again, also to scale.
            version=_version(name, arguments, options),
            _internal=True,
            **number,
        )
        return deployment.bind(name, **arguments)

    def _identified(self) -> dict[str, dict[str, Any]]:
        self._start([name for name in self.experts if name not in self._identities])
        asked = {
            name: self._asking.submit(self._patiently, name, self._identity_of(name))
            for name in self.experts
            if name not in self._identities
        }
        self._identities.update({name: answer.result() for name, answer in asked.items()})
        return {name: self._identities[name] for name in self.experts}

    def _identity_of(self, name: str) -> Callable[[], Any]:
        return lambda: self._handles[name].identity.remote()

    # Requests

    def _fetch_group(
        self, name: str, group: Mapping[tuple[str, str], ImageRef]
    ) -> dict[tuple[str, str], Features | ImageError]:
        """The features of one request, less what others are asking for right now and will share."""

        def ask(mine: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Features | ImageError]:
            images = [group[pair] for pair in mine]
            results = self._patiently(name, lambda: self._handles[name].features.remote(images), hedged=True)
            return dict(zip(mine, results, strict=True))

        self._count(name, len(group))
        try:
            return self._flights.run(group, ask, lambda joined: self._tell("joined_total", len(joined), name))
        finally:
            self._count(name, -len(group))

    def _patiently(self, name: str, ask: Callable[[], Any], hedged: bool = False) -> Any:
        """The answer to a request, asked again while there is no room or its server dies under it."""
        until = time.monotonic() + self.patience
        pause, broken = 0.02, ""
        while True:
            try:
                return self._answered(name, ask, hedged)
            except DeploymentUnavailableError:
                raise ServerError(self._why_not(name)) from None
            except (BackPressureError, ServerBusy) as error:
                if time.monotonic() > until:
                    raise ServerBusy(
                        f"the servers of {name} had no room for {self.patience:g} s: ask again later, or scale them up "
                        f"({str(error).splitlines()[-1]})"
                    ) from None
            except RayActorError as error:
                if time.monotonic() > until:
                    raise ServerError(f"the servers of {name} keep dying ({str(error).splitlines()[0]})") from None
            except ServerError as error:
                server = getattr(getattr(error, "cause", error), "server", "")
                if server in ("", broken) and time.monotonic() > until:
                    raise
                if broken and server != broken:  # a fresh one failed too: it is not the server
                    raise
                broken = server
                with suppress(ValueError):  # it is gone already
                    ray.kill(ray.get_actor(server, namespace=SERVE_NAMESPACE))
            self._tell("retried_total", 1, name)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _answered(self, name: str, ask: Callable[[], Any], hedged: bool) -> Any:
        """The first answer to a request."""
        started = time.monotonic()
        hedge_after = self.hedge_after if hedged else None
        hedge_at = None if hedge_after is None else started + hedge_after
        asked, looked = [ask()], started
        while (now := time.monotonic()) < started + self.answer_within:
            if hedge_at is not None and now >= hedge_at:
                hedge_at = None
                with suppress(BackPressureError):  # no room for a second one
                    asked.append(ask())
                    self._tell("hedged_total", 1, name)
            if now - looked > LOOK:  # a request that waits is not told that no server will ever come
                looked = now
                if self._told(name).status == ApplicationStatus.DEPLOY_FAILED:
                    raise ServerError(self._why_not(name))
            for response in list(asked):
                wait = min(LOOK, hedge_at - now if hedge_at is not None else LOOK) if len(asked) == 1 else 0.01
                try:
                    answer = response.result(timeout_s=max(0.001, wait))
                except TimeoutError:
                    continue
                except Exception:
                    asked.remove(response)
                    if not asked:
                        raise
                    hedge_at = None if hedge_after is None else now + hedge_after
                    continue
                for loser in asked:
                    if loser is not response:
                        loser.cancel()
                return answer
        raise ServerError(f"{self._why_not(name)} (no answer within {self.answer_within:g} s)")

    def _why_not(self, name: str) -> str:
        """What Serve says of an expert that gives no answers."""
        application = self._told(name)
        said = [application.message, *(one.message for one in application.deployments.values())]
        lines = [line.strip() for message in said for line in message.splitlines() if line.strip()]
        return f"no server of {name} answers: {lines[-1] if lines else application.status}"

    def _told(self, name: str) -> ApplicationStatusOverview:
        return _undisturbed(serve.status).applications.get(self._application(name), _NOTHING)

    def _count(self, name: str, pictures: int) -> None:
        with self._lock:
            self._in_flight[name] += pictures
            self._tell("in_flight", self._in_flight[name], name)

    def _tell(self, name: str, value: float, expert: str) -> None:
        self._telemetry.observe(f"mova_pool_{name}", value, expert=expert)


_QUIET = {"enable_access_log": False, "log_level": "ERROR"}
_NOTHING = ApplicationStatusOverview(
    status=ApplicationStatus.NOT_STARTED, message="", last_deployed_time_s=0, deployments={}
)


def _version(name: str, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Names all that a replica must be started anew for."""
    told = json.dumps([__version__, name, arguments, options], sort_keys=True, default=repr)
    return hashlib.sha256(told.encode()).hexdigest()[:16]

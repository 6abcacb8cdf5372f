"""How one expert is deployed on Ray Serve: its settings, its replica class and Serve's options for it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from actors.expert_server import ExpertServer, ServerError
from actors.replica_bounds import ReplicaBounds, bounds_metrics
from mova_core import __version__
from mova_core.experts import Features, expert_module
from mova_core.images import ImageError, ImageRef

ONGOING = 16  # requests that a replica works on at once, whose images share its batches
QUEUED = 64  # requests of one process that may wait for a replica of an expert; Serve refuses more
MAX_REPLICAS = 1000  # Serve's own bound, which cannot change without a restart; `ReplicaBounds` keeps a closer one
LOGGING = {"enable_access_log": False, "log_level": "ERROR"}  # of Serve's own processes


@dataclass(frozen=True, kw_only=True)
class ExpertDeploymentConfig:
    """How one expert is served. CPUs and GPUs are per replica and may be fractions.

    Raises:
        ValueError: bounds without room for one replica, or in the wrong order.
    """

    replicas: int | tuple[int, int] = 1  # (least, most): Serve chooses by the requests under way
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    label_selector: Mapping[str, str] = field(default_factory=dict)  # e.g. {"ray.io/accelerator-type": "in(A100,H100)"}
    batch_size: int | None = None  # most images per forward pass; None: each server measures it at its start
    ongoing_per_replica: float = 4.0  # requests under way for which Serve provides one replica
    upscale_after: float = 10.0  # seconds that the load must ask for more replicas
    downscale_after: float = 300.0  # seconds that the load must ask for fewer replicas
    # Further arguments of ExpertServer: weights, size, dtype, device, wait_ms, queue, profiles, memory_share.
    server: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least, most = self.bounds
        if not 1 <= least <= most <= MAX_REPLICAS:
            raise ValueError(f"replicas {self.replicas} must be 1 to {MAX_REPLICAS}, or (least, most) of such numbers")

    @property
    def bounds(self) -> tuple[int, int]:
        """Least and most replicas."""
        return self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)

    def version(self, expert: str) -> str:
        """16 hex digits that name everything a replica must be started anew for; the number of replicas is not part of it."""
        content = [__version__, expert, self._server_arguments(expert), self._actor_options()]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()[:16]

    def application(self, expert: str) -> serve.Application:
        """The Serve application of an expert. Building one is not thread-safe in Ray 2.60; `ExpertPool` holds a lock."""
        least, most = self.bounds
        policy = {
            "least": least,
            "most": most,
            "ongoing_per_replica": self.ongoing_per_replica,
            "upscale_after": self.upscale_after,
            "downscale_after": self.downscale_after,
        }
        interval = min(2.0, self.upscale_after)  # seconds; Serve's default of 10 would delay `scale` as much
        autoscaling = AutoscalingConfig(
            min_replicas=1,
            initial_replicas=least,
            max_replicas=MAX_REPLICAS,
            upscale_delay_s=0,  # `ReplicaBounds` keeps the delays, which changed bounds do not wait for
            downscale_delay_s=0,
            metrics_interval_s=interval,
            look_back_period_s=max(2 * interval, min(10.0, self.upscale_after)),
            policy=AutoscalingPolicy(policy_function=ReplicaBounds, policy_kwargs=policy),
        )
        deployment = serve.deployment(
            name=expert,
            autoscaling_config=autoscaling,
            ray_actor_options=self._actor_options(),
            max_ongoing_requests=ONGOING,
            max_queued_requests=QUEUED,
            max_constructor_retry_count=2,
            health_check_period_s=2,
            graceful_shutdown_timeout_s=60,
            logging_config=LOGGING,
        )(ExpertReplica)
        return deployment.bind(expert, **self._server_arguments(expert))

    def _actor_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.label_selector:
            options["label_selector"] = dict(self.label_selector)
        return options

    def _server_arguments(self, expert: str) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "device": "cuda" if self.num_gpus else "cpu",
            "memory_share": min(1.0, self.num_gpus or 1.0),
            "module": expert_module(expert),
            **self.server,
        }


class ExpertReplica(ExpertServer):
    """`ExpertServer` as a Serve replica: Serve runs each synchronous method in a thread, up to `ONGOING` at a time."""

    def __init__(self, expert: str, **arguments: Any):
        super().__init__(expert, **arguments)
        self._bounds: dict[str, float] = {}

    def features(self, images: Sequence[ImageRef]) -> list[Features | ImageError]:
        """See `ExpertServer.features`; a `ServerError` names in `actor` the (name, namespace) of this replica's actor."""
        try:
            return super().features(images)
        except ServerError as error:
            context = ray.get_runtime_context()
            error.actor = (context.get_actor_name() or "", context.namespace)
            raise

    def set_bounds(self, least: int, most: int, set_at: float) -> None:
        """Hands new bounds of the number of replicas to Serve's controller; see `actors.replica_bounds`."""
        self._bounds = bounds_metrics(least, most, set_at)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes to `ReplicaBounds`; Serve asks by this name."""
        return dict(self._bounds)

    async def check_health(self) -> dict[str, Any]:  # type: ignore[override]
        """See `ExpertServer.check_health`. It runs on Serve's event loop, because all threads may be waiting for features."""
        return super().check_health()

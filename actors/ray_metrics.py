"""Ray's metrics behind `mova_core.telemetry.Telemetry`; Prometheus reads them as ray_<name> from every node."""

import ray
from ray.util.metrics import Counter, Gauge, Histogram, Metric

POWERS = [float(2**power) for power in range(10)]  # 1 .. 512
SECONDS = [0.005 * 2**power for power in range(16)]  # 5 ms .. 164 s

_METRICS = {  # name -> kind, description, boundaries of a histogram's buckets
    "mova_expert_queue_depth": (Gauge, "Pictures that wait for a forward pass.", None),
    "mova_expert_batch_size": (Histogram, "Pictures in a forward pass.", POWERS),
    "mova_expert_latency_seconds": (Histogram, "From a picture's arrival to its features, seconds.", SECONDS),
    "mova_expert_images_per_second": (Gauge, "Pictures per second of the last forward pass.", None),
    "mova_expert_images_total": (Counter, "Pictures whose features were computed.", None),
    "mova_expert_errors_total": (Counter, "Pictures that got an error instead of features.", None),
    "mova_expert_refused_total": (Counter, "Pictures refused because the queue was full.", None),
    "mova_expert_splits_total": (Counter, "Batches split because they did not fit the memory.", None),
    "mova_pool_in_flight": (Gauge, "Pictures that a pool has requested and not yet received.", None),
    "mova_pool_joined_total": (Counter, "Pictures that another caller's request was computing already.", None),
    "mova_pool_retried_total": (Counter, "Requests retried: no room, or their server died.", None),
    "mova_pool_hedged_total": (Counter, "Requests slow enough that another server was asked too.", None),
    "mova_tiered_hits_total": (Counter, "Features that were stored.", None),
    "mova_tiered_misses_total": (Counter, "Features that had to be computed.", None),
    "mova_tiered_dropped_total": (Counter, "Computed features that could not be stored.", None),
}


class RayTelemetry:
    """Records metrics with Ray; without a Ray session observations are dropped."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def observe(self, name: str, value: float, **tags: str) -> None:
        """See `Telemetry.observe`. Raises KeyError for a name that `_METRICS` does not have."""
        kind, description, boundaries = _METRICS[name]
        if not ray.is_initialized():
            return
        if name not in self._metrics:
            extra = {"boundaries": boundaries} if boundaries else {}
            self._metrics[name] = kind(name, description=description, tag_keys=tuple(tags), **extra)
        metric = self._metrics[name]
        if isinstance(metric, Counter):
            if value:
                metric.inc(value, tags)
        elif isinstance(metric, Gauge):
            metric.set(value, tags)
        elif isinstance(metric, Histogram):
            metric.observe(value, tags)

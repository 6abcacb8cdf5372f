"""The number of replicas of an expert: a Serve autoscaling policy whose bounds can change while the expert serves.

Serve keeps the bounds of autoscaling in a deployment's config, and from Python that config changes only by deploying
again. Ray 2.60 gives each such deployment a random code version (ray/serve/_private/version.py), so deploying again
restarts every replica. Therefore the bounds travel another public way: `ExpertPool.scale` sends them to the running
replicas, each replica reports its bounds with Serve's autoscaling metrics (`record_autoscaling_stats`), and this policy,
which Serve's controller calls about ten times a second, obeys the newest bounds.

The controller unpickles this class by value, so this module imports nothing of this project.
"""

import math
import time
from typing import Any

from ray.serve.config import AutoscalingContext

LEAST, MOST, SET_AT = "mova_least_replicas", "mova_most_replicas", "mova_bounds_set_at"


def bounds_metrics(least: int, most: int, set_at: float | None = None) -> dict[str, float]:
    """Bounds in the form in which a replica reports them.

    Args:
        least, most: number of replicas.
        set_at: seconds since 1970; default now. The newest bounds count.
    """
    return {LEAST: float(least), MOST: float(most), SET_AT: time.time() if set_at is None else set_at}


class ReplicaBounds:
    """As many replicas as the requests under way need, within bounds.

    Args:
        least, most: number of replicas until a replica reports newer bounds.
        ongoing_per_replica: requests under way, waiting ones included, that each replica should have.
        upscale_after, downscale_after: seconds that the load must ask for more or fewer replicas before their number
            changes. Bounds that exclude the present number change it at once.
    """

    def __init__(self, least: int, most: int, ongoing_per_replica: float, upscale_after: float, downscale_after: float):
        self.initial = (0.0, least, most)
        self.ongoing_per_replica = ongoing_per_replica
        self.upscale_after, self.downscale_after = upscale_after, downscale_after

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas that Serve shall aim at, and the state that it hands to the next call."""
        state = dict(context.policy_state or {})
        # Kept in the state, because a replica that was told the bounds may end, and new replicas know none.
        bounds = max(state.get("bounds", self.initial), *self._reported(context), self.initial)
        _, least, most = state["bounds"] = tuple(bounds)
        aim = context.target_num_replicas
        needed = min(max(math.ceil(context.total_num_requests / self.ongoing_per_replica), least), most)
        direction = (needed > aim) - (needed < aim)
        now = context.current_time or time.time()
        if direction != state.get("direction"):
            state["direction"], state["since"] = direction, now
        patience = self.upscale_after if direction > 0 else self.downscale_after
        if direction and now - state["since"] >= patience:
            aim = needed
            state["direction"] = 0  # the next change waits anew
        return min(max(aim, least), most), state

    @staticmethod
    def _reported(context: AutoscalingContext) -> list[tuple[float, int, int]]:
        """(set at, least, most) of each replica that was sent bounds."""
        metrics = context.raw_metrics or {}
        reports = []
        for replica, set_at in metrics.get(SET_AT, {}).items():
            least, most = metrics.get(LEAST, {}).get(replica), metrics.get(MOST, {}).get(replica)
            if set_at and least and most:  # series of points, the newest last
                reports.append((set_at[-1].value, int(least[-1].value), int(most[-1].value)))
        return reports

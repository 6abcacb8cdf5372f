"""The interface through which long-running parts report metrics, independent of any metrics library."""

from typing import Protocol


class Telemetry(Protocol):
    """Receives metrics by name; `actors.ray_metrics` passes them to Ray, from which Prometheus reads them."""

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Reports one value. The name decides whether it is added to a counter, sets a gauge or goes into a histogram.

        Args:
            tags: labels of the metric, such as the expert's name.
        """
        ...

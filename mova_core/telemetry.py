"""What long-running parts tell of themselves: one small protocol, so that nothing here depends on who listens."""

from typing import Protocol


class Telemetry(Protocol):
    """Takes numbers by name; `actors.ray_metrics` gives them to Ray, which Prometheus reads."""

    def observe(self, name: str, value: float, **tags: str) -> None:
        """One number. Whether it is added up, replaces the last or goes into a histogram, its name decides."""
        ...

from types import SimpleNamespace
from typing import Any

import pytest

from actors.replica_bounds import ReplicaBounds, bounds_metrics

UPSCALE_AFTER, DOWNSCALE_AFTER = 10.0, 300.0  # seconds


class Controller:
    """What Serve's controller does with a policy, as far as the policy sees it."""

    def __init__(self, least, most):
        self.policy = ReplicaBounds(least, most, 4.0, UPSCALE_AFTER, DOWNSCALE_AFTER)
        self.replicas, self.state, self.now = least, {}, 1000.0
        self.reports = {}  # replica -> metrics

    def tick(self, requests=0.0, seconds=0.1):
        self.now += seconds
        series: dict[str, dict[str, list[SimpleNamespace]]] = {}
        for replica, metrics in self.reports.items():
            for name, value in metrics.items():
                series.setdefault(name, {})[replica] = [SimpleNamespace(timestamp=self.now, value=value)]
        context: Any = SimpleNamespace(
            policy_state=self.state,
            target_num_replicas=self.replicas,
            total_num_requests=requests,
            current_time=self.now,
            raw_metrics=series,
        )
        self.replicas, self.state = self.policy(context)
        return self.replicas


def test_load_changes_the_number_after_its_delay_and_within_bounds():
    serve = Controller(1, 4)
    assert serve.tick(requests=9) == 1 and serve.tick(requests=9, seconds=UPSCALE_AFTER / 2) == 1
    assert serve.tick(requests=9, seconds=UPSCALE_AFTER / 2) == 3, "nine requests, four for each replica"
    assert serve.tick(requests=100) == 3 and serve.tick(requests=100, seconds=UPSCALE_AFTER) == 4, "the upper bound"
    assert serve.tick() == 4 and serve.tick(seconds=DOWNSCALE_AFTER - 1) == 4
    assert serve.tick(seconds=1) == 1


def test_a_load_that_comes_and_goes_changes_nothing():
    serve = Controller(1, 4)
    for _ in range(10):
        assert serve.tick(requests=9, seconds=UPSCALE_AFTER / 2) == 1
        assert serve.tick(requests=4, seconds=UPSCALE_AFTER / 2) == 1


@pytest.mark.parametrize(("bounds", "replicas"), [((3, 3), 3), ((2, 4), 2), ((1, 1), 1)])
def test_bounds_that_exclude_the_present_number_change_it_at_once(bounds, replicas):
    serve = Controller(1, 1)
    serve.tick()
    serve.reports["a"] = bounds_metrics(*bounds)
    assert serve.tick() == replicas


def test_the_newest_bounds_count_also_after_their_replica_has_ended():
    serve = Controller(1, 1)
    serve.reports = {"a": bounds_metrics(3, 3, set_at=20.0), "b": bounds_metrics(2, 2, set_at=10.0), "c": {}}
    assert serve.tick() == 3
    del serve.reports["a"]
    assert serve.tick() == 3
    serve.reports["b"] = bounds_metrics(2, 2, set_at=30.0)
    assert serve.tick() == 2

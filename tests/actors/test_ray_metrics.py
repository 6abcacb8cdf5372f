import pytest

from actors.ray_metrics import RayTelemetry


def test_without_a_session_observations_are_dropped():
    RayTelemetry().observe("mova_expert_queue_depth", 1, expert="sam")


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError):
        RayTelemetry().observe("mova_expert_weather", 1)

"""Fixtures of every room. The environment stands before Ray or transformers are imported."""

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # clusters of the tests listen on loopback and live for minutes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """One cluster on this machine for all tests that need Ray."""
    from cluster.session import ray_session

    with ray_session(num_cpus=4) as resources:
        yield resources

"""Every test of the store runs at the usual limit of open files."""

import resource

import pytest


@pytest.fixture(scope="module", autouse=True)
def usual_limit_of_open_files():
    """`ulimit -n 1024`, which Ray raises for its own processes and plain PyTorch does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

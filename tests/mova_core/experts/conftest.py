"""A registry that a test may add experts to."""

import pytest

from mova_core.experts import registry


@pytest.fixture
def own_registry(monkeypatch):
    """Experts registered in the test are gone after it: other tests of the process list and build all that are registered."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

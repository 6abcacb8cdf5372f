"""Sessions as scripts of users open them: each in a process of its own, without the environment of the test suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN_PREFIXES = ("PYTHONBREAKPOINT", "RAY_", "HF_", "MALLOC_", "MOVA_", "OMP_", "TOKENIZERS_")


def run(script: str, home: Path) -> tuple[str, str]:
    """Runs a script as a new user would, and returns its output and its errors."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OWN_PREFIXES)}
    environment = inherited | {"PYTHONPATH": str(ROOT), "HOME": str(home)}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout, process.stderr


IMPORT_EVERYTHING = """
import logging, os, pkgutil, warnings
import ray, ray.data, ray.serve, ray.train, torch, transformers, timm, peft, PIL.Image, fsspec, typer, matplotlib.pyplot  # set theirs
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # it warns where there is no GPU
import deepspeed
def state():
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("ray", "transformers", "PIL")]
    return dict(os.environ), list(warnings.filters), {name: logging.getLogger(name).level for name in names}
before = state()
for room in ("mova_core", "actors", "cluster", "pipelines"):
    package = __import__(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        if not module.name.endswith("__main__"):
            __import__(module.name)
after = state()
print({name: after[0].get(name) for name in {*before[0], *after[0]} if before[0].get(name) != after[0].get(name)})
print([entry for entry in after[1] if entry not in before[1]])
print({name: level for name, level in before[2].items() if after[2][name] != level})
"""


@pytest.mark.ray
def test_importing_the_rooms_sets_nothing(tmp_path):
    assert run(IMPORT_EVERYTHING, tmp_path)[0].splitlines() == ["{}", "[]", "{}"]


WITH_RAY_FIRST = """
import actors.expert_pool  # imports ray before the session opens
import os, time, ray
from cluster.session import ray_session
before = dict(os.environ)
with ray_session() as resources:
    assert resources["CPU"] >= 4
    variable = ray.get(ray.remote(lambda: os.environ["MALLOC_TRIM_THRESHOLD_"]).remote())
    unread = ray.remote(lambda: 1 / 0).remote()  # as a run leaves the results of actors that failed
    ray.get(ray.remote(lambda: time.sleep(1)).remote())  # `ray.wait` would count as reading
    del unread
    ray.get(ray.remote(lambda: time.sleep(0.5)).remote())
print(variable, sorted(name for name in {*os.environ, *before} if os.environ.get(name) != before.get(name)))
"""


@pytest.mark.ray
def test_a_session_opens_after_ray_was_imported_and_leaves_the_environment_as_it_was(tmp_path):
    # What stays is set by ray.init; RAY_AUTH_MODE=token says that the cluster it started takes no other connections.
    output, errors = run(WITH_RAY_FIRST, tmp_path)
    assert output == f"{256 * 2**20} ['PYTHONBREAKPOINT', 'RAY_AUTH_MODE', 'RAY_USAGE_STATS_ENABLED']\n"
    assert "ZeroDivisionError" not in errors, "an error that nobody read is no news for the terminal"

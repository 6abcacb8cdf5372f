"""Trackers get the lines of a run through their own packages; a missing package is named before any worker starts."""

import gzip
import json
from collections import defaultdict
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mova_core.data import DataError
from pipelines.train.config import TrainConfig
from pipelines.train.metrics import read_metrics
from pipelines.train.profiler import step_profiler
from pipelines.train.trackers import TRACKERS, check_trackers, open_log


def test_tensorboard_shows_each_step_once(tmp_path):
    config = TrainConfig(
        stage="sft", model="m", data="d", store="s", output=str(tmp_path / "out"), log=("tensorboard",)
    )
    run_folder = str(tmp_path / "out.ray" / "sft-01")
    for done, last in ((0, 5), (3, 6)):  # killed after step 5, resumed from step 3
        with open_log(config, run_folder, done) as write:
            for step in range(done + 1, last + 1):
                line: dict[str, Any] = {
                    "step": step,
                    "loss": step + done / 10,
                    "grad_norm": None,
                    "experts": {"sam": step},
                }
                write(line | ({"skipped": True, "suspects": ["data.json, record 1"]} if step == 2 else {}))
    assert [row["loss"] for row in read_metrics(run_folder)] == [1, 2, 3, 4.3, 5.3, 6.3]
    events = EventAccumulator(str(tmp_path / "out.logs" / "tensorboard" / "sft-01")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "experts/sam", "skipped"}
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert len(events.Scalars("loss")) == 6 and shown == pytest.approx({1: 1, 2: 2, 3: 3, 4: 4.3, 5: 5.3, 6: 6.3})


def test_a_tracker_without_its_package_is_refused():
    check_trackers(["tensorboard"])
    with pytest.raises(DataError, match=r"--log files: the trackers are tensorboard, wandb, mlflow"):
        check_trackers(["files"])
    for name in TRACKERS:
        if find_spec(name) is None:
            with pytest.raises(DataError, match=rf"--log {name} needs .*pip install 'mova-ray\[{name}\]'"):
                check_trackers([name])


@pytest.mark.parametrize(("done", "traced"), [(0, [3, 4]), (1, [3, 4]), (2, [3, 4]), (3, None)])
def test_the_trace_has_the_steps_that_were_named(tmp_path, done, traced):
    with step_profiler((3, 4), done, tmp_path, rank=1) as profiler:
        for step in range(done + 1, 7):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(3).sum()
            if profiler is not None:
                profiler.step()
    if traced is None:
        assert profiler is None and not list(tmp_path.iterdir())
        return
    with gzip.open(tmp_path / "rank1.json.gz", "rt") as file:
        counts: dict[str, int] = defaultdict(int)
        for event in json.load(file)["traceEvents"]:
            counts[event["name"]] += 1
    assert [step for step in range(1, 7) if counts[f"step {step}"]] == traced and counts["aten::sum"]

"""Settings of a training run: one source of defaults, readable before torch and Ray are imported."""

import subprocess
import sys
from dataclasses import replace
from typing import Any, get_args

import pytest
import typer

from mova_core.data import DataError
from pipelines.cli.train_options import worker_range
from pipelines.train.config import LABEL_STAGES, STAGES, Stage, TrainConfig, parse_interval

PLACES: dict[str, Any] = {"model": "model", "data": "data.json", "store": "store", "output": "out"}


def test_defaults_are_those_of_the_stage():
    assert tuple(STAGES) == get_args(Stage) and set(LABEL_STAGES) < set(STAGES)
    for stage, defaults in STAGES.items():
        config = TrainConfig(stage=stage, **PLACES)
        assert (config.learning_rate, config.batch_size) == (defaults.learning_rate, defaults.batch_size)
    assert (STAGES["pretrain"].learning_rate, STAGES["pretrain"].batch_size) == (2e-4, 1024), "the paper's stage 1"
    assert (STAGES["sft"].learning_rate, STAGES["sft"].batch_size) == (2e-5, 128), "the paper's stage 2"
    assert not config.checkpoint_activations and TrainConfig(stage=stage, gpu=True, **PLACES).checkpoint_activations
    assert not TrainConfig(stage=stage, gpu=True, checkpoint_activations=False, **PLACES).checkpoint_activations
    changed = TrainConfig(stage="sft", learning_rate=0.5, batch_size=3, **PLACES)
    assert (changed.learning_rate, changed.batch_size) == (0.5, 3)


@pytest.mark.parametrize("module", ["pipelines.train.config"])
def test_defaults_are_shown_without_torch_and_ray(module):
    script = f"import sys, {module}; assert not {{'torch', 'ray', 'transformers'}} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_run_resumes_whatever_machines_it_has(tmp_path):
    from pipelines.train.run import identity

    places: dict[str, Any] = {name: str(tmp_path / name) for name in ("model", "data", "store", "output")}
    config = TrainConfig(stage="sft", **places)
    settings: dict[str, Any]
    machines: list[dict[str, Any]] = [
        {"workers": 7},
        {"gpu": True},
        {"loader_processes": 3},
        {"checkpoint_every": "9"},
        {"export_every": 5},
        {"best": True},
        {"min_workers": 1},
        {"shared_output": True},
        {"eval_every": 3},
        {"checkpoint_activations": True},
        {"shard_size": 2},
    ]
    for settings in (*machines, {"strategy": "fsdp"}, {"micro_batch": 2}):
        assert identity(replace(config, **settings)) == identity(config)
    for settings in (
        {"seed": 1},
        {"batch_size": 7},
        {"epochs": 2.0},
        {"data": "x"},
        {"max_length": 9},
        {"precision": "bfloat16"},
    ):
        assert identity(replace(config, **settings)) != identity(config)


@pytest.mark.parametrize("name", ["model", "data", "mix", "eval_data", "store", "images"])
def test_no_output_replaces_what_the_run_reads(name, tmp_path, monkeypatch):
    """At its end a run replaces its output folder as a whole; a link to an input counts as the input."""
    from pipelines.train.run import train

    (tmp_path / "read").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "read")
    monkeypatch.setattr("pipelines.train.run.check_data", lambda _: pytest.fail("the run began"))
    path = str(tmp_path / "link" / "part")
    places = {**PLACES, "output": str(tmp_path / "read"), name: {path: 1.0} if name == "mix" else path}
    with pytest.raises(ValueError, match=r"this run reads .*/read/part, which would be deleted: name another folder"):
        train(TrainConfig(stage="sft", **places))


def test_intervals_and_numbers_of_workers_are_read_from_text():
    assert parse_interval("200") == (200, None) and parse_interval("0.5m") == (None, 30.0)
    assert worker_range("4") == (4, 4) and worker_range("2..8") == (2, 8) and worker_range(3) == (3, 3)
    for text in ("0", "0m", "-1", "ten", "10 m", "1e3", "\u0663", "m"):
        with pytest.raises(ValueError, match="give a number of steps, as 200, or of minutes, as 10m"):
            parse_interval(text)
    for text in ("0", "8..2", "2..", "..2", "2-8", "x"):
        with pytest.raises(typer.BadParameter, match="give a number of workers"):
            worker_range(text)


def test_a_local_output_on_several_nodes_is_refused(monkeypatch):
    from pipelines.train import run

    config = TrainConfig(stage="sft", model="m", data="d", store="s", output="/out")
    node = {"Alive": True}
    for nodes in ([node], [node, {"Alive": False}]):
        monkeypatch.setattr(run.ray, "nodes", lambda nodes=nodes: nodes)
        run.check_shared(config)
    monkeypatch.setattr(run.ray, "nodes", lambda: [node, node])
    run.check_shared(replace(config, shared_output=True))
    with pytest.raises(DataError, match=r"^--output /out: the cluster has 2 nodes, .* add --shared-output$"):
        run.check_shared(config)

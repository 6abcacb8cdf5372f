"""Recipes and plans on the command line; nothing is trained."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from typer.testing import CliRunner

from mova_core.data import DataError
from mova_core.features import FeatureStore
from pipelines.cli.main import app
from pipelines.train.config import STAGES, TrainConfig
from pipelines.train.gpus import parse_gpus
from pipelines.train.recipes import PAPER, RECIPES
from pipelines.train.settings import check_settings
from tests.mova_core.conftest import mini_folder
from tests.pipelines.cli.json_page import check

__all__ = ["mini_folder"]
PLACES: dict[str, Any] = {"model": "m", "data": "d", "store": "s", "output": "o"}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def arguments(mini_folder, tmp_path) -> list[object]:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}] * 256))
    FeatureStore(tmp_path / "store", create=True)
    shared = ["--model", mini_folder, "--data", tmp_path / "data.json", "--store", tmp_path / "store"]
    return [*shared, "--output", tmp_path / "out"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_run_that_its_stage_takes(name):
    recipe = RECIPES[name]()
    assert name.rpartition("/")[2] in (recipe.stage, "lora") and recipe.stage in STAGES
    assert set(recipe.settings) <= {field.name for field in fields(TrainConfig)}
    workers = parse_gpus(recipe.gpus.value).count
    config = TrainConfig(stage=recipe.stage, **PLACES, **recipe.values() | {"workers": workers})
    check_settings(config)
    assert config.batch_size % workers == 0 and config.unlabelled == "refuse"


@pytest.mark.parametrize("llm", ["vicuna-7b", "llama3-8b", "hermes-yi-34b"])
def test_the_papers_numbers_are_marked(llm):
    """PAPER: arXiv 2404.13046; neither warm-up, schedule, weight decay nor length stand there."""
    first, second = RECIPES[f"{llm}/pretrain"](), RECIPES[f"{llm}/sft"]()
    numbers = {"pretrain": (2e-4, 1024, 15_000_000), "sft": (2e-5, 128, 1_600_000)}
    for recipe in (first, second):
        found = (recipe.settings["learning_rate"].value, recipe.settings["batch_size"].value, recipe.samples)
        assert found == numbers[recipe.stage]
        of_paper = {key for key, setting in recipe.settings.items() if setting.source == PAPER}
        assert {"learning_rate", "batch_size"} <= of_paper and recipe.gpus.source == PAPER
        assert not of_paper & {"warmup", "weight_decay", "max_length", "clip_norm", "strategy", "precision"}
    assert first.settings["epochs"].source == PAPER != second.settings["epochs"].source
    gpus = {"hermes-yi-34b": ("128xA100-80G", "64xA100-80G")}.get(llm, ("64xA100-80G", "32xA100-80G"))
    assert (first.gpus.value, second.gpus.value) == gpus


def test_recipes_are_listed_without_torch():
    script = (
        "import sys; from pipelines.cli.main import app; app(['train', 'recipe', '--json'], standalone_mode=False); "
    )
    script += "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    rows = json.loads(done.stdout)
    check("train recipe", rows, "### Without a name")
    assert [row["recipe"] for row in rows] == list(RECIPES)
    assert "llava-665k/sft" in run("train", "recipe").stdout
    wrong = run("train", "recipe", "vicuna")
    assert wrong.exit_code == 2 and "no recipe vicuna: there are vicuna-7b/pretrain" in " ".join(wrong.output.split())


def test_a_recipe_is_printed_with_its_plan():
    arguments = ["train", "recipe", "vicuna-7b/sft", "--gpus", "8xA100-80G"]
    printed = json.loads(run(*arguments, "--json").stdout)
    check("train recipe", printed)
    assert (printed["steps"], printed["plan"]["gpus"]["count"], printed["plan"]["micro_batch"]) == (12_500, 8, 16)
    shown = run(*arguments).stdout
    assert re.search(r"learning_rate +2e-05 +paper\n", shown) and re.search(r"warmup +0.03 +published code\n", shown)
    assert "12,500 steps" in shown and "8 x A100 with 80 GB" in shown and "fits: yes" in shown


def test_options_win_over_the_recipe_and_the_plan_is_printed(arguments):
    planned = ["--recipe", "vicuna-7b/sft", "--gpus", "2xA100-80G", "--routing-samples", 0, "--dry-run"]
    result = json.loads(run("train", "sft", *arguments, *planned, "--batch-size", 64, "--json").stdout)
    check("train", result)
    plan = result["plan"]
    assert (result["steps"], plan["strategy"], plan["micro_batch"] * plan["micro_batches"]) == (4, "fsdp", 32)
    assert plan["checkpoint_activations"] and plan["precision"] == "bfloat16" and plan["fits"]
    other = ["--strategy", "ddp", "--precision", "float32", "--no-checkpoint-activations", "--micro-batch", 2]
    result = json.loads(run("train", "sft", *arguments, *planned, *other, "--json").stdout)
    plan = result["plan"]
    assert (plan["strategy"], plan["precision"], plan["checkpoint_activations"]) == ("ddp", "float32", False)
    assert (result["steps"], plan["micro_batch"], plan["micro_batches"]) == (2, 2, 32)
    shown = run("train", "sft", *arguments, *planned).stdout
    assert "nothing was trained" in shown and "largest that fits" in shown


def test_a_run_that_cannot_fit_is_refused_before_ray_starts(arguments, monkeypatch):
    monkeypatch.setattr("cluster.session.ray_session", lambda *_: pytest.fail("Ray was started"))
    result = run("train", "sft", *arguments, "--gpus", "2xToy-3G", "--batch-size", 8, "--micro-batch", "auto")
    assert isinstance(result.exception, DataError)
    assert "sft needs" in str(result.exception) and "with one sample at once, and there are 2 x Toy" in str(
        result.exception
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "vicuna-7b/pretrain"], "--recipe vicuna-7b/pretrain is of `mova train pretrain`"),
        (["--gpus", "2xToy-3G", "--workers", "3"], "--workers 3 and --gpus with 2 GPUs: give one of them"),
        (["--gpus", "many"], "'many' names no GPUs"),
        (["--micro-batch", "-3"], "'-3' is no number of samples"),
        (["--micro-batch", "auto"], "--micro-batch auto needs the memory of the GPUs"),
    ],
)
def test_options_that_do_not_go_together(arguments, options, message):
    result = run("train", "sft", *arguments, "--batch-size", 8, *options)
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())

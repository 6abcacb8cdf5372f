"""Values of options: URLs reach the code unchanged, NAME=VALUE pairs name an expert, a model decides the experts' settings."""

import json
import re
from dataclasses import fields
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mova_core.data import DataError
from mova_core.experts import EXPERTS
from mova_core.features import FeatureStore
from pipelines.cli.main import app
from pipelines.cli.options import NameValue, by_expert, cost_number, expert_settings, name_value
from pipelines.cli.paths import path_or_url
from pipelines.cli.train import option_defaults, train_config
from pipelines.cli.train_options import OPTIONS, STAGE_OPTIONS
from pipelines.train.config import STAGES, TrainConfig
from tests.pipelines.cli.json_page import check

URLS = ("s3://bucket/store", "gs://bucket/a//b", "https://example.org/x.json?v=1", "memory://store")


@pytest.fixture
def model(tmp_path):
    pool = [{"name": "sam", "dtype": "bfloat16"}, {"name": "vary", "dtype": "bfloat16"}]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mova", "pool": pool, "expert_size": "mini"}))
    return folder


def usage_error(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 2, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.mark.parametrize("url", URLS)
def test_a_url_stays_as_it_is(url):
    assert path_or_url(url) == url


def test_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert path_or_url("a/b.json") == str(tmp_path.resolve() / "a/b.json")


@pytest.mark.parametrize("stage", STAGES)
def test_train_gets_urls_and_the_defaults_of_its_stage(stage, model, tmp_path, monkeypatch):
    """`mova train --store s3://bucket/x` once read the local folder s3:/bucket/x."""
    reached = []

    def record(*arguments: Any) -> None:
        reached.append(train_config(*arguments))
        raise SystemExit  # before Ray starts

    monkeypatch.setattr("pipelines.cli.train.train_config", record)
    urls: dict[str, Any] = {
        "data": "s3://bucket/data.json",
        "store": "s3://bucket/store",
        "images": "gs://bucket/images",
    }
    given = [part for name, url in urls.items() for part in (f"--{name}", url)]
    CliRunner().invoke(app, ["train", stage, *given, "--model", str(model), "--output", str(tmp_path / "out")])
    [config] = reached
    assert {name: getattr(config, name) for name in urls} == urls
    assert config == TrainConfig(stage=stage, model=str(model), output=str(tmp_path / "out"), **urls)


def test_options_of_training_are_fields_of_its_config():
    names = {field.name for field in fields(TrainConfig)}
    for stage in STAGES:
        options = OPTIONS | STAGE_OPTIONS.get(stage, {})
        assert options.keys() <= names and options.keys() - option_defaults(stage) == {
            "data",
            "model",
            "output",
        }


@pytest.mark.parametrize(
    "pair, message",
    [
        ("sam:abc", "'sam:abc' is no NAME=VALUE"),
        ("dinov2=abc", "NAME must be one of sam, vary"),
        ("sam=", "is no NAME="),
    ],
)
def test_a_fingerprint_names_an_expert_of_the_model(pair, message, model, tmp_path):
    shared = ["--model", model, "--data", "d.json", "--store", "s", "--output", tmp_path / "out"]
    assert message in usage_error("train", "sft", *shared, "--fingerprint", pair)


def test_pairs_name_experts_once_and_in_the_right_form():
    pairs = [name_value("sam=1.5"), name_value("vary=2")]
    assert by_expert("--cost", pairs, EXPERTS, cost_number) == {"sam": 1.5, "vary": 2.0}
    for wrong, message in (
        (NameValue("foo", "1"), "--cost foo=1: NAME must be one of dinov2"),
        (NameValue("sam", "2"), "--cost: sam is given twice"),
        (NameValue("codetr", "fast"), "--cost codetr=fast: write NAME=NUMBER"),
    ):
        with pytest.raises(typer.BadParameter, match=re.escape(message)):
            by_expert("--cost", [*pairs, wrong], EXPERTS, cost_number)


def test_a_model_decides_experts_size_and_dtype_where_the_options_do_not(model):
    settings = expert_settings(model, None, None, None)
    assert (settings.names, settings.size, settings.dtype, settings.stored) == (["sam", "vary"], "mini", "bfloat16", {})
    other = expert_settings(model, "vary", "full", "float32")
    assert (other.names, other.size, other.dtype, other.stored) == (["vary"], "full", "float32", {"vary": "bfloat16"})
    plain = expert_settings(None, None, None, None)
    assert (plain.names, plain.size, plain.dtype, plain.stored) == ([*EXPERTS], "full", "float32", {})


def test_a_folder_without_a_model_is_a_usage_error(tmp_path):
    assert "is no MoVA model" in usage_error("precompute", "x", "--store", "s", "--model", tmp_path)


@pytest.mark.parametrize("command", ["train sft", "label", "evaluate"])
def test_a_bad_record_is_reported_before_ray_starts(command, model, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.session.ray_session", lambda *_: pytest.fail("Ray was started"))
    data = tmp_path / "data.jsonl"
    data.write_text('{"image": "a.png"')
    FeatureStore(tmp_path / "store", create=True)
    shared = ["--model", str(model), "--data", str(data), "--store", str(tmp_path / "store")]
    output = [] if command == "evaluate" else ["--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command.split(), *shared, *output])
    assert isinstance(result.exception, DataError) and "line 1: broken JSON" in str(result.exception)


def test_a_dry_run_of_training_counts_and_starts_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.session.ray_session", lambda *_: pytest.fail("Ray was started"))
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [{"image": "a.png", "routing": ["sam"], "conversations": turns}] * 9 + [{"conversations": turns}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "a.png").write_bytes(b"a")
    FeatureStore(tmp_path / "store", create=True)
    arguments = ["train", "router", "--dry-run", "--model", model, "--data", tmp_path / "data.json", "--store"]
    arguments += [tmp_path / "store", "--output", tmp_path / "out", "--batch-size", "4", "--epochs", "3"]
    counts = json.loads(CliRunner().invoke(app, [*map(str, arguments), "--json"]).stdout)
    check("train", counts)
    assert (counts["samples"], counts["steps"], counts["left_out"]) == (9, 6, {"no picture": 1})
    shown = CliRunner().invoke(app, [*map(str, arguments)]).stdout
    assert "nothing was trained" in shown and "left out, no picture: 1" in shown and not (tmp_path / "out").exists()


def test_experts_of_a_model(model):
    listed = json.loads(CliRunner().invoke(app, ["experts", "--model", str(model), "--json"]).stdout)
    assert [row["expert"] for row in listed] == ["clip", "sam", "vary"] and listed[1]["input"] < 512, "size mini"
    shown = CliRunner().invoke(app, ["experts", "--model", str(model)]).stdout
    assert [row.split()[:2] for row in shown.splitlines()[-2:]] == [["A", "sam"], ["B", "vary"]]

"""The whole path with a real Ray on this machine, at a size that a test can wait for."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from typer.testing import CliRunner

from mova_core.answering import Answerer, Question
from mova_core.data import DataError, read_samples
from mova_core.experts import EXPERTS
from mova_core.features import FeatureStore, StoreError
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.cli.main import app
from pipelines.demo.run import demo
from pipelines.evaluate.run import evaluate
from pipelines.label import label
from pipelines.train.config import TrainConfig
from pipelines.train.run import train
from tests.pipelines.cli.json_page import check

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def test_demo_goes_from_pictures_to_a_report(ran):
    config, result = ran
    root = Path(config.folder)
    check("demo", result)
    answered = json.loads((root / "answers.json").read_text())
    check("evaluate", {name: value for name, value in answered.items() if name != "answers"})
    check("evaluate", answered["answers"], "### The file of `--answers`")
    for stage in ("pretrain", "sft", "router"):
        check("train", json.loads((root / "stages" / f"{stage}.json").read_text())["result"])
    labels = json.loads((root / "stages" / "label.json").read_text())["result"]
    check("label", {name: value for name, value in labels.items() if name != "seconds"})  # the stage adds its time
    questions = read_samples(root / "data" / "test.json", root / "data" / "images")
    assert (
        len(result["kinds"]) == 5 and sum(row["questions"] for row in result["kinds"].values()) == len(questions) == 45
    )
    for row in result["kinds"].values():
        assert set(row) == {"questions", "accuracy", "chance", "experts"}
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["chance"] <= 1 and set(row["experts"]) <= set(EXPERTS)
    assert result["features_computed"] == 7 * 60 and result["features_reused"] == 0
    bad = {Path(row["path"]).name: row["reason"] for row in result["quarantined"]}
    assert set(bad) == {"truncated.jpg", "empty.png", "bomb.png", "notes.png"} and all(bad.values())
    assert result["peak_bytes"] > 2**28

    labelled = read_samples(root / "train.routed.json", root / "data" / "images")
    for sample in labelled:
        losses = sample.extra["routing_losses"]
        useful = sorted((loss, name) for name, loss in losses.items() if name != "none" and loss < losses["none"])
        assert sample.routing is not None and len(sample.routing) == min(3, len(useful))
        assert [losses[name] for name in sample.routing] == [loss for loss, _ in useful[:3]]

    before = MoVAForConditionalGeneration.from_pretrained(root / "sft")
    model = MoVAForConditionalGeneration.from_pretrained(root / "router")
    assert model.has_routing_lora and not before.has_routing_lora
    assert model.config.fingerprints == FeatureStore(root / "store").fingerprints
    for name, value in before.adapter.state_dict().items():
        assert value.equal(model.adapter.state_dict()[name]), "the router stage trains the LoRA and nothing else"
    lora = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert lora and any(value.any() for value in lora)

    page = (root / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 15 and "http" not in page and "random" in page


def test_second_run_computes_nothing(ran):
    config, first = ran
    said: list[str] = []
    again = demo(config, progress=False, log=said.append)
    assert again["features_computed"] == 0 and again["features_reused"] == first["features_computed"]
    assert again["kinds"] == first["kinds"]
    assert any("0 features computed, 420 reused" in line for line in said)
    assert sum("done before" in line for line in said) == 6
    assert again["seconds"] < first["seconds"] / 3


def test_stages_train_what_the_paper_says(ran):
    root = Path(ran[0].folder)
    start, pretrained, tuned = (
        MoVAForConditionalGeneration.from_pretrained(root / name).state_dict() for name in ("start", "pretrain", "sft")
    )

    def moved(one, other, part):
        return any(not value.equal(other[name]) for name, value in one.items() if name.startswith(part))

    assert moved(start, pretrained, "adapter.") and moved(start, pretrained, "base_encoder.")
    assert not moved(start, pretrained, "language_model."), "the LLM is frozen in pre-training"
    assert moved(pretrained, tuned, "language_model.") and moved(pretrained, tuned, "adapter.")


def test_a_store_of_other_weights_is_refused(ran, tmp_path):
    root = Path(ran[0].folder)
    held = FeatureStore(root / "store").partition("sam").description
    FeatureStore(tmp_path / "store", create=True).add_expert(held | {"weights": "0" * 32})
    with pytest.raises(StoreError, match=r"sam.*mova precompute"):
        evaluate(str(root / "router"), str(root / "data" / "test.json"), str(tmp_path / "store"))
    settings = TrainConfig(
        stage="sft", model=str(root / "sft"), data=str(root / "data" / "train.json"), store=str(tmp_path / "store"),
        images=str(root / "data" / "images"), output=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(StoreError, match=r"sam.*mova precompute"):
        train(settings)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli.main", *arguments]


def test_ask_evaluate_and_store_on_the_command_line(ran):
    root = Path(ran[0].folder)
    picture = (
        next((root / "data" / "images").glob("photo*"), None) or sorted((root / "data" / "images").rglob("*.jpg"))[0]
    )

    def mova(*arguments: str) -> Any:
        done = CliRunner().invoke(app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    said = mova("ask", str(picture), "Is it bright or dark?", "--model", str(root / "router"), "--force", "sam,deplot")
    assert said["experts"] == ["sam", "deplot"] and len(said["gates"]) == 2
    stored = mova("ask", str(picture), "Is it bright or dark?", "--model", str(root / "router"), "--force", "sam,deplot",
                  "--store", str(root / "store"))  # fmt: skip
    assert stored["text"] == said["text"]
    stat = mova("store", "stat", str(root / "store"))
    assert {name: row["features"] for name, row in stat["experts"].items()} == dict.fromkeys(EXPERTS, 60)
    assert mova("store", "verify", str(root / "store"))["damaged"] == []
    listed = mova("store", "ls", str(root / "store"))
    check("store ls", listed)
    assert {row["expert"] for row in listed} == set(EXPERTS)


def test_a_light_router_learns_and_bad_rows_are_left_out(ran, tmp_path):
    """Labels by kind of picture, which a question and a picture tell; in between rows that nobody can use."""
    root = Path(ran[0].folder)
    useful = {"chart": ["deplot", "pix2struct"], "medical": ["biomedclip"], "photo": ["dinov2"], "document": ["vary"]}
    records = json.loads((root / "data" / "train.json").read_text())
    lines = [json.dumps(record | {"routing": useful.get(record["kind"], [])}) for record in records]
    data = tmp_path / "routed.jsonl"
    data.write_text("\n".join(["{torn}", *lines, json.dumps(records[0] | {"routing": ["telescope"]})]))
    images = str(root / "data" / "images")
    settings = TrainConfig(
        stage="light-router", model=str(root / "router"), data=str(data), images=images, store=str(root / "store"),
        output=str(tmp_path / "light"), learning_rate=1e-2, batch_size=16, epochs=6, workers=1, bad_rows="skip",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"routed.jsonl, record 1, line 1: broken JSON"):
        train(replace(settings, bad_rows="raise"))
    done = train(settings, progress=False)
    assert done["samples"] == len(records) and done["steps"] == 6 * (len(records) // 16)
    assert [line.split(":")[0] for line in done["skipped"]] == [
        f"{data}, record {n}, line {n}" for n in (1, len(lines) + 2)
    ]
    assert "telescope" in done["skipped"][1]

    before = MoVAForConditionalGeneration.from_pretrained(root / "router")
    model = MoVAForConditionalGeneration.from_pretrained(tmp_path / "light")
    trained = model.state_dict()
    assert all(value.equal(trained[name]) for name, value in before.state_dict().items()), "nothing else learns"
    assert {name.split(".")[0] for name in trained.keys() - before.state_dict().keys()} == {"light_router"}
    assert model.has_routing_lora and model.config.light_router == 512

    data.write_text("\n".join(lines))
    samples = read_samples(data, images)
    answerer = Answerer(
        model,
        MoVAProcessor.from_pretrained(tmp_path / "light"),
        FeatureStore(root / "store", fingerprints=model.config.fingerprints),
        router="light",
    )
    replies = answerer.answer([Question(image=sample.images, text=sample.question) for sample in samples], 1)
    right = [set(reply.experts) == set(sample.routing or ()) for reply, sample in zip(replies, samples, strict=True)]
    most = Counter(sample.routing for sample in samples).most_common(1)[0][1]
    assert sum(right) > 0.9 * len(samples) > 3 * most

    chart = next(sample for sample in samples if sample.routing == ("deplot", "pix2struct"))
    ask = ["ask", str(chart.images[0].path), chart.question, "--model", str(tmp_path / "light"), "--router", "light"]
    for limit, experts in (([], {"deplot", "pix2struct"}), (["--budget", "0"], set())):
        said = CliRunner().invoke(app, [*ask, *limit, "--json"])
        assert said.exit_code == 0, said.output
        assert set(json.loads(said.stdout)["experts"]) == experts


def test_bad_rows_of_a_test_set(ran, tmp_path):
    """Labelled and evaluated are the rest, and both tell."""
    root = Path(ran[0].folder)
    records = json.loads((root / "data" / "test.json").read_text())[:4]
    several = records[0] | {"image": [records[0]["image"], records[1]["image"]]}
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join([*map(json.dumps, records), json.dumps(several).replace("<image>", ""), "[]"]))
    common: dict[str, Any] = {"images": str(root / "data" / "images"), "bad_rows": "skip", "progress": False}
    judged = evaluate(str(root / "router"), str(data), str(root / "store"), train=str(data), **common)
    assert len(judged["answers"]) == 4 and judged["left_out"] == {"several pictures": 1} and judged["unanswered"] == 1
    # In the order of the file, then those of the training file.
    assert [line.split(":")[0] for line in judged["skipped"]] == [f"{data}, record 6, line 6"] * 2
    done = label(str(root / "sft"), str(data), str(root / "store"), str(tmp_path / "labelled.json"), **common)
    assert done.samples == 5 and done.unlabelled == 0 and len(done.skipped) == 1
    labelled = json.loads((tmp_path / "labelled.json").read_text())
    assert [record["id"] for record in labelled] == [record["id"] for record in [*records, several]]
    assert all("routing" in record for record in labelled)


def test_training_goes_on_from_its_last_checkpoint(ran, tmp_path):
    """kill -9 of the driver after a checkpoint; the same command takes up from there."""
    root = Path(ran[0].folder)
    arguments = [
        "train", "pretrain", "--model", str(root / "start"), "--data", str(root / "data" / "train.json"),
        "--images", str(root / "data" / "images"), "--store", str(root / "store"), "--output", str(tmp_path / "out"),
        "--batch-size", "16", "--epochs", "2", "--checkpoint-every", "4", "--unlabelled", "random", "--json", "--quiet",
    ]  # fmt: skip
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    first = subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 150
    while not any((tmp_path / "out.ray").glob("pretrain-*/step-*/state.json")):  # a complete checkpoint
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process().children(recursive=True)
    workers = [process for process in children if "RayTrainWorker" in "".join(process.cmdline())]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=60)[1], "Ray ends what a driver leaves"
    assert not (tmp_path / "out").exists()

    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 0, second.output
    result = json.loads(second.stdout)
    assert result["resumed_from"] >= 4 and result["steps"] > result["resumed_from"]
    assert MoVAForConditionalGeneration.from_pretrained(tmp_path / "out").config.experts == EXPERTS
    assert not (tmp_path / "out.ray").exists()


@pytest.fixture
def orphans_are_ours() -> Iterator[None]:
    """Whatever loses its parent becomes a child of this process, so that nothing a command started gets out of sight."""
    PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


def test_ctrl_c_leaves_nothing_running_and_the_next_run_resumes(ran, orphans_are_ours, tmp_path):
    images = Path(ran[0].folder) / "data" / "images"
    arguments = [
        "precompute", str(images), "--store", str(tmp_path / "store"), "--size", "mini", "--shard-mb", "0.1", "--quiet",
        "--json", "--experts", "sam,vary",
    ]  # fmt: skip
    before = set(psutil.Process().children(recursive=True))
    first = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "store").glob("*/*/receipts/*.parquet")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=60)
    assert first.returncode == 130 and "resumes from them" in told and told.count("\n") == 1, told
    started = set(psutil.Process().children(recursive=True)) - before
    _, left = psutil.wait_procs(started, timeout=20)
    assert not left, "neither what the run had started nor what it started while it stopped"
    assert not set(psutil.Process().children(recursive=True)) - before

    kept = sum(row["features"] for row in FeatureStore(tmp_path / "store").stat()["experts"].values())
    second = CliRunner().invoke(app, arguments)
    assert second.exit_code == 0, second.output
    summary = json.loads(second.stdout)
    check("precompute", summary)
    assert sum(summary["reused"].values()) == kept and 0 < kept < 2 * 60
    assert sum(summary["computed"].values()) == 2 * 60 - kept
    assert not list(FeatureStore(tmp_path / "store").verify())

"""A worker's parameters against those computed apart: row by row, with AdamW and clipping written out by hand."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import cos, pi
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file

from mova_core.features import FeatureStore
from mova_core.images import ImageRef
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import IGNORE, MoVAProcessor
from pipelines.train import loop
from pipelines.train.batches import StageSamples
from pipelines.train.checkpoint import Checkpoints, RunState
from pipelines.train.config import TrainConfig
from pipelines.train.data import check_data
from pipelines.train.export import MODEL
from pipelines.train.metrics import read_metrics
from tests.pipelines.cli.json_page import check
from tests.pipelines.train.places import LABELS, write_places

BATCH, STEPS, SEED, RATE, DECAY, CLIP = 2, 3, 5, 1e-3, 0.1, 0.05


@pytest.fixture
def places(mini_folder, pictures, tmp_path, request) -> dict[str, str]:
    """A model without dropout, data and a store; a parameter (expert, picture) plants NaN in that expert's feature of that picture."""
    return write_places(tmp_path, mini_folder, pictures, planted=getattr(request, "param", None))


def loss_row_by_row(model, processor, store, records, positions, loss) -> torch.Tensor:
    """Mean cross entropy over the answers' tokens of a batch, or over its samples, each sample alone in its forward pass."""
    total, items = torch.zeros(()), 0
    for position in positions:
        record = records[position]
        turns = [("user", record["conversations"][0]["value"]), ("assistant", record["conversations"][1]["value"])]
        images = [ImageRef(path=path) for path in record["image"]]
        row = processor([turns], [images], labels=True)
        if images:
            features = store.fetch(images, [record["routing"]] * len(images))
            row["experts"] = {
                name: found._replace(tokens=torch.stack([one[name].tokens for one in features]).float())
                for name, found in features[0].items()
            }
            row["routing"] = torch.tensor([[name in record["routing"] for name in model.config.experts]] * len(images))
        count = int((row["labels"] != IGNORE).sum())
        weight = count if loss == "token" else 1
        total, items = total + weight * model(**row).loss, items + weight
    return total / items


def parameters_by_hand(
    places: dict[str, str], kind: str, left_out: int | None = None
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Every parameter after `STEPS` steps, and of each step the loss and the norm of its gradient before clipping.

    Args:
        left_out: a step that changes nothing but the learning rate of those after it.
    """
    model = MoVAForConditionalGeneration.from_pretrained(places["model"], dtype=torch.float32).train()
    processor, store = MoVAProcessor.from_pretrained(places["model"]), FeatureStore(places["store"])
    with open(places["data"]) as file:
        records = [json.loads(line) for line in file]
    trained = dict(model.named_parameters())
    first = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    second = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    order = np.random.default_rng([SEED, 0]).permutation(len(records)).tolist()
    losses, norms, updates = [], [], 0
    for step in range(STEPS):
        if step == left_out:
            continue
        updates += 1
        loss = loss_row_by_row(model, processor, store, records, order[step * BATCH : (step + 1) * BATCH], kind)
        # An expert that no sample of the batch is routed to has the gradient zero: its weights decay.
        found = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
        gradients = dict(zip(trained, found, strict=True))
        norm = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
        rate = RATE * (0.0 if step == 0 else 0.5 * (1 + cos(pi * (step - 1) / (STEPS - 1))))  # one step of warm-up
        for name in gradients:
            gradient = gradients[name] * min(1.0, CLIP / (norm + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, variance = first[name] / (1 - 0.9**updates), second[name] / (1 - 0.999**updates)
            decay = DECAY if gradient.ndim > 1 else 0.0  # norms and biases do not decay
            with torch.no_grad():
                trained[name].mul_(1 - rate * decay).sub_(rate * mean / (variance.sqrt() + 1e-8))
        losses.append(loss.item())
        norms.append(norm)
    return {name: parameter.detach() for name, parameter in trained.items()}, losses, norms


@dataclass
class Trained:
    """What a worker reported: after which steps, its last state and parameters, the lines of its steps, and its progress."""

    steps: list[int]
    state: RunState
    parameters: dict[str, torch.Tensor]
    lines: list[dict[str, Any]]
    shown: list[Any]


@pytest.fixture
def train(places, tmp_path, monkeypatch) -> Callable[..., Trained]:
    def run(**settings: Any) -> Trained:
        states: list[RunState] = []
        save = Checkpoints.save

        def record(checkpoints: Checkpoints, state: RunState) -> None:
            states.append(state)
            save(checkpoints, state)

        monkeypatch.setattr(Checkpoints, "save", record)
        shown: list[Any] = []
        config = {
            "stage": "sft", "output": str(tmp_path / "out"), **places, "learning_rate": RATE, "batch_size": BATCH,
            "warmup": 0.33, "weight_decay": DECAY, "clip_norm": CLIP, "seed": SEED, "workers": 1, "checkpoint_every": 2,
            **settings,
        }  # fmt: skip
        progress = SimpleNamespace(report=lambda *told: shown.append(told))
        # `num_workers=0` is Ray Train's local mode: the worker's function in this process, without a cluster.
        data = check_data(TrainConfig(**config))
        arguments = {"config": config, "rows": data.rows, "sources": [asdict(source) for source in data.sources]}
        held_out = data.held_out and (data.held_out.rows, [asdict(source) for source in data.held_out.sources])
        arguments |= {
            "preemptible": True,
            "progress": progress,
            "run_folder": str(tmp_path / "run"),
            "held_out": held_out,
        }
        TorchTrainer(loop.train_worker, train_loop_config=arguments,
                     scaling_config=ScalingConfig(num_workers=0)).fit()  # fmt: skip
        parameters = load_file(tmp_path / "run" / MODEL / "model.safetensors")
        lines = read_metrics(tmp_path / "run")
        return Trained([state.steps for state in states], states[-1], parameters, lines, shown)

    return run


def distance(parameters: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(float((parameters[name] - value).abs().max()) for name, value in wanted.items())


@pytest.mark.parametrize("kind", ["token", "sample"])
def test_a_worker_trains_on_its_whole_share_with_clipped_gradients(places, train, monkeypatch, tmp_path, kind):
    held_out: dict[str, Any] = (
        {} if kind == "token" else {"eval_data": places["data"], "eval_every": 2}
    )  # which changes nothing
    if kind == "sample":  # a checkpoint after the second step, as the news of a node that goes is heard then
        monkeypatch.setattr(loop, "PREEMPTION_STEPS", 2)
        monkeypatch.setattr(ray.train, "get_preemption_info", lambda: "a node goes")
        held_out |= {"checkpoint_every": "100"}
    trained = train(loss=kind, export_every=3, **held_out)
    wanted, losses, norms = parameters_by_hand(places, kind)
    assert trained.steps == [2, 3], "every second step and the last"
    assert wanted.keys() <= trained.parameters.keys() and min(norms) > CLIP and max(norms) > 1.1 * min(norms), (
        "each step is clipped"
    )
    assert distance(trained.parameters, wanted) < 1e-6
    exported = MoVAForConditionalGeneration.from_pretrained(tmp_path / "out-step-3")
    assert distance(exported.state_dict(), trained.parameters) == 0 and not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.glob("out-*")] == ["out-step-3"]
    metrics = trained.state.metrics
    assert metrics["loss"] == pytest.approx(sum(losses) / STEPS)
    assert [told[:2] for told in trained.shown] == [(1, 3), (2, 3), (3, 3)]
    for line, loss, norm in zip(trained.lines, losses, norms, strict=True):
        assert (line["loss"], line["grad_norm"]) == (pytest.approx(loss), pytest.approx(norm, rel=1e-4))
        assert list(line["sources"]) == ["data"] and line["samples"] == BATCH and line["mfu"] is None
        assert (line["sources"]["data"] == pytest.approx(loss)) == (kind == "token"), "a source's is always per token"
        assert 0 < line["data_wait"] < line["seconds"] and "skipped" not in line
        check("train", line, "### The lines of `metrics.jsonl`")
    evaluated = [line.get("eval_loss") for line in trained.lines]
    assert [loss is not None for loss in evaluated] == ([False] * 3 if kind == "token" else [False, True, True])
    assert metrics.get("eval_loss") == evaluated[-1]
    assert [line["lr"] for line in trained.lines] == [0, RATE, pytest.approx(RATE / 2)]
    order = np.random.default_rng([SEED, 0]).permutation(len(LABELS)).tolist()[: STEPS * BATCH]
    pictures = [1, 1, 1, 1, 1, 0, 2]
    routed = Counter(name for position in order for name in LABELS[position] * pictures[position])
    counted = sum((Counter(line["experts"]) for line in trained.lines), Counter())
    assert {name: rows for name, rows in counted.items() if rows} == routed


def test_the_best_model_is_written_and_not_the_last(places, train, tmp_path):
    """Rates far too high spoil the model after its first step, which has the rate 0; two newer checkpoints follow the best."""
    trained = train(
        best=True, eval_data=places["data"], eval_every=1, epochs=4 / 3, checkpoint_every="1", learning_rate=1.0
    )
    losses = [line["eval_loss"] for line in trained.lines]
    assert len(losses) == 4 and losses[0] == min(losses) and trained.state.best == 1
    assert sorted(path.name[-1] for path in (tmp_path / "run").glob("step-*")) == ["1", "3", "4"]
    start = MoVAForConditionalGeneration.from_pretrained(places["model"]).state_dict()
    assert distance(trained.parameters, start) < 1e-6


@pytest.mark.parametrize("places", [("vary", 2)], indirect=True)
def test_a_step_with_nan_features_changes_nothing_and_is_named(places, train):
    """Sample 2, which is in the second step, alone reads the feature of `vary` for the last picture."""
    trained = train()
    wanted, losses, _ = parameters_by_hand(places, "token", left_out=1)
    assert distance(trained.parameters, wanted) < 1e-6
    assert trained.state.metrics["loss"] == pytest.approx(sum(losses) / 2)
    second = trained.lines[1]
    assert second["skipped"] and second["loss"] is None and second["grad_norm"] is None
    check("train", second, "### The lines of `metrics.jsonl`")
    assert second["suspects"] == [f"{places['data']}, record 3, line 3"]
    assert ["skipped" in line for line in trained.lines] == [False, True, False]
    assert "1 step skipped" in trained.shown[-1][2]


def test_routing_samples_and_broken_pictures_in_a_batch(places, tmp_path, pictures):
    """A batch of an answer, a routing sample and a picture that cannot be decoded is their own rows put together."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with open(places["data"]) as file:
        records = [json.loads(line) for line in file][:3]
    records[1]["image"] = str(tmp_path / "broken.png")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = TrainConfig(stage="sft", output=str(tmp_path / "out"), batch_size=3, routing_samples=2, seed=1, **places)
    data = check_data(config)
    processor = MoVAProcessor.from_pretrained(places["model"])
    pool = json.loads((tmp_path / "model" / "config.json").read_text())["pool"]
    samples = StageSamples(config, data.samples, FeatureStore(places["store"]), processor, pool)
    routing = next(n for n in range(3, len(data.rows)) if data.rows["number"][n] != 2)
    [batch] = samples.__getitems__([0, 1, routing])
    assert batch.errors == [f"{tmp_path}/data.jsonl, record 2, line 2: {batch.errors[0].partition('line 2: ')[2]}"]
    assert "broken.png" in batch.errors[0] and batch.sources.tolist() == [0, 0, 1]
    assert batch.answers[1] == 0 and batch.divisor.tolist() == batch.answers.tolist()
    for row, position in ((0, 0), (2, routing)):
        [alone] = samples.__getitems__([position])
        length = alone.inputs["input_ids"].shape[1]
        for name in ("input_ids", "labels"):
            assert torch.equal(batch.inputs[name][row][:length], alone.inputs[name][0]), name
        picture = min(row, 1)  # the broken one is not shown
        assert torch.equal(batch.inputs["routing"][picture], alone.inputs["routing"][0])
        assert torch.equal(batch.inputs["pixel_values"][picture], alone.inputs["pixel_values"][0])
    assert batch.inputs["coarse"] == [False, True] and not batch.inputs["routing"][1].any()
    said = batch.inputs["labels"][2]
    letters = processor.decode(said[said != IGNORE])
    assert letters == "none" or set(letters) <= set("ABCDEFG, ")
    [nothing] = samples.__getitems__([1])
    assert nothing.answers.tolist() == [0] and nothing.inputs["unseen"] and nothing.inputs["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("stage", ["router", "light-router"])
def test_the_label_stages_write_their_lines_and_evaluate(places, train, stage):
    held_out = {"eval_data": places["data"], "eval_every": 1}
    trained = train(stage=stage, lora_rank=4, **held_out)
    assert len(trained.lines) == trained.state.steps > 1
    for line in trained.lines:
        check("train", line, "### The lines of `metrics.jsonl`")
        assert line["loss"] > 0 and line["eval_loss"] > 0 and line["samples"] == BATCH and line["tokens"] > 10 * BATCH
        assert line["sources"] == {"data": pytest.approx(line["loss"], rel=1e-5)}
        assert line["gate_entropy"] is None and not any(line["experts"].values()), "no expert is fused"
    assert trained.lines[-1]["eval_loss"] != trained.lines[0]["eval_loss"], "the parameters of the stage have changed"

"""The lines of `metrics.jsonl`, the guards against steps that spoil a model, and the count of floating-point operations."""

import json
import time
from collections.abc import Iterator
from math import inf, nan
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mova_core.processing import IGNORE
from pipelines.train.batches import MicroBatch
from pipelines.train.config import TrainConfig
from pipelines.train.flops import ModelFlops, peak_flops
from pipelines.train.meter import StepMeter
from pipelines.train.metrics import METRICS, MetricsFile, TrainingError, check_finite, read_metrics, summary
from pipelines.train.parallelize import parallelize
from tests.pipelines.train.test_parallel import Case, batch_of, tensors, tiny_model

CONFIG = TrainConfig(stage="sft", model="m", data="d", store="s", output="o")


def convolution_backward(gradient, pixels, weight, _1, _2, _3, _4, transposed, _5, groups, mask, **_: Any) -> int:
    """torch's own count takes every convolution for one without groups: 128 times too many for a depthwise one."""
    assert not transposed
    return 2 * weight.numel() * gradient[0] * gradient[2:].numel() * sum(mask[:2])


@pytest.mark.parametrize(
    ("frozen", "routing"),
    [((), "apart"), (("language_model",), "one_text_only"), (("base_encoder", "adapter.text_encoder"), "apart")],
    ids=str,
)
def test_the_count_of_operations_is_that_of_what_runs(frozen, routing):
    model = tiny_model(frozen=False)
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    batches = [tensors([sample], model) for sample in batch_of(0, Case(routing=routing))[:2]]  # no padding
    counted = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter, sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            model(**batch).loss.backward()
    flops = ModelFlops(model)
    assert sum(map(flops.of, batches)) == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_the_peak_of_a_card(monkeypatch):
    assert peak_flops(torch.device("cpu"), "bfloat16") is None
    for name, peak in (("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12), ("Another", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda", 0), "bfloat16") == peak
    assert peak_flops(torch.device("cuda", 0), "float32") is None


def test_a_resumed_run_neither_doubles_nor_loses_a_step(tmp_path):
    log = MetricsFile(tmp_path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": nan if step == 2 else 1.5, "sources": {"a": inf}})
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 6, "lo')  # a kill
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    log = MetricsFile(tmp_path, 3)  # its last checkpoint is of step 3
    for step in range(4, 7):
        log.write({"step": step, "loss": 2.5, "sources": {}})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and [row["loss"] for row in rows] == [
        1.5, None, 1.5, 2.5, 2.5, 2.5,
    ]  # fmt: skip
    assert rows[0]["sources"] == {"a": None}
    assert read_metrics(tmp_path / "nothing") == []


@pytest.fixture(scope="module")
def parallel():
    model = tiny_model(frozen=False)
    return parallelize(model, learning_rate=1e-3)


def micro_batch(inputs: dict[str, Any], answers: Any, positions: Any, sources: Any = (0, 0)) -> MicroBatch:
    counts = torch.as_tensor(answers)
    return MicroBatch(
        inputs=inputs, answers=counts, divisor=counts.float(), positions=torch.as_tensor(positions), sources=torch.tensor(sources)
    )  # fmt: skip


def judged(meter: StepMeter, loss: float, norm: float) -> dict[str, Any]:
    [_] = meter.timed([0])
    meter.begin([micro_batch({"attention_mask": torch.ones(2, 3)}, answers=[2, 2], positions=[7, 4])])
    return meter.end(1, torch.tensor(loss), torch.tensor(norm), 0.1)


def meter_of(parallel) -> StepMeter:
    return StepMeter(parallel, parallel.learner, sources=["data"], where="data.json, record {}".format)


def test_a_large_norm_is_named_and_three_skipped_steps_end_a_run(parallel):
    meter = meter_of(parallel)
    for _ in range(19):
        assert "spike" not in judged(meter, 1.0, 2.0)
    assert "spike" not in judged(meter, 1.0, 21.0), "too few norms for a median"
    assert "spike" not in judged(meter, 1.0, 20.0), "not over ten times the median"
    spike = judged(meter, 1.0, 20.1)
    assert spike["spike"] and spike["suspects"] == ["data.json, record 7", "data.json, record 4"]
    rows = [judged(meter, nan, 1.0), judged(meter, 1.0, inf), judged(meter, 3.0, 1.0), judged(meter, nan, 1.0)]
    assert ["skipped" in row for row in rows] == [True, True, False, True] and not meter.stopped
    resumed = meter_of(parallel)
    resumed.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert resumed.loss == meter.loss == pytest.approx((22 + 1 + 3) / 24) and resumed.norms == meter.norms
    rows += [judged(resumed, inf, 1.0), judged(resumed, nan, nan)]
    assert resumed.stopped and resumed.skipped == 5 and resumed.note(rows[0]).endswith("5 steps skipped")
    check_finite(rows[:-1], CONFIG)
    with pytest.raises(TrainingError, match=r"sft stopped at step 1: .*data.json, record 7 and 1 more\); give a lower"):
        check_finite(rows, CONFIG)


def test_the_summary_of_a_run():
    rows = [{"tokens": 30, "seconds": 1.0, "data_wait": 0.5, "mfu": 0.4}, {"tokens": 10, "seconds": 3.0, "data_wait": 0.5, "mfu": 0.2, "skipped": True, "eval_loss": 3.5}]  # fmt: skip
    assert summary(rows) == {"tokens_per_second": 10, "data_wait": 0.25, "mfu": pytest.approx(0.25), "skipped_steps": 1, "eval_loss": 3.5}  # fmt: skip
    assert summary([]) == {"tokens_per_second": None, "data_wait": None, "mfu": None, "skipped_steps": 0, "eval_loss": None}  # fmt: skip


def test_gate_entropy_and_losses_per_source(parallel):
    model, meter = parallel.learner, meter_of(parallel)
    meter.sources = ["first", "second"]
    batch = tensors(batch_of(0, Case(routing="alike")), model)
    terms = (batch["labels"][:, 1:] != IGNORE).sum(1)
    [_] = meter.timed([0])
    meter.begin([micro_batch(batch, answers=terms, positions=torch.arange(4), sources=(0, 1, 1, 0))])
    output = model(**batch)
    row = meter.end(1, output.loss, torch.tensor(1.0), 0.1)
    for name, places in (("first", [0, 3]), ("second", [1, 2])):
        assert row["sources"][name] == pytest.approx(float(output.row_losses[places].sum() / terms[places].sum()))
    assert row["experts"]["dinov2"] == row["experts"]["sam"] == 4 and sum(row["experts"].values()) == 8
    images = model.encode_base(batch["pixel_values"])
    text = {"input_ids": batch["text_input_ids"], "attention_mask": batch["text_attention_mask"]}
    _, gates = model.encode_image(images, text, batch["experts"], batch["routing"])
    entropies = [torch.distributions.Categorical(probs=gate[gate.sum(1) > 0]).entropy() for gate in gates]
    assert row["gate_entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)


def test_the_wait_for_data_and_the_mfu_of_a_step(parallel):
    def slow() -> Iterator[int]:
        time.sleep(0.03)
        yield 0

    model, flops = parallel.learner, ModelFlops(parallel.learner)
    meter = StepMeter(parallel, model, sources=["data"], where=str, flops=flops, peak=1e9)
    inputs = tensors(batch_of(0, Case()), model)
    next(meter.timed(slow()))
    meter.begin([micro_batch(inputs, answers=[1] * 4, positions=range(4), sources=[0] * 4)] * 2)
    time.sleep(0.01)
    row = meter.end(1, torch.tensor(1.0), torch.tensor(1.0), 0.1)
    assert 0.03 <= row["data_wait"] <= row["seconds"] - 0.01
    assert row["mfu"] * row["seconds"] * 1e9 == pytest.approx(2 * flops.of(inputs))
    assert row["tokens"] == 2 * int(inputs["attention_mask"].sum()) and row["samples"] == 8
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])

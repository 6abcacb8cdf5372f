"""Every table of every command with values as wide as they get: no number and no name is cut, whatever the terminal's width."""

from collections.abc import Callable
from typing import Any

import pytest

from cluster.placement import Placement
from cluster.pools import PoolSpec
from mova_core.answering import Answer
from mova_core.experts.cost import Measured, Profile
from mova_core.figures import number, percent
from pipelines.cli import ask, convert, evaluate, experts, label, plan, precompute, profile, store, train
from pipelines.cli.output import fields
from pipelines.precompute.run import Summary
from tests.pipelines.cli.test_output import in_terminal

PICTURES = 15_234_567
EXPERTS = ("our-satellite-encoder-v2", "pix2struct", "sam")
DEVICE, CARD = "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "NVIDIA H100 80GB HBM3"
STORE = "s3://a-long-bucket-name-of-a-company/teams/vision/mova/features/production-2026"
FINGERPRINT = "0123456789abcdef"
FOLDER = "/mnt/shared/teams/vision/experiments/2026-11-27/tuned-on-15-million-pictures"


def rows_of(**values: Any) -> dict[str, dict[str, Any]]:
    return {name: dict(values) for name in EXPERTS}


SUMMARY = Summary(
    images=PICTURES,
    computed=dict.fromkeys(EXPERTS, PICTURES),
    reused=dict.fromkeys(EXPERTS, 9_876_543),
    seconds=345_678.9,
    experts=rows_of(
        computed=PICTURES, reused=9_876_543, bytes=98_765_432 << 20, images_per_second=12_345.67, busy=0.987
    ),
    quarantined=[{"path": f"{FOLDER}/0001.png", "reason": "sam: the picture has 12,345,678,901 pixels"}],
)
STATUS = {
    "job": "1127-120000-abc",
    "store": STORE,
    "seconds": 345_678.9,
    "experts": rows_of(
        done=9_876_543,
        total=PICTURES,
        images_per_second=12_345.67,
        eta_seconds=1_234_567,
        actors=1234,
        queue=123_456,
        busy=0.987,
        bytes=98_765_432 << 20,
        pools=["sam=1..64,gpu=0.5,cpu=4,accelerator=A100,batch=128"],
    ),
}
PREVIEW = rows_of(
    wanted=PICTURES,
    there=9_876_543,
    to_compute=PICTURES,
    bytes=98_765_432 << 20,
    hours={CARD: 12_345.6, f"cpu {DEVICE}": 1_234_567.8},
)
PLACED = Placement(
    wanted=dict.fromkeys(EXPERTS, PICTURES),
    pools=[
        PoolSpec(expert=name, max_size=1024, gpu=0.0625, cpu=12.25, accelerator="A100-80G", batch=512, rate=123_456.7)
        for name in EXPERTS
    ],
    sequential=False,
    images_per_second=12_345.6,
    bound=13_456.7,
    shares={"A100-80G": 0.7, "cpu": 0.3},
    gains={"A100-80G": 1234.5},
    notes=[f"{EXPERTS[0]} is not placed on {CARD}, T4, L4, A10G, V100: no profile of it there"],
)
MEASURED = [
    Profile(
        expert=name,
        arch={},
        dtype="bfloat16",
        device=f"cpu {DEVICE}",
        threads=4,
        batches=[Measured(batch=512, images_per_second=123_456.7, peak_bytes=81_920 << 20)],
    )
    for name in EXPERTS
]
POOL = [
    {
        "expert": name,
        "title": "ViT-H/14 distilled from three teachers, with registers",
        "parameters": 12_345_678_901,
        "input": 1024,
        "grid": [128, 128],
        "channels": 1408,
        "flops": 12_345_678_901_234,
        "bytes": 123_456_789,
        "weights": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        "weights_here": True,
    }
    for name in EXPERTS
]
STAT = {
    "path": STORE,
    "quarantined": 1234,
    "experts": {
        name: {
            "fingerprints": {
                FINGERPRINT: {
                    "dtype": "bfloat16",
                    "features": PICTURES,
                    "shards": 123_456,
                    "bytes": 123_456_789_012_345,
                    "bytes_per_feature": 123_456_789,
                    "loss": 0.00123,
                    "max_loss": 0.0123,
                }
            }
        }
        for name in EXPERTS
    },
}
LISTED = [
    {"expert": name, "fingerprint": FINGERPRINT, "grid": [128, 128], "channels": 1408, "dtype": "bfloat16"}
    for name in EXPERTS
]
DIFFERENCE = [
    {"expert": name, "fingerprint": FINGERPRINT, "same": PICTURES, "only_here": 1_234_567, "only_there": 9, "differ": 0}
    for name in EXPERTS
]
REPORT = {
    "source": FOLDER,
    "target": f"{FOLDER}-converted",
    "parts": {name: dict.fromkeys(("tensors", "parameters", "bytes", "written"), 123_456_789_012) for name in EXPERTS},
    "tensors": [{"note": "moved"}] * 12_345,
    "left_out": ["routing_lora"],
}
KINDS = {
    name: {"questions": PICTURES, "accuracy": 0.98765, "chance": 0.12345, "experts": dict.fromkeys(EXPERTS, PICTURES)}
    for name in ("document with a table", "photo")
}


class Labels:
    samples, per_sample, output, unlabelled = PICTURES, 2.345, f"{FOLDER}/routed.json", 12_345
    experts = dict.fromkeys(EXPERTS, 9_876_543)


TRAINED = {
    "stage": "light-router",
    "samples": PICTURES,
    "steps": 1_234_567,
    "loss": 5.624464551607768,
    "seconds": 158_209.27,
    "output": FOLDER,
    "resumed_from": 1_000_000,
    "tokens_per_second": 1_234_567.8,
    "data_wait": 0.0123,
    "mfu": 0.4567,
    "skipped_steps": 12_345,
    "eval_loss": 5.71234,
    "left_out": {"no picture": 40_000},
    "skipped": ["data.json, record 3: no `conversations`"],
}
ANSWER = Answer(
    text="A red square.",
    experts=list(EXPERTS),
    router="A, C, G",
    over_budget={"our-other-encoder": 12_345.6},
    gates=[dict.fromkeys(EXPERTS, 0.333333)] * 3,
    seconds=dict.fromkeys(
        ("preprocess", "base encoder", "routing", "experts", "fusion", "first token", "answer"), 12.3456
    ),
)

# Name -> what prints the output, and cells that a narrow terminal must show too.
OUTPUTS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "experts": (lambda: experts.show_experts(POOL, "full", EXPERTS), [number(12_345.678901), "12,346", "128x128"]),
    "profile": (lambda: profile.show_profiles(MEASURED, "full"), ["512", "123,457", "81,920", DEVICE.split()[-1]]),
    "plan": (lambda: plan.show_plan(PLACED, None), ["1,024", "A100-80G", "0.0625", "123,457"]),
    "precompute": (lambda: precompute.show_summary(SUMMARY), [number(PICTURES), "12,346", percent(0.987), "345,679"]),
    "dry run": (lambda: precompute.show_preview(PREVIEW, PICTURES), [number(PICTURES), "1,234,568", CARD, "12,346"]),
    "status": (lambda: precompute.show_run(STATUS), ["9,876,543", number(PICTURES), "12,346", "1,234,567"]),
    "store ls": (lambda: store.show_ls(STORE, LISTED), [FINGERPRINT, "bfloat16"]),
    "store stat": (lambda: store.show_stat(STAT), [FINGERPRINT, number(PICTURES), "123,456,789", "1.2e-02"]),
    "store diff": (lambda: store.show_diff(STORE, DIFFERENCE, ()), [FINGERPRINT, number(PICTURES), "1,234,567"]),
    "convert": (lambda: convert.show_report(REPORT, False), ["123,456,789,012", "123,457", "12,345", "routing_lora"]),
    "label": (lambda: label.show_labels(Labels), ["9,876,543", number(PICTURES), "2.35", "12,345"]),
    "train": (
        lambda: train.show_training(TRAINED),
        [number(PICTURES), "5.62", "158,209", "1,000,000", "40,000", "1,234,568", "45.7 %", "5.71"],
    ),
    "evaluate": (lambda: evaluate.show_kinds(KINDS), ["document with a table", number(PICTURES), "98.8 %", "12.3 %"]),
    "ask": (lambda: ask.show_answer(ANSWER), ["0.333", "12.3", "our-other-encoder (cost 12,346)"]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_terminal_of_80_columns_cuts_nothing(name):
    program, cells = OUTPUTS[name]
    lines = in_terminal(program, 80).splitlines()
    for wide in (text for text in lines if len(text) > 80):
        assert len(wide.split()) == 1 or wide.startswith("  "), f"the terminal's edge cuts {wide!r}"
        assert max(map(len, wide.split())) > 70, "only a single long word, such as a URL, may reach beyond the edge"
    shown = "\n".join(lines)
    for cell in cells + ([] if name in ("evaluate", "train") else list(EXPERTS)):
        assert cell in shown, f"{cell} is missing in\n{shown}"


TABLES = [name for name in OUTPUTS if name not in ("store diff", "train", "ask")]


@pytest.mark.parametrize("name", TABLES)
def test_realistic_values_fit_a_table_of_80_columns(name):
    """A row per expert, and not a block of lines, which is what a table too wide for the terminal becomes."""
    shown = in_terminal(OUTPUTS[name][0], 80).splitlines()
    assert any(set(text) == {"-", " "} for text in shown), "\n".join(shown)


@pytest.mark.parametrize("name", OUTPUTS)
def test_without_a_terminal_nothing_is_left_out(name, capsys):
    program, cells = OUTPUTS[name]
    program()
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in cells) and "too narrow" not in shown and "…" not in shown


def test_a_value_that_is_wider_than_the_terminal_stays_whole():
    assert STORE in in_terminal(lambda: fields([("store", STORE)]), 40)

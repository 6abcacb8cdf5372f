"""Every strategy on two ranks gives the losses and gradient norms of one process, whatever the ranks are routed to.

One pair of processes runs all cases, because each process needs seconds to import torch.
"""

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM

from mova_core.assemble import assemble
from mova_core.config import MoVAConfig
from mova_core.experts import EXPERTS, Features
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import IGNORE
from pipelines.train.batches import MicroBatch
from pipelines.train.checkpoint import Checkpoints, RunState, own_share, read_state
from pipelines.train.config import Precision, Stage, Strategy, TrainConfig
from pipelines.train.evaluation import HeldOut
from pipelines.train.export import MODEL
from pipelines.train.meter import StepMeter
from pipelines.train.metrics import read_metrics
from pipelines.train.parallel import Parallel
from pipelines.train.parallelize import parallelize
from pipelines.train.stages import LightRouting, choose_parameters
from tests.pipelines.train import interrupted
from tests.pipelines.train.places import write_places

# Two processes that each import torch; DeepSpeed takes seconds to build an engine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
IMAGE, BATCH, STEPS, WORLD = 2, 4, 3, 2
# Experts of the samples at even and at odd places of a batch, which go to rank 0 and rank 1; None: a sample without a picture.
# Mini dinov2 and pix2struct have equally many channels, so that their gradients could be mixed up without an error.
ROUTINGS: dict[str, tuple[list[str] | None, ...]] = {
    "alike": (["dinov2", "sam"], ["dinov2", "sam"]),
    "apart": (["dinov2", "sam"], ["deplot"]),
    "twins": (["dinov2"], ["pix2struct"]),
    "one_unrouted": ([], ["dinov2", "deplot"]),
    "one_text_only": (None, ["dinov2", "deplot"]),
}
EVERY_EXPERT = {"every_expert": (["dinov2", "codetr", "sam"], ["pix2struct", "deplot"], ["vary", "biomedclip"])}


@dataclass(frozen=True, kw_only=True)
class Case:
    routing: str = "apart"
    micro: int = 1  # micro-batches per rank and step


IN_TURN = [Case(routing=routing) for routing in ROUTINGS for _ in range(STEPS)]
EVERY = Case(routing="every_expert")
PLACES: dict[str, Any] = {"model": "m", "data": "d", "store": "s", "output": "o"}
FROZEN: dict[Stage, tuple[str, ...]] = {"sft": ("base",)}
CHANGES: list[tuple[Stage, Strategy, Precision]] = [
    *((stage, strategy, "bfloat16") for strategy in STRATEGIES for stage in ("pretrain", "sft")),
    *(("router", strategy, "float32") for strategy in STRATEGIES),
    ("light-router", "ddp", "float32"),
]
STATES: list[tuple[Strategy, Precision]] = [("ddp", "float32"), ("fsdp", "float32"), ("fsdp", "bfloat16")]


def tiny_model(frozen: bool) -> MoVAForConditionalGeneration:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = assemble(llm, bert, image_token_id=IMAGE, size="mini", blocks=1)
    for parameter in model.adapter.parameters():
        if not parameter.detach().any():  # the silent branches
            torch.nn.init.normal_(parameter, std=0.05)
    model.language_model.requires_grad_(not frozen)
    return model.train()


def batch_of(step: int, case: Case, size: int = BATCH) -> list[dict[str, Any]]:
    """The samples of a step, with answers of 2 or of 60 tokens."""
    draw, experts = random.Random(f"{step}/{case.routing}"), {**ROUTINGS, **EVERY_EXPERT}[case.routing]
    return [
        {
            "question": draw.choices(range(3, 512), k=6),
            "answer": draw.choices(range(3, 512), k=(2, 60)[place // 2 % 2 ^ place % 2]),
            "experts": experts[(place + step) % len(experts)],
            "seed": draw.randrange(10**9),
        }
        for place in range(size)
    ]


def tensors(samples: list[dict[str, Any]], model: MoVAForConditionalGeneration) -> dict[str, Any]:
    pictured = [sample for sample in samples if sample["experts"] is not None]
    marks = [[IMAGE] * model.config.image_tokens * (sample["experts"] is not None) for sample in samples]
    rows = [[*mark, *sample["question"], *sample["answer"]] for mark, sample in zip(marks, samples, strict=True)]
    longest = max(map(len, rows))
    labels = [
        [IGNORE] * (len(row) - len(sample["answer"])) + sample["answer"]
        for row, sample in zip(rows, samples, strict=True)
    ]
    side = model.config.base_arch["image_size"]
    seeds = [torch.Generator().manual_seed(sample["seed"]) for sample in pictured]
    experts = {}
    for name, channels in model.adapter.config.expert_channels.items():
        drawn = [torch.randn(25, channels, generator=torch.Generator().manual_seed(sample["seed"] + EXPERTS.index(name)))
                 for sample in pictured if name in sample["experts"]]  # fmt: skip
        if drawn:
            experts[name] = Features(torch.stack(drawn), (5, 5))
    pixels = [torch.randn(3, side, side, generator=seed) for seed in seeds] or [torch.zeros(3, side, side)]
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "labels": torch.tensor([label + [IGNORE] * (longest - len(label)) for label in labels]),
        "pixel_values": torch.stack(pixels),
        "text_input_ids": torch.tensor([sample["question"][:4] for sample in pictured] or [[0] * 4]) % 64,
        "text_attention_mask": torch.ones(len(pixels), 4, dtype=torch.long),
        "routing": torch.tensor([[name in sample["experts"] for name in EXPERTS] for sample in pictured] or [[False] * 7]),
        "experts": experts,
        "unseen": not pictured,
    }  # fmt: skip


def loss_of(parallel: Parallel, case: Case, step: int, rank: int, world: int, size: int = BATCH) -> torch.Tensor:
    """The loss of a step over all ranks; its gradient is there."""
    mine = batch_of(step, case, size)[rank::world]
    batches = [
        tensors(mine[part :: case.micro], cast(MoVAForConditionalGeneration, parallel.learner))
        for part in range(case.micro)
    ]
    answers = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    return parallel.backward(batches, parallel.sum(torch.tensor(answers)))


def take_steps(parallel: Parallel, cases: list[Case], rank: int, world: int, first: int = 0) -> list[list[float]]:
    """Loss, and norm of the gradient, of optimizer steps."""
    taken = []
    for step, case in enumerate(cases, first):
        loss = loss_of(parallel, case, step % STEPS, rank, world)
        taken.append([float(loss), float(parallel.step(1.0, loss))])
    return taken


@cache
def of_one_process() -> list[list[float]]:
    parallel = parallelize(tiny_model(frozen=False), learning_rate=1e-3)
    return take_steps(parallel, [*IN_TURN, Case(), Case()], 0, 1)


def gradient(parallel: Parallel, micro: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The gradient of eight samples by parameter, whole. The step is then skipped, as its loss is no number."""
    loss_of(parallel, Case(micro=micro), 0, rank, world, size=8)
    found = {name: whole_gradient(value).clone() for name, value in parallel.learner.named_parameters()}
    parallel.step(1.0, torch.tensor(torch.nan))
    return found


def whole_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad


def changed(
    stage: Stage, strategy: Strategy, precision: Precision, rank: int, world: int = WORLD
) -> tuple[list[str], list[float]]:
    """The tensors of the weights that two steps of a stage change, and the steps' losses."""
    model = tiny_model(frozen=False)
    choose_parameters(
        model, TrainConfig(stage=stage, lora_rank=4 * (stage == "router"), freeze=FROZEN.get(stage, ()), **PLACES)
    )
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    parallel = parallelize(
        LightRouting(model).train() if stage == "light-router" else model,
        strategy=strategy,
        precision=precision,
        checkpoint_activations=world > 1,
        learning_rate=1e-3,
        weight_decay=0.1,
    )
    losses = []
    for step in range(2):
        batch = tensors(batch_of(step, EVERY)[rank::world], model)
        items = int((batch["labels"][:, 1:] != IGNORE).sum())
        if stage == "light-router":
            batch = {name: batch[name] for name in ("pixel_values", "text_input_ids", "text_attention_mask", "routing")}
            items = len(batch["routing"])
        loss = parallel.backward([batch], parallel.sum(torch.tensor(items)))
        parallel.step(clip_norm=1.0, loss=loss)
        losses.append(float(loss))
    after = parallel.full_weights(model)
    assert rank or after.keys() == before.keys()
    return [name for name, value in after.items() if not torch.equal(value, before[name])], losses


def declared(stage: Stage) -> list[str]:
    """The tensors that a stage shall change."""
    model = tiny_model(frozen=False)
    choose_parameters(model, TrainConfig(stage=stage, lora_rank=4 * (stage == "router"), **PLACES))
    parts = {
        "pretrain": ("adapter.", "base_encoder."),
        "sft": ("adapter.", "language_model."),  # and the base encoder stays, as `FROZEN` says
        "router": ("language_model.",),
        "light-router": ("light_router.",),
    }[stage]
    buffers = dict(model.named_buffers())
    return [
        name
        for name in model.state_dict()
        if name.startswith(parts) and ("lora_" in name) == (stage == "router")
        if name not in buffers or (stage == "light-router")  # batch statistics
    ]


def micro_batch(model: MoVAForConditionalGeneration, step: int, places: list[int]) -> MicroBatch:
    """Samples of a step by their places in its batch; the first two are of the source "left"."""
    samples = batch_of(step, Case())
    inputs = tensors([samples[place] for place in places], model)
    answers, positions = (inputs["labels"][:, 1:] != IGNORE).sum(1), torch.tensor(places)
    return MicroBatch(
        inputs=inputs, answers=answers, divisor=answers.float(), positions=positions, sources=positions // 2
    )  # fmt: skip


class OneByOne(list[list[MicroBatch]]):
    """Micro-batches of one sample each, read as `StageSamples` reads."""

    def __getitems__(self, positions: Sequence[int]) -> list[MicroBatch]:
        [position] = positions
        return self[position]


def watched(strategy: Strategy, rank: int, world: int) -> list[dict[str, Any]]:
    """The lines of three steps. In the second, one sample of the last rank has a feature of NaN; three samples are held out."""
    model = tiny_model(frozen=False)
    parallel = parallelize(model, strategy=strategy, learning_rate=1e-3)
    meter = StepMeter(parallel, model, sources=["left", "right"], where=str)
    held_out = [[micro_batch(model, STEPS, [place])] for place in range(3)]  # two rounds for two ranks
    evaluation = HeldOut(OneByOne(held_out), parallel, size=1)
    lines = []
    for step in range(STEPS):
        [batch] = meter.timed([micro_batch(model, step, list(range(rank, BATCH, world)))])
        if step == 1 and rank == world - 1:
            batch.inputs["experts"]["sam"].tokens[-1] = float("nan")
        meter.begin([batch])
        loss = parallel.backward([batch.inputs], parallel.sum(batch.divisor.sum()))
        lines.append(meter.end(step, loss, parallel.step(1.0, loss), 1e-3) | {"eval_loss": evaluation.loss()})
    return lines


def state_bytes(strategy: Strategy, precision: Precision, rank: int) -> dict[str, int]:
    """What this rank holds of a model in its first stage, around a step."""
    model = tiny_model(frozen=True)
    for parameter in model.language_model.parameters():  # as an LLM that is published in bfloat16
        parameter.data = parameter.bfloat16().float()
    parallel = parallelize(model, strategy=strategy, precision=precision, learning_rate=1e-3)
    batch = tensors(batch_of(0, Case())[rank::WORLD], model)
    loss = parallel.backward([batch], parallel.sum(torch.tensor(1)))
    gradients = bytes_of(parameter.grad for parameter in model.parameters())
    parallel.step(1.0, loss)
    state = [value for values in parallel.optimizer.state.values() for value in values.values()]
    return {
        "weights": bytes_of([*model.parameters(), *model.buffers()]),
        "gradients": gradients,
        "moments": bytes_of(value for value in state if value.ndim),
    }


def bytes_of(values: Iterable[torch.Tensor | None]) -> int:
    local = [value.to_local() if isinstance(value, DTensor) else value for value in values if value is not None]
    return sum(value.nbytes for value in local)


def share_of_a_rank(parallel: Parallel) -> float:
    """The part of weights and moments that this rank copies and writes for a checkpoint."""
    own = [value.to_local() if isinstance(value, DTensor) else value for value in own_share(parallel).values()]
    return sum(value.numel() for value in own) / sum(value.numel() for value in parallel.state().values())


def run_rank(rank: int, folder: str, places: dict[str, str]) -> None:
    torch.set_num_threads(1)

    def join(name: str) -> None:
        dist.init_process_group("gloo", f"file://{folder}/group-{name}", rank=rank, world_size=WORLD)

    join("store")
    results: dict[str, Any] = {"shares": {}}
    for strategy in STRATEGIES:
        parallel = parallelize(tiny_model(frozen=False), strategy=strategy, learning_rate=1e-3)
        for micro in (1, 2):  # 2 ranks x 4 samples, and 2 ranks x 2 micro-batches x 2 samples
            found = gradient(parallel, micro, rank, WORLD)
            if rank == 0:
                save_file(found, f"{folder}/{strategy}-{micro}.gradient")
        results[strategy] = take_steps(parallel, IN_TURN, rank, WORLD)
        results["shares"][strategy] = share_of_a_rank(parallel)
        checkpoints = Checkpoints(f"{folder}/{strategy}", parallel, every=(1, None))
        checkpoints.save(RunState(metrics={"steps": len(IN_TURN)}))
        take_steps(parallel, [Case()], rank, WORLD)  # what is written is what was there when it was asked for
        checkpoints.complete()
    dist.barrier()
    for strategy, other in itertools.pairwise([STRATEGIES[-1], *STRATEGIES]):
        # With shards of one rank, each has a copy of its own, and gradients are summed over the copies.
        options: dict[str, Any] = {"checkpoint_activations": True, "shard_size": int(other == "fsdp")}
        parallel = parallelize(tiny_model(frozen=False), strategy=other, learning_rate=1e-3, **options)
        Checkpoints(f"{folder}/{strategy}", parallel, every=(1, None)).restore()
        results[f"resumed-{other}"] = take_steps(parallel, [Case(), Case()], rank, WORLD, first=len(IN_TURN))
    results |= {f"state-{'-'.join(case)}": state_bytes(*case, rank) for case in STATES}
    results |= {f"watched-{strategy}": watched(strategy, rank, WORLD) for strategy in STRATEGIES}
    results |= {f"changed-{'-'.join(change)}": changed(*change, rank) for change in CHANGES}
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    interrupted.run_twice(places, Path(folder), rank, join)
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory, mini_folder, pictures) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    places = write_places(folder, mini_folder, pictures, dropout=0.1)
    torch.multiprocessing.start_processes(run_rank, (str(folder), places), nprocs=WORLD, start_method="spawn")
    return json.loads((folder / "results.json").read_text()) | {"folder": folder}


def assert_same(two: list[list[float]], one: list[list[float]]) -> None:
    assert [loss for loss, _ in two] == pytest.approx([loss for loss, _ in one], abs=1e-5)
    assert [norm for _, norm in two] == pytest.approx([norm for _, norm in one], rel=1e-4)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_may_be_routed_in_any_way(results, strategy, routing):
    first = list(ROUTINGS).index(routing) * STEPS
    assert_same(results[strategy][first : first + STEPS], of_one_process()[first : first + STEPS])


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_is_the_same_however_its_batch_is_divided(results, strategy, micro):
    whole = gradient(parallelize(tiny_model(frozen=False), learning_rate=1e-3), 1, 0, 1)
    divided = load_file(results["folder"] / f"{strategy}-{micro}.gradient")
    assert divided.keys() == whole.keys()
    far = sum(float((divided[name] - value).square().sum()) for name, value in whole.items())
    assert (far / sum(float(value.square().sum()) for value in whole.values())) ** 0.5 < 1e-6


@pytest.mark.parametrize(("strategy", "precision"), STATES)
def test_a_plan_has_the_bytes_that_a_rank_holds(results, strategy, precision):
    from pipelines.train.memory import plan_memory

    config = MoVAConfig.from_dict(tiny_model(frozen=True).config.to_dict())
    config.text_config.dtype = torch.bfloat16
    settings: dict[str, Any] = {"strategy": strategy, "precision": precision, "workers": WORLD, "max_length": 64}
    plan = plan_memory(TrainConfig(stage="pretrain", **PLACES, **settings), config)
    held = results[f"state-{strategy}-{precision}"]
    for name, measured in held.items():
        assert getattr(plan, name) == pytest.approx(measured, rel=0.02), name
    assert plan.state == pytest.approx(sum(held.values()), rel=0.02)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_resumes_with_another_strategy(results, strategy):
    assert_same(results[f"resumed-{strategy}"], of_one_process()[-2:])


@pytest.mark.parametrize(("stage", "strategy", "precision"), CHANGES)
def test_a_stage_changes_what_it_trains_and_nothing_else(results, stage, strategy, precision):
    names, losses = results[f"changed-{stage}-{strategy}-{precision}"]
    assert names == declared(stage)
    if stage in FROZEN or stage == "pretrain":  # the routers have dropout
        assert losses == pytest.approx(changed(stage, "ddp", "float32", 0, 1)[1], abs=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_lines_of_two_ranks_are_those_of_one_process(results, strategy):
    lines, of_one = results[f"watched-{strategy}"], watched("ddp", 0, 1)
    timed = {"seconds", "data_wait", "tokens_per_second"}
    for step, (line, wanted) in enumerate(zip(lines, of_one, strict=True)):
        assert line.keys() == wanted.keys() and timed < line.keys()
        if step == 1:  # its loss and norm are no numbers
            assert line["skipped"] and line["suspects"] == wanted["suspects"] == ["3"]
            assert line["eval_loss"] == lines[0]["eval_loss"], "no parameter changed"
            continue
        for name in line.keys() - timed:
            assert line[name] == (wanted[name] and pytest.approx(wanted[name], rel=1e-4)), name  # the MFU is None
        assert line["sources"].keys() == {"left", "right"} and line["samples"] == BATCH
    assert lines[2]["loss"] != lines[0]["loss"] and lines[2]["eval_loss"] != lines[0]["eval_loss"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_copies_its_share_for_a_checkpoint(results, strategy):
    assert results["shares"][strategy] == pytest.approx(1 / WORLD, abs=0.05)


def test_a_run_resumes_exactly_by_other_numbers_of_workers(results):
    """Two sharded workers, then one, then two; with dropout, of which every micro-batch has its own."""
    whole, parts = results["folder"] / "whole", results["folder"] / "parts"
    samples = interrupted.samples_of_steps(whole)
    assert list(map(len, samples.values())) == [2] * interrupted.STEPS
    assert interrupted.samples_of_steps(parts) == samples
    expected, lines = read_metrics(whole / "run"), read_metrics(parts / "run")
    assert [line["step"] for line in lines] == list(range(1, interrupted.STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx([line["grad_norm"] for line in expected], rel=1e-4)
    states = [read_state(str(folder / "run")) for folder in (whole, parts)]
    assert states[0].steps == states[1].steps == interrupted.STEPS and states[0].batches == states[1].batches
    assert states[1].meter["losses"] == pytest.approx(states[0].meter["losses"], abs=1e-5)
    models = [load_file(folder / "run" / MODEL / "model.safetensors") for folder in (whole, parts)]
    assert models[0].keys() == models[1].keys()
    assert max(float((models[0][name] - value).abs().max()) for name, value in models[1].items()) < 1e-4

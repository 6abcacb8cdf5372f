"""The memory plan against formulas written down independently, and against what autograd keeps of a real forward pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import typer

from mova_core.config import MoVAConfig
from mova_core.model import MoVAForConditionalGeneration
from pipelines.cli.recipe import plan_training
from pipelines.train.activations import measure_activations
from pipelines.train.config import TrainConfig
from pipelines.train.gpus import Gpus, find_gpus, parse_gpus
from pipelines.train.memory import MemoryPlan, advice, cheaper, full_size, plan_memory, plan_run, refusal
from pipelines.train.metrics import TrainingError
from pipelines.train.out_of_memory import memory_advice
from pipelines.train.parallelize import parallelize
from pipelines.train.recipes import RECIPES, Recipe, Sizes
from tests.pipelines.train.test_parallel import Case, batch_of, tensors, tiny_model

PLACES: dict[str, Any] = {"model": "m", "data": "d", "store": "s", "output": "o"}
LENGTH, GRID, WIDTH = 2048, 48 * 48, 1024
# Recipe on its own GPUs -> GB of state, transient, activations and logits of one sample, and the largest micro-batch on 80 GB.
TABLE = {
    "vicuna-7b/pretrain": (0.73, 1.83, 1.15, 0.18, 53),
    "llama3-8b/sft": (4.52, 6.64, 1.28, 0.74, 30),
    "hermes-yi-34b/sft": (8.92, 9.65, 2.82, 0.37, 17),
}


def config_of(recipe: Recipe, **settings: Any) -> TrainConfig:
    workers = parse_gpus(recipe.gpus.value).count
    return TrainConfig(stage=recipe.stage, **PLACES, **recipe.values() | {"workers": workers} | settings)


def llm_parameters(llm: Sizes) -> tuple[int, int]:
    """Of a Llama: all, and those of one layer."""
    hidden, heads = llm["hidden_size"], llm["num_attention_heads"]
    keys = hidden * llm["num_key_value_heads"] // heads
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * llm["intermediate_size"] + 2 * hidden
    return 2 * llm["vocab_size"] * hidden + hidden + llm["num_hidden_layers"] * layer, layer


@pytest.mark.parametrize("name", TABLE)
def test_the_plan_of_the_papers_runs(name):
    recipe = RECIPES[name]()
    config, llm = config_of(recipe), recipe.llm
    plan = plan_memory(config, full_size(llm))
    found = (plan.state, plan.transient, plan.activations, plan.logits)
    assert tuple(round(value / 1e9, 2) for value in found) == TABLE[name][:4]
    assert plan.largest_micro_batch(80e9) == TABLE[name][4]

    total, layer = llm_parameters(llm)
    assert plan.parts["llm"] == (total, total * (recipe.stage == "sft"))
    vision = sum(trained for part, (_, trained) in plan.parts.items() if part != "llm")
    trained, frozen = (vision, total) if recipe.stage == "pretrain" else (vision + total, 0)
    frozen_bytes = 2 if llm["dtype"] == "bfloat16" else 4
    # Whole on every worker: CLIP's unused last layer and the tables of rotary positions.
    whole = plan.weights - 4 * trained / config.workers - frozen_bytes * frozen / config.workers
    assert 0.05e9 < whole < 0.2e9
    held = (16 * trained + frozen_bytes * frozen) / config.workers
    assert plan.state - whole == pytest.approx(
        held, abs=0.03e9
    )  # positions (1, N, D) have one row, which one worker holds

    embeddings = 2 * llm["vocab_size"] * llm["hidden_size"]
    transient = 2 * embeddings + 4 * layer + (2 * embeddings + 6 * layer if recipe.stage == "sft" else 0)
    assert plan.transient == pytest.approx(transient, abs=0.7e9)  # and the layers of the other parts
    inputs = 2 * (llm["num_hidden_layers"] * LENGTH * llm["hidden_size"] + 23 * (GRID + 1) * WIDTH + 3 * GRID * WIDTH)
    aligned = 4 * GRID * (1536 + 1536 + 768)  # the three widest experts, which all blocks share, in float32
    # A Llama layer that learns, per token: two norms with a float32 copy, five inputs of products, queries, keys and values of
    # every head and the output of attention; gate, its SiLU, up and their product in the MLP.
    of_layer = 26 * llm["hidden_size"] + 8 * llm["intermediate_size"] + 4 * llm["num_attention_heads"] + 8
    outside = 0.13e9 * llm["hidden_size"] / 4096  # the adapter's convolutions and projections
    if recipe.stage == "sft":
        assert plan.activations == pytest.approx(inputs + aligned + LENGTH * of_layer + outside, rel=0.03)
    assert plan.activations > inputs + aligned
    assert plan.logits == round(14 * 0.2 * LENGTH * llm["vocab_size"])


def test_what_is_kept_is_what_autograd_keeps(mini):
    with torch.device("meta"):
        model = MoVAForConditionalGeneration(mini)
    whole, half = (measure_activations(model, 64, 0, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 0 < whole.kept(True) < whole.kept(False) and half.kept(False) < whole.kept(False)
    assert measure_activations(model, 64, 2, torch.bfloat16).kept(False) > half.kept(False), "two experts are fused"
    assert measure_activations(model, 128, 0, torch.bfloat16).kept(False) > half.kept(False)
    model.requires_grad_(False)
    assert measure_activations(model, 64, 0, torch.float32).kept(False) == 0, "nothing learns"
    model.language_model.requires_grad_(True)
    assert 0 < measure_activations(model, 64, 0, torch.float32).kept(False) < whole.kept(False), (
        "no graph before the LLM"
    )


@pytest.fixture(scope="module")
def mini(mini_folder) -> MoVAConfig:
    """Planned in a moment."""
    return MoVAConfig.from_pretrained(mini_folder)


def gpus_of(needed: float) -> Gpus:
    return Gpus(count=2, name="card", gigabytes=needed / 1e9)


def test_a_plan_that_does_not_fit_names_the_two_cheapest_changes(mini):
    config = TrainConfig(stage="sft", workers=2, batch_size=64, **PLACES)
    found = plan_memory(config, mini)
    plan = plan_run(config, mini, gpus_of(found.needed(32) - 1))
    assert not plan["fits"] and (plan["micro_batch"], plan["micro_batches"]) == (32, 1)
    message = refusal(config, mini, plan)
    assert message.startswith(
        f"sft needs {found.needed(32) / 1e9:.1f} GB per GPU with 32 samples at once, and there are 2 x card"
    )
    saved = (found.needed(32) - found.needed(16)) / 1e9
    assert f"--micro-batch 16 saves {saved:.1f} GB, --precision bfloat16 saves" in message and "\n" not in message
    checkpointed = replace(config, precision="bfloat16", batch_size=2)
    options = [option for option, _ in cheaper(checkpointed, mini, 1)]
    assert options == ["--checkpoint-activations", "--strategy fsdp"]
    sharded = replace(checkpointed, strategy="fsdp", checkpoint_activations=True)
    assert advice(sharded, mini, 1).startswith("--workers 4 saves")


def test_the_micro_batch_that_fits_divides_the_share_of_a_worker(mini):
    config = TrainConfig(stage="sft", workers=2, batch_size=36, strategy="fsdp", precision="bfloat16", **PLACES)
    found = plan_memory(config, mini)
    for memory in (found.needed(7), found.needed(17), found.needed(18)):
        plan = plan_run(config, mini, gpus_of(memory), auto=True)
        assert plan["fits"] and plan["micro_batches"] * plan["micro_batch"] == 18
        larger = min((size for size in (1, 2, 3, 6, 9, 18) if size > plan["micro_batch"]), default=None)
        assert larger is None or found.needed(larger) > memory
        fits = plan["largest_micro_batch"]
        assert found.needed(fits) <= memory < found.needed(fits + 1)
    too_small = plan_run(config, mini, gpus_of(found.needed(1) - 1), auto=True)
    assert (too_small["micro_batch"], too_small["largest_micro_batch"], too_small["fits"]) == (1, 0, False)


def test_auto_takes_ddp_where_it_fits_and_deepspeed_has_no_plan(mini):
    config = TrainConfig(stage="sft", workers=2, batch_size=4, **PLACES)
    needed = plan_memory(config, mini).needed(2)
    for memory, strategy in ((needed, "ddp"), (needed - 1, "fsdp")):
        chosen, plan = plan_training(config, mini.to_dict(), gpus_of(memory), None, False, auto_strategy=True)
        assert plan is not None and chosen.strategy == plan["strategy"] == strategy
    assert plan_training(config, mini.to_dict(), None, None, False, auto_strategy=True) == (config, None)
    zero = replace(config, strategy="zero3")
    assert plan_training(zero, mini.to_dict(), gpus_of(1.0), None, False) == (zero, None), "and refuses nothing"
    with pytest.raises(typer.BadParameter, match="--micro-batch auto plans ddp and fsdp: give a number with zero3"):
        plan_training(zero, mini.to_dict(), gpus_of(1.0), None, True)


def test_a_strategy_holds_what_it_should(mini):
    def plan(**settings: Any) -> MemoryPlan:
        return plan_memory(TrainConfig(**{"stage": "sft", "workers": 4, **PLACES, **settings}), mini)

    ddp, fsdp, copies = plan(), plan(strategy="fsdp"), plan(strategy="fsdp", shard_size=2)
    trained = sum(number for _, number in ddp.parts.values())
    assert (ddp.gradients, ddp.moments) == (4 * trained, 8 * trained)
    assert fsdp.moments == pytest.approx(2 * trained, rel=0.05) and copies.moments == pytest.approx(
        4 * trained, rel=0.05
    )
    parts = plan(freeze=("base", "text", "llm")).parts
    assert parts["base"][1] == parts["text"][1] == parts["llm"][1] == 0 < parts["adapter"][1]
    router = plan(stage="router")
    assert router.parts["llm"][1] and not router.parts["adapter"][1] and not router.experts, "the LoRA alone"
    assert plan(features="online").experts > 0


def test_a_worker_without_memory_names_plan_and_changes():
    """As CUDA's allocator fails: in the middle of the forward pass of a real step."""
    model = tiny_model(frozen=False)
    parallel = parallelize(model, learning_rate=1e-3)
    batch = tensors(batch_of(0, Case()), model)
    config = TrainConfig(stage="sft", workers=8, batch_size=8, **PLACES)

    def allocate(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = model.language_model.base_model.register_forward_pre_hook(allocate)
    found = MoVAConfig.from_dict(model.config.to_dict())
    planned = plan_memory(replace(config, workers=2), found).needed(4) / 1e9
    with pytest.raises(TrainingError) as raised, memory_advice(config, found, world=2):
        parallel.backward([batch], torch.tensor(8))
    message = str(raised.value)
    assert message.startswith(
        f"sft ran out of GPU memory with 4 samples at once: {planned:.1f} GB were planned and 0.0 GB"
    )
    assert "--micro-batch 2 saves" in message and "--precision bfloat16 saves" in message and "\n" not in message
    zero = replace(config, strategy="zero2", micro_batch=2)
    told = "2 samples at once: give a smaller --micro-batch"
    with pytest.raises(TrainingError, match=told), memory_advice(zero, found, world=2):
        parallel.backward([batch], torch.tensor(8))
    hook.remove()
    with memory_advice(config, found, world=2):
        assert parallel.backward([batch], torch.tensor(8)).isfinite()


@pytest.mark.parametrize("text", ["", "8", "8xA100", "0xA100-80G", "8xA100-0G", "8xA100-80", "8 x A100-80G", "xA-1G"])
def test_gpus_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="such as 8xA100-80G"):
        parse_gpus(text)


def test_gpus_as_a_user_names_them():
    assert parse_gpus("8xA100-80G") == Gpus(count=8, name="A100", gigabytes=80)
    assert parse_gpus("1xRTX 4090-24GB") == Gpus(count=1, name="RTX 4090", gigabytes=24)
    assert parse_gpus("2xH100-PCIe-79.6G") == Gpus(count=2, name="H100-PCIe", gigabytes=79.6)


def test_gpus_of_this_machine(tmp_path, monkeypatch):
    """As `nvidia-smi` lists them."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() is None
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    command.chmod(0o755)
    assert find_gpus() == Gpus(count=2, name="NVIDIA H100 80GB HBM3", gigabytes=85.5)
    command.write_text("#!/bin/sh\nexit 9\n")
    assert find_gpus() is None

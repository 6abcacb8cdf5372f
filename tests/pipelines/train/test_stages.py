"""Which parameters learn in each stage, and at which rate."""

from typing import Any

import pytest
import torch

from mova_core.model import MoVAForConditionalGeneration
from pipelines.train.config import TrainConfig
from pipelines.train.export import write_model
from pipelines.train.parallelize import parallelize
from pipelines.train.stages import choose_parameters

PLACES: dict[str, Any] = {"model": "m", "data": "d", "store": "s", "output": "o"}


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("pretrain", {"adapter", "base_encoder"}),
        ("sft", {"adapter", "base_encoder", "language_model"}),
        ("router", {"language_model"}),
        ("light-router", {"light_router"}),
    ],
)
def test_a_stage_trains_whole_parts_and_nothing_else(mini_folder, stage, parts):
    model = MoVAForConditionalGeneration.from_pretrained(mini_folder)
    before = {name for name, _ in model.named_parameters()}
    choose_parameters(model, TrainConfig(stage=stage, lora_rank=4 * (stage == "router"), **PLACES))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in trained} == parts
    if stage == "router":
        assert all("lora_" in name for name in trained) and {min(p.shape) for p in trained.values()} == {4}
        [adapter] = model.language_model.peft_config.values()
        assert (adapter.r, adapter.lora_alpha) == (4, 8), "alpha is twice the rank"
    else:
        rest = {name for name in before if name.partition(".")[0] in parts}
        assert rest <= trained.keys(), "every parameter of these parts"


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_frozen_parts_do_not_learn_and_parts_have_rates_of_their_own(mini_folder, stage):
    model = MoVAForConditionalGeneration.from_pretrained(mini_folder)
    rates = {"adapter": 1e-4, "llm": 1e-5} if stage == "sft" else {"adapter": 1e-4}
    choose_parameters(model, TrainConfig(stage=stage, freeze=("text", "base"), part_rates=rates, **PLACES))
    assert not any(module.training for module in model.train().adapter.text_encoder.modules()), "no dropout in it"
    assert not model.config.adapter["freeze_text_encoder"], "of the run, not of the model"
    groups = parallelize(model, learning_rate=1e-3, part_rates=rates, weight_decay=0.1).optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    wanted = {
        name
        for name in names.values()
        if name.startswith(("adapter.", "language_model.")[: 1 + (stage == "sft")])
        and not name.startswith("adapter.text_encoder.")
    }
    assert found.keys() == wanted
    for name, group in found.items():
        assert group["lr"] == rates["llm" if name.startswith("language_model.") else "adapter"]
        assert group["weight_decay"] == (0.1 if model.get_parameter(name).ndim > 1 else 0.0)


def test_a_parameter_without_a_gradient_stops_the_first_step():
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)

        def forward(self, x, num_items_in_batch):
            return type("Output", (), {"loss": self.used(x).sum() / num_items_in_batch})

    learner = Half()
    batch = [{"x": torch.ones(1, 2)}]
    with pytest.raises(RuntimeError, match=r"^2 parameters, unused.weight the first, .* no gradient"):
        parallelize(learner, learning_rate=1e-3).backward(batch, torch.tensor(1))
    learner.unused.requires_grad_(False)
    assert float(parallelize(learner, learning_rate=1e-3).backward(batch, torch.tensor(1)))


def test_a_lora_of_the_llm_learns_in_its_place_and_is_added_to_it(mini_folder, tmp_path):
    model = MoVAForConditionalGeneration.from_pretrained(mini_folder)
    names = {name for name, _ in model.named_parameters()}
    choose_parameters(model, TrainConfig(stage="sft", lora_rank=4, **PLACES))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_llm = {name for name in learning if name.startswith("language_model.")}
    assert of_llm and all(".llm_lora." in name for name in of_llm)
    assert learning - of_llm == {name for name in names if not name.startswith("language_model.")}
    for name in of_llm:
        if ".lora_B." in name:  # else it changes nothing yet
            torch.nn.init.normal_(model.get_parameter(name), std=0.05)
    ids = torch.arange(5, 25)[None]
    before = MoVAForConditionalGeneration.from_pretrained(mini_folder)(input_ids=ids).logits
    tuned = model.eval()(input_ids=ids).logits
    write_model(str(tmp_path / "model"), model, str(mini_folder), parallelize(model, learning_rate=1e-3))
    again = MoVAForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert not again.has_llm_lora and {name for name, _ in again.named_parameters()} == names
    torch.testing.assert_close(again(input_ids=ids).logits, tuned, atol=1e-5, rtol=1e-4)
    assert (tuned - before).abs().max() > 1e-2

"""Which parameters learn in each stage."""

import pytest

from mova_core.model import MoVAForConditionalGeneration
from pipelines.train.config import TrainConfig
from pipelines.train.stages import choose_parameters


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
    choose_parameters(model, TrainConfig(stage=stage, model="m", data="d", store="s", output="o", lora_rank=4))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in trained} == parts
    if stage == "router":
        assert all("lora_" in name for name in trained) and {min(p.shape) for p in trained.values()} == {4}
        [adapter] = model.language_model.peft_config.values()
        assert (adapter.r, adapter.lora_alpha) == (4, 8), "alpha is twice the rank"
    else:
        rest = {name for name in before if name.partition(".")[0] in parts}
        assert rest <= trained.keys(), "every parameter of these parts"

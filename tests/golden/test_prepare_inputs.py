"""Golden case 9: ids, pictures and routing to what the LLM reads, its logits, its loss, and a training step."""

import copy

import pytest
import torch

from mova_core.experts import EXPERTS

TOLERANCE = 5e-5
PUBLISHED_IMAGE = -200
# What the published adapter was told of its three pictures: only a picture of several experts reads it.
GATE = "question 0: how many cats are there?\n\n"
SCENARIOS = (
    "right_mixed_routing",
    "right_no_routing",
    "right_all_routing",
    "left_padding",
    "truncate_16",
    "row1_without_image",
    "row0_two_images",
    "no_mask_no_labels",
    "position_ids_given",
    "train_mode",
)


@pytest.fixture(scope="module")
def gate(golden):
    from transformers import BertTokenizer

    return BertTokenizer(str(golden.dir / "shared_text_encoder" / "vocab.txt"))([GATE], return_tensors="pt")


@pytest.fixture(scope="module")
def experts(tower):
    return {name: tower.expert(name) for name in EXPERTS}


def encode(model, golden, tower, experts, gate, case="in", routing=None):
    """Visual tokens of the case's pictures, every expert computed for all of them, used where it is routed."""
    tensors, _ = golden("prepare_inputs")
    inputs = [tensors[f"{case}.{name}"] for name in ("images", "high", "flattened")]
    features = {name: tower.run(expert, *inputs) for name, expert in experts.items()}
    base = model.encode_base(inputs[0][:, :3])
    text = {"input_ids": gate["input_ids"], "attention_mask": gate["attention_mask"]}
    routing = tensors["in.routing_weights"].bool() if routing is None else routing
    return model.encode_image(base, text, features, routing)[0]


def prepare(model, golden, visual, scenario):
    """The scenario's ids, mask, labels and routing passes through `prepare_inputs`; `visual` per picture of the batch."""
    tensors, facts = golden("prepare_inputs")
    told = facts["scenarios"][scenario]
    ids = tensors.get(f"in.{scenario}.input_ids", tensors["in.input_ids"])
    pictures_of = (ids == PUBLISHED_IMAGE).sum(1).tolist()
    coarse = [row for row, count in enumerate(pictures_of) for _ in range(count)]
    coarse = [bool(told["has_routing"] and told["has_routing"][row]) for row in coarse]
    pooled = model.coarsen(visual)
    given = {} if scenario == "no_mask_no_labels" else {"attention_mask": tensors["in.attention_mask"].bool()}
    if given:
        given["labels"] = tensors.get(f"in.{scenario}.labels", tensors["in.labels"])
    if "position_ids" not in told["returned_none"]:
        given["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
    return model.prepare_inputs(
        ids.masked_fill(ids == PUBLISHED_IMAGE, model.config.image_token_id),
        [few if one else many for few, many, one in zip(pooled, visual, coarse, strict=True)],
        max_length=told["cfg"].get("tokenizer_model_max_length"),
        padding_side=told["cfg"].get("tokenizer_padding_side", "right"),
        **given,
    )


def assert_close(found, wanted, what=""):
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0, msg=lambda said: f"{what}: {said}")


@torch.no_grad()
def test_encode_images(golden, tower, tiny_mova, experts, gate):
    visual = encode(tiny_mova, golden, tower, experts, gate)
    assert_close(visual, golden("prepare_inputs")[0]["out.encode_images"])
    pooled = tiny_mova.coarsen(visual[:1])
    assert pooled.shape == (1, 4, 64)


def test_every_scenario_is_known(golden):
    assert set(golden("prepare_inputs")[1]["scenarios"]) == set(SCENARIOS)


@torch.no_grad()
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(golden, tower, tiny_mova, experts, gate, scenario):
    tensors, facts = golden("prepare_inputs")
    told = facts["scenarios"][scenario]
    if scenario == "row0_two_images":
        routing = torch.tensor([[letter in letters for letter in "ABCDEFG"] for letters in ("", "C", "ADF", "B")])
        visual = encode(tiny_mova, golden, tower, experts, gate, "in4", routing)
    else:
        visual = encode(tiny_mova, golden, tower, experts, gate)
    if scenario == "row1_without_image":  # the published row without a picture uses one up; ours is not given it
        visual = visual[[0, 2]]
    inputs = prepare(tiny_mova, golden, visual, scenario)
    assert list(inputs["inputs_embeds"].shape) == told["embeds_shape"]
    assert_close(inputs["inputs_embeds"], tensors[f"out.{scenario}.inputs_embeds"], "inputs_embeds")
    for name in ("attention_mask", "labels", "position_ids"):
        if name in told["returned_none"]:
            assert inputs[name] is None, name
        else:
            assert torch.equal(inputs[name].long(), tensors[f"out.{scenario}.{name}"]), name
    if inputs["attention_mask"] is not None:
        assert inputs["attention_mask"].dtype == torch.bool
    if "loss" in told:
        out = tiny_mova(**inputs)
        real = inputs["attention_mask"]
        assert_close(out.logits[real], tensors[f"out.{scenario}.logits"][real], "logits")
        assert abs(out.loss.item() - told["loss"]) <= TOLERANCE


def test_training_step(golden, tower, tiny_mova, experts, gate):
    """Loss and the norm of every gradient of the LLM and the adapter."""
    _, facts = golden("prepare_inputs")
    model = copy.deepcopy(tiny_mova).train()
    visual = encode(model, golden, tower, experts, gate)
    out = model(**prepare(model, golden, visual, "train_mode"))
    assert abs(out.loss.item() - float(facts["train_step"]["loss"])) <= TOLERANCE
    out.loss.backward()
    norms = {}
    for name, parameter in model.named_parameters():
        name = name.replace("adapter.", "model.mm_projector.").removeprefix("language_model.")
        if parameter.grad is not None and not name.startswith("base_encoder."):
            norms[name] = parameter.grad.norm().item()
    wanted = facts["train_step"]["grad_norm"]
    assert {name for name, norm in wanted.items() if norm} <= norms.keys()
    for name, norm in wanted.items():
        assert norms.get(name, 0.0) == pytest.approx(norm, abs=TOLERANCE, rel=TOLERANCE), name

"""Golden case 9: ids, pictures and routing to what the LLM reads, its logits, its loss, and a training step."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from mova_core.experts import EXPERTS
from mova_core.processing import IGNORE

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
    """What `forward` takes for a scenario's ids, mask and labels, with `visual` tokens per picture of the batch.

    The published `prepare_inputs_labels_for_multimodal` around our `embed`, except that a row without a picture takes none.
    """
    tensors, facts = golden("prepare_inputs")
    published = facts["scenarios"][scenario]
    ids = tensors.get(f"in.{scenario}.input_ids", tensors["in.input_ids"])
    full = scenario != "no_mask_no_labels"
    mask = tensors["in.attention_mask"].bool() if full else torch.ones_like(ids, dtype=torch.bool)
    labels = tensors.get(f"in.{scenario}.labels", tensors["in.labels"]) if full else torch.full_like(ids, IGNORE)
    routing_pass = published["has_routing"] or [False] * len(ids)
    limit = published["cfg"].get("tokenizer_model_max_length")
    side = published["cfg"].get("tokenizer_padding_side", "right")
    remaining = iter(zip(visual, model.coarsen(visual), strict=True))
    embeds, targets = [], []
    for row, row_ids in enumerate(ids):
        marks = row_ids == PUBLISHED_IMAGE
        pairs = [next(remaining) for _ in range(int(marks.sum()))]
        shown = [coarse if routing_pass[row] else fine for fine, coarse in pairs]
        repeats = torch.ones_like(row_ids)
        repeats[marks] = repeats.new_tensor([len(tokens) for tokens in shown])
        marked = row_ids.masked_fill(marks, model.config.image_token_id)
        expanded = marked[mask[row]].repeat_interleave(repeats[mask[row]])
        embeds.append(model.embed(expanded[None], shown)[0][:limit])
        target = labels[row].masked_fill(marks, IGNORE)[mask[row]]
        targets.append(target.repeat_interleave(repeats[mask[row]])[:limit])
    assert next(remaining, None) is None, "a picture without an image token"
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    inputs = {
        "inputs_embeds": pad(embeds),
        "attention_mask": pad([torch.ones(len(row), dtype=torch.bool) for row in targets]),
        "labels": pad(targets, padding_value=IGNORE),
        "position_ids": pad([torch.arange(len(row)) for row in targets]),
    }
    return {name: None if name in published["returned_none"] else tensor for name, tensor in inputs.items()}


def assert_close(actual, published, what=""):
    torch.testing.assert_close(actual, published, atol=TOLERANCE, rtol=0, msg=lambda text: f"{what}: {text}")


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

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mova_core.answering import Answerer, Question
from mova_core.experts import EXPERTS
from mova_core.features import FeatureStore, MissingFeatures, Tiered
from mova_core.images import ImageError, ImageRef
from mova_core.model import ROUTING_LORA, MoVAForConditionalGeneration, stack_features
from mova_core.processing import IGNORE, MoVAProcessor

ASK = [("user", "what is in the picture?")]


def test_saved_model_is_the_same_model(mini, mini_folder, tmp_path):
    mini.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(again, MoVAForConditionalGeneration)
    state = mini.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in again.state_dict().items())
    assert AutoConfig.from_pretrained(tmp_path).experts == EXPERTS
    assert again.config.image_tokens == 36 and again.config.routing_tokens == 9


def test_processor_places_picture_and_labels(processor, pictures):
    answered = [*ASK, ("assistant", "left"), ("user", "right?"), ("assistant", "none")]
    batch = processor([answered, ASK[:1]], [ImageRef(path=str(pictures[0])), None], labels=True, padding_side="right")
    row, labels = batch["input_ids"][0], batch["labels"][0]
    assert int((row == processor.image_token_id).sum()) == processor.image_tokens
    assert batch["pixel_values"].shape == (1, 3, 168, 168) and len(batch["text_input_ids"]) == 1
    assert processor.tokenizer.decode(labels[labels != IGNORE]) == "left</s>none</s>"
    assert torch.equal(row[labels != IGNORE], labels[labels != IGNORE])
    prompt = processor([ASK], [ImageRef(path=str(pictures[0]))])["input_ids"][0]
    assert torch.equal(row[: len(prompt)], prompt), "training and generation cut a prompt alike"
    routing = processor([ASK], [ImageRef(path=str(pictures[0]))], routing=True)["input_ids"]
    assert int((routing == processor.image_token_id).sum()) == processor.routing_tokens
    with pytest.raises(ValueError, match="max_length 20 cuts the picture"):
        processor([ASK], [ImageRef(path=str(pictures[0]))], max_length=20)


def test_processor_survives_saving(processor, pictures, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MoVAProcessor.from_pretrained(tmp_path)
    one, other = (p([ASK], [ImageRef(path=str(pictures[0]))]) for p in (processor, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def forward(mini, processor, pictures, features, routing, **more):
    batch = processor(
        [[*ASK, ("assistant", "left")]] * 3,
        [ImageRef(path=str(p)) for p in pictures],
        labels=True,
        padding_side="right",
    )
    return mini(**batch, experts=stack_features(features, EXPERTS, mini.device, mini.dtype), routing=routing, **more)


def test_experts_change_what_is_said_and_only_for_their_rows(mini, processor, pictures, local_experts):
    images = [ImageRef(path=str(path)) for path in pictures]
    none = torch.zeros(3, 7, dtype=torch.bool)
    one = none.clone()
    one[1, EXPERTS.index("sam")] = True
    plain = forward(mini, processor, pictures, [{}, {}, {}], none)
    routed = forward(mini, processor, pictures, local_experts.fetch(images, [[], ["sam"], []]), one)
    moved = (plain.logits - routed.logits).abs().amax((1, 2))
    assert moved[1] > 1e-3 and moved[0] < 1e-5 and moved[2] < 1e-5


def test_image_tokens_must_match_pictures(mini):
    ids = torch.full((1, 4), mini.config.image_token_id)
    with pytest.raises(ValueError, match="4 image tokens but the pictures give 0"):
        mini.embed(ids, None)


def test_expert_routing_lora_is_on_only_for_routing(mini, processor, pictures, tmp_path):
    none = torch.zeros(3, 7, dtype=torch.bool)
    before = forward(mini, processor, pictures, [{}] * 3, none).logits
    mini.add_routing_lora(rank=4)
    for name, parameter in mini.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert torch.equal(before, forward(mini, processor, pictures, [{}] * 3, none).logits)
    with mini.expert_routing():
        routed = forward(mini, processor, pictures, [{}] * 3, none).logits
    assert (routed - before).abs().max() > 1e-3
    assert torch.equal(before, forward(mini, processor, pictures, [{}] * 3, none).logits)

    mini.save_pretrained(tmp_path)
    assert {path.name for path in (tmp_path / ROUTING_LORA).iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = MoVAForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.has_routing_lora
    torch.testing.assert_close(before, forward(again, processor, pictures, [{}] * 3, none).logits)
    with again.expert_routing():
        torch.testing.assert_close(routed, forward(again, processor, pictures, [{}] * 3, none).logits)

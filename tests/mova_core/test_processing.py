"""Rows of any kind in one batch: no picture, one, several; routing and answer passes; chat templates; what is refused."""

import copy

import pytest
import torch
from transformers import AutoProcessor

from mova_core.chat_formats import CHAT_FORMATS
from mova_core.data import IMAGE_MARK
from mova_core.images import ImageRef
from mova_core.processing import IGNORE, MoVAProcessor

ASK = [("user", "what is in the picture?")]


@pytest.fixture
def refs(pictures):
    return [ImageRef(path=str(path)) for path in pictures]


def pictures_in(processor, row):
    """Lengths of the runs of image tokens, in reading order."""
    shown = (row == processor.image_token_id).tolist()
    runs, length = [], 0
    for is_image in [*shown, False]:
        if not is_image and length:
            runs.append(length)
        length = length + 1 if is_image else 0
    return runs


def test_rows_of_every_kind_share_a_batch(processor, refs):
    compare = [
        ("user", f"{IMAGE_MARK} or {IMAGE_MARK} what?"),
        ("assistant", "left"),
        ("user", f"and {IMAGE_MARK} none?"),
    ]
    batch = processor(
        [compare, ASK, ASK, ASK],
        [[refs[2], refs[0], refs[1]], None, refs[0], [refs[1]]],
        routing=[False, False, True, False],
    )
    n, coarse = processor.image_tokens, processor.routing_tokens
    assert [pictures_in(processor, row) for row in batch["input_ids"]] == [[n, n, n], [], [coarse], [n]]
    alone = [processor.base.preprocess([refs[index]])["pixel_values"][0] for index in (2, 0, 1, 0, 1)]
    assert torch.equal(batch["pixel_values"], torch.stack(alone)), "pictures come in reading order, row by row"
    gate = processor.text_tokenizer.batch_decode(batch["text_input_ids"], skip_special_tokens=True)
    assert len(gate) == 5 and gate[0] == gate[1] == gate[2] and gate[3] == gate[4]
    assert IMAGE_MARK not in gate[0] and "left" not in gate[0].replace("left or right", "")
    for index, row in enumerate((compare, ASK, ASK, ASK)):
        pictures = ([refs[2], refs[0], refs[1]], None, refs[0], [refs[1]])[index]
        single = processor([row], [pictures], routing=index == 2)["input_ids"][0]
        assert torch.equal(batch["input_ids"][index][-len(single) :], single)


def test_a_question_per_picture(processor, refs):
    two = [("user", f"{IMAGE_MARK}{IMAGE_MARK} what?")]
    batch = processor([two, ASK], [refs[:2], refs[2]], questions=[["left?", "right?"], "none?"])
    gate = processor.text_tokenizer.batch_decode(batch["text_input_ids"], skip_special_tokens=True)
    assert [next(word for word in ("left", "right", "none") if word in text) for text in gate] == [
        "left",
        "right",
        "none",
    ]
    with pytest.raises(ValueError, match="conversation 0: 1 questions for 2 pictures"):
        processor([two], [refs[:2]], questions=[["left?"]])


def test_marks_say_where_pictures_stand(processor, refs):
    front = processor([ASK], [refs[0]])["input_ids"]
    assert torch.equal(front, processor([[("user", f"{IMAGE_MARK}\n{ASK[0][1]}")]], [refs[0]])["input_ids"])
    later = [*ASK, ("assistant", "none"), ("user", f"what of {IMAGE_MARK}?")]
    row = processor([later], [refs[0]])["input_ids"][0].tolist()
    text = processor.tokenizer.decode(row[: row.index(processor.image_token_id)])
    assert text.endswith("user: what of ") and "none</s>" in text


def test_a_picture_in_a_reply_is_not_learnt(processor, refs):
    turns = [("user", "what?"), ("assistant", f"left of {IMAGE_MARK} right")]
    batch = processor([turns], [refs[0]], labels=True)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learnt = processor.tokenizer.decode(labels[labels != IGNORE])
    assert learnt == "left of  right</s>" and int((ids == processor.image_token_id).sum()) == processor.image_tokens
    assert not (labels == processor.image_token_id).any()


def test_history_is_cut_as_it_was_learnt(processor):
    """A conversation's beginning gives the same ids when learnt from, when answered and as history of a later question."""
    turns = [*ASK, ("assistant", "left"), ("user", "right?"), ("assistant", "none"), ("user", "what?")]
    learnt = processor([turns[:4]], [None], labels=True)["input_ids"][0]
    for end in (1, 3, 5):
        prompt = processor([turns[:end]], [None])["input_ids"][0]
        assert torch.equal(prompt[: len(learnt)], learnt[: len(prompt)])


@pytest.mark.parametrize(
    ("conversation", "count", "says"),
    [
        ([("user", f"{IMAGE_MARK} what?")], 0, "1 <image> marks but 0 pictures"),
        ([("user", f"{IMAGE_MARK}{IMAGE_MARK} what?")], 1, "2 <image> marks but 1 pictures"),
        ([("user", f"{IMAGE_MARK} what?")], 2, "2 pictures but 1 <image> marks"),
        ([("user", "  ")], 1, "its question is empty"),
        ([("user", f"{IMAGE_MARK}\n ")], 1, "its question is empty"),
        ([*ASK, ("assistant", "none"), ("user", "")], 0, "its question is empty"),
        ([("assistant", "none")], 0, "it asks nothing"),
        ([], 0, "it asks nothing"),
        ([("user", "what " * 200)], 0, "it has [0-9]+ tokens, over the context of 150: shorten the question"),
        (ASK, 5, "max_length 150 cuts the picture's 36 tokens"),
    ],
)
def test_what_does_not_fit_is_named(processor, refs, conversation, count, says):
    with pytest.raises(ValueError, match=f"conversation 1: {says}"):
        processor([ASK, conversation], [None, (refs * 2)[:count]], max_length=150)


def test_the_context_is_the_tokenizers(processor):
    short = copy.deepcopy(processor)
    short.tokenizer.model_max_length = 30
    with pytest.raises(ValueError, match="over the context of 30"):
        short([[("user", "what " * 60)]], [None])


def test_one_entry_per_conversation(processor, refs):
    with pytest.raises(ValueError, match="1 conversations, 2 images, 1 routing"):
        processor([ASK], refs[:2])


def test_template_that_rewrites_history_is_refused(processor):
    forgetful = copy.deepcopy(processor)
    forgetful.tokenizer.chat_template = "{{ messages[-1].content }}{{ eos_token }}"
    with pytest.raises(ValueError, match="conversation 0: its chat template rewrites earlier turns"):
        forgetful([[*ASK, ("assistant", "left"), *ASK, ("assistant", "none")]], [None], labels=True)


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_published_formats(processor, refs, name, tmp_path):
    """Each takes a system turn, several rounds and several pictures, learns the answers alone, and survives saving."""
    made = MoVAProcessor(
        copy.deepcopy(processor.tokenizer),
        processor.text_tokenizer,
        processor.base_arch,
        processor.image_tokens,
        processor.routing_tokens,
        chat_format=name,
    )
    system = [] if name == "plain" else [("system", "Be brief.")]
    turns = [
        *system,
        ("user", f"{IMAGE_MARK}{IMAGE_MARK} what?"),
        ("assistant", "left"),
        ("user", "right?"),
        ("assistant", "none"),
    ]
    batch = made([turns], [refs[:2]], labels=True)
    labels = batch["labels"][0]
    learnt = made.tokenizer.decode(labels[labels != IGNORE])
    text = made.tokenizer.decode(batch["input_ids"][0][batch["input_ids"][0] != made.image_token_id])
    assert "left" in learnt and "none" in learnt and "what" not in learnt and "right" not in learnt
    assert name == "plain" or text.count("Be brief.") == 1
    assert pictures_in(made, batch["input_ids"][0]) in ([36, 36], [72])
    prompt = made([turns[: len(system) + 1]], [refs[:2]])["input_ids"][0]
    assert torch.equal(batch["input_ids"][0][: len(prompt)], prompt)
    made.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, MoVAProcessor) and again.chat_format == name
    assert torch.equal(again([turns], [refs[:2]], labels=True)["labels"], batch["labels"])


def test_unknown_format(processor):
    with pytest.raises(ValueError, match="no chat format 'v0': there are vicuna_v1"):
        MoVAProcessor(processor.tokenizer, processor.text_tokenizer, chat_format="v0")

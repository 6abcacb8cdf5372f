"""Golden case 9, `two_stage`: the published evaluation of three questions under three LM heads, greedy tokens and first logits."""

import json

import pytest
import torch
from transformers import BertTokenizer, PreTrainedTokenizerFast

from mova_core.answering.answerer import ROUTER_TOKENS, Answerer, Question
from mova_core.data import IMAGE_MARK
from mova_core.experts import EXPERTS
from mova_core.images import ImageRef
from mova_core.processing import MoVAProcessor
from mova_core.routing import build_routing_prompt

TOLERANCE = 5e-5
ANSWER_TOKENS = 20
SEEDS = ("seed58", "seed33", "seed51")


class TowerFeatures:
    """The tiny tower's features of the pictures as the published processors prepared them."""

    fingerprints: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, golden, tower, images):
        self.tower, self.tensors = tower, golden("prepare_inputs")[0]
        self.place = {image.key: f"e2e.q{index}" for index, image in enumerate(images)}
        self.experts = {name: tower.expert(name) for name in EXPERTS}

    def fetch(self, images, experts):
        rows = []
        for image, names in zip(images, experts, strict=True):
            place = self.place[image.key]
            inputs = [self.tensors[f"{place}.{name}"] for name in ("images", "high", "flattened")]
            row = {name: self.tower.run(self.experts[name], *inputs) for name in names}
            rows.append({name: features._replace(tokens=features.tokens[0]) for name, features in row.items()})
        return rows


@pytest.fixture(scope="module")
def processor(golden, tiny_mova):
    """The published llama3 form: its text begins with a mark that the tokenizer had put there already."""
    _, facts = golden("prepare_inputs")
    folder = golden.dir / "shared_llama3_tokenizer"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|eot_id|>")
    tokenizer.add_special_tokens({"pad_token": "<|end_of_text|>", "additional_special_tokens": [IMAGE_MARK]})
    before, after = facts["prompt_strings"]["answer"].split(f"{IMAGE_MARK}\nQ?")
    tokenizer.chat_template = (
        f"{{{{ {json.dumps('<|begin_of_text|>' + before)} + messages[0].content + {json.dumps(after)} }}}}"
    )
    text_tokenizer = BertTokenizer(str(golden.dir / "shared_text_encoder" / "vocab.txt"))
    config = tiny_mova.config
    assert tokenizer.convert_tokens_to_ids(IMAGE_MARK) == config.image_token_id
    return MoVAProcessor(
        tokenizer,
        text_tokenizer,
        config.base_arch,
        image_tokens=config.image_tokens,
        routing_tokens=config.routing_tokens,
    )


@pytest.fixture(scope="module")
def questions(golden):
    _, facts = golden("prepare_inputs")
    return [
        Question(image=ImageRef(path=golden.dir / "images" / row["image"]), text=row["text"])
        for row in facts["two_stage"]["questions"]
    ]


@pytest.fixture(scope="module")
def answerer(golden, tower, tiny_mova, processor, questions):
    source = TowerFeatures(golden, tower, [question.image for question in questions])
    return Answerer(tiny_mova, processor, source, compat="published")


def test_prompts_are_the_published_ones(golden, processor, questions):
    _, facts = golden("prepare_inputs")
    calls = facts["two_stage"]["runs"]["seed58"]["calls"]
    for index, question in enumerate(questions):
        for routing, call in zip((True, False), calls[2 * index :], strict=False):
            text = build_routing_prompt(question.text) if routing else question.text
            ids = processor([[("user", text)]], [question.image], routing=routing, pixels=False)["input_ids"][0]
            wanted = torch.tensor(call["input_ids"])
            assert torch.equal(ids[ids != processor.image_token_id], wanted[wanted >= 0])
            count = processor.routing_tokens if routing else processor.image_tokens
            assert int((ids == processor.image_token_id).sum()) == count


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("index", range(3))
def test_question(golden, tiny_mova, processor, answerer, questions, seed, index):
    tensors, facts = golden("prepare_inputs")
    routing, answer = facts["two_stage"]["runs"][seed]["calls"][2 * index : 2 * index + 2]
    logits = []  # of every step of both passes
    head = tiny_mova.language_model.lm_head
    head.weight.data = tensors[f"e2e.{seed}.lm_head.weight"]
    hook = head.register_forward_hook(lambda _module, _inputs, out: logits.append(out[0, -1]))
    try:
        [found] = answerer.answer([questions[index]], ANSWER_TOKENS)
    finally:
        hook.remove()
        head.weight.data = tensors["e2e.seed58.lm_head.weight"]
    assert [name in found.experts for name in EXPERTS] == [bool(weight) for weight in answer["routing_weights"][0]]
    assert (found.router, found.text) == (routing["text"].strip(), answer["text"].strip())
    tokens = [int(step.argmax()) for step in logits]
    spoken = len(routing["output_ids"]) - 1  # the published generate puts a placeholder before its tokens
    assert tokens[:spoken] == routing["output_ids"][1:] and tokens[spoken:] == answer["output_ids"][1:]
    assert (routing["max_new_tokens"], answer["max_new_tokens"]) == (ROUTER_TOKENS, ANSWER_TOKENS)
    for step, call in ((0, 2 * index), (spoken, 2 * index + 1)):
        wanted = tensors[f"e2e.{seed}.call{call}.first_step_logits"]
        torch.testing.assert_close(logits[step], wanted, atol=TOLERANCE, rtol=0)


def test_batch_of_three(golden, answerer, questions):
    """The three at once say what the published code says one by one."""
    _, facts = golden("prepare_inputs")
    found = answerer.answer(questions, ANSWER_TOKENS)
    calls = facts["two_stage"]["runs"]["seed58"]["calls"]
    assert [answer.router for answer in found] == [call["text"].strip() for call in calls[::2]]
    assert [answer.text for answer in found] == [call["text"].strip() for call in calls[1::2]]

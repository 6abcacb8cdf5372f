"""`mova init` builds a model that `mova ask` can load: one question, several, and a conversation."""

import json
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from pipelines.cli.main import app
from tests.mova_core.conftest import llm_tokenizer, text_tokenizer
from tests.pipelines.cli.json_page import check


def mova(*arguments, code=0, stdin=None):
    result = CliRunner().invoke(app, [*map(str, arguments)], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    assert "--json" not in arguments or code or result.stderr == "", "neither bars nor warnings"
    return result


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder of the start model, what `mova init --json` printed, a picture)."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("init")
    tokenizer, gate = llm_tokenizer(image_token=False), text_tokenizer()
    shared: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, max_position_embeddings=2048, **shared
    )
    bert = BertConfig(vocab_size=len(gate), hidden_size=64, intermediate_size=64, **shared)
    for name, parts in {
        "llm": (LlamaForCausalLM(llama), tokenizer),
        "bert": (BertModel(bert), gate),
    }.items():
        for part in parts:
            part.save_pretrained(root / name)
    Image.new("RGB", (60, 40), (200, 30, 30)).save(root / "red.png")
    arguments = ["--llm", root / "llm", "--text-encoder", root / "bert", "--size", "mini", "--output", root / "start"]
    told = json.loads(mova("init", *arguments, "--json").stdout)
    return root / "start", told, root / "red.png", arguments


def test_init(built):
    start, told, _, arguments = built
    check("init", told)
    assert told["output"] == str(start) and told["size"] == "mini" and len(told["experts"]) == 7
    assert (told["image_tokens"], told["routing_tokens"]) == (36, 9)
    assert "choose a folder that is missing or empty, or replace this one with --overwrite" in " ".join(
        mova("init", *arguments, code=2).output.split()
    )


def test_one_question_is_one_document(built):
    start, _, picture, _ = built
    answer = json.loads(mova("ask", picture, "which color?", "--model", start, "--force", "none", "--json").stdout)
    check("ask", answer)
    assert answer["experts"] == [] and answer["router"] is None and isinstance(answer["text"], str)


def test_several_questions_are_answered_in_turn(built):
    start, _, picture, _ = built
    arguments = ["ask", picture, "which color?", "what is it?", "--model", start, "--force", "sam"]
    answers = json.loads(mova(*arguments, "--json").stdout)
    assert [answer["question"] for answer in answers] == ["which color?", "what is it?"]
    assert all(answer["experts"] == ["sam"] and answer["gates"] for answer in answers)
    shown = mova(*arguments).stdout
    assert shown.index("> which color?") < shown.index("> what is it?") and "gate, block 1: sam" in shown


def test_a_conversation_keeps_its_history(built, monkeypatch):
    from mova_core.answering import Answerer

    start, _, picture, _ = built
    seen = []
    plain = Answerer.answer

    def answer(self, questions, *arguments, **settings):
        seen.extend(questions)
        return plain(self, questions, *arguments, **settings)

    monkeypatch.setattr(Answerer, "answer", answer)
    arguments = ["ask", picture, "--model", start, "--force", "none", "--interactive", "--max-new-tokens", "4"]
    shown = mova(*arguments, stdin="which color?\nand now?\n\n").stdout
    assert [question.text for question in seen] == ["which color?", "and now?"]
    assert [role for role, _ in seen[1].history] == ["user", "assistant"] and "gate" not in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a QUESTION, or --interactive"),
        (["q", "--interactive", "--json"], "leave --json out"),
        (["q", "--cost", "foo=1"], "NAME must be one of dinov2"),
        (["q", "--budget", "1", "--cost", "sam=1"], "no cost of dinov2"),
        (["q", "--also", "nowhere.png"], "no picture"),
        (["q", "--force", "sam,eagle"], "--force eagle: the model's experts are dinov2"),
        (["q", "--forbid", "eagle"], "--forbid eagle: the model's experts are"),
        (["q", "--router", "light"], "`mova train light-router` trains one"),
        (["q", "--router", "best"], "'best' is not one of 'llm', 'light'"),
    ],
)
def test_usage_errors_come_before_the_model_is_loaded(built, arguments, message, monkeypatch):
    monkeypatch.setattr("pipelines.cli.ask._load", lambda *_: pytest.fail("loaded"))
    start, _, picture, _ = built
    assert message in " ".join(mova("ask", picture, *arguments, "--model", start, code=2).output.split())

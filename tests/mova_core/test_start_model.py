"""A start model from parts in folders, as `mova init` builds it: it answers, saves, loads, and refuses what does not fit."""

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from mova_core.data import IMAGE_MARK
from mova_core.experts import WeightsError
from mova_core.images import ImageRef
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from mova_core.start_model import build_start_model
from tests.mova_core.conftest import llm_tokenizer, text_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(LLM folder, text encoder folder): a base LLM whose tokenizer knows no picture, no padding and no chat."""
    torch.manual_seed(0)
    llm, bert = (tmp_path_factory.mktemp(name) for name in ("llm", "bert"))
    tokenizer = llm_tokenizer(image_token=False)
    tokenizer.chat_template = tokenizer.pad_token = None
    tokenizer.save_pretrained(llm)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    model.bfloat16().save_pretrained(llm)
    gate = text_tokenizer()
    gate.save_pretrained(bert)
    config = BertConfig(
        vocab_size=len(gate), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(bert)
    return llm, bert


def test_a_start_model_is_saved_loaded_and_read(parts, pictures, tmp_path):
    llm, bert = parts
    model, processor = build_start_model(llm, bert, "mini", dtype=torch.float32)
    trained = BertModel.from_pretrained(bert).state_dict()
    for name, tensor in model.adapter.text_encoder.bert.state_dict().items():
        assert torch.equal(tensor, trained[name]), "the text encoder keeps its trained weights"
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = MoVAForConditionalGeneration.from_pretrained(tmp_path).eval()
    loaded = MoVAProcessor.from_pretrained(tmp_path)
    loaded.check_fits(again)
    assert (loaded.image_tokens, loaded.routing_tokens) == (again.config.image_tokens, again.config.routing_tokens)
    ask, reply = ("user", "what is in the picture?"), ("assistant", "left")
    batch = loaded([[ask, reply], [ask]], [ImageRef(path=str(pictures[0])), None], labels=True)
    learnt = batch["input_ids"][0][batch["labels"][0] != -100]
    assert loaded.decode(learnt) == "left" and learnt[-1] == loaded.tokenizer.eos_token_id
    labels = batch.pop("labels")
    with torch.no_grad():
        assert torch.equal(again(**batch, labels=labels).loss, model(**batch, labels=labels).loss)


def test_parameters_have_the_dtype_of_the_llm(parts):
    model, _ = build_start_model(parts[0], parts[1], "mini", blocks=1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_published_chat_format(parts):
    _, processor = build_start_model(parts[0], parts[1], "mini", blocks=1, chat_format="vicuna_v1")
    assert processor.chat_format == "vicuna_v1" and "USER: " in processor.tokenizer.chat_template
    with pytest.raises(ValueError, match="no chat format 'vicuna_v9': there are vicuna_v1, "):
        build_start_model(parts[0], parts[1], "mini", chat_format="vicuna_v9")


def test_a_part_that_is_not_there(parts, tmp_path):
    llm, bert = parts
    with pytest.raises(WeightsError, match=r"LLM's tokenizer .*/nothing cannot be loaded"):
        build_start_model(tmp_path / "nothing", bert, "mini")
    with pytest.raises(
        WeightsError, match=r"text encoder's tokenizer in .* pass a folder that `save_pretrained` wrote"
    ):
        build_start_model(llm, tmp_path, "mini")


def test_a_context_too_short_for_a_picture(parts, tmp_path):
    llm, bert = parts
    short = LlamaForCausalLM.from_pretrained(llm)
    short.config.max_position_embeddings = 30
    short.save_pretrained(tmp_path)
    llm_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads 30 tokens, but one picture takes 36"):
        build_start_model(tmp_path, bert, "mini")


def test_a_processor_of_another_model_is_refused(parts):
    model, processor = build_start_model(parts[0], parts[1], "mini", blocks=1)
    other = MoVAProcessor(processor.tokenizer, processor.text_tokenizer, processor.base_arch)
    with pytest.raises(ValueError, match=r"visual tokens per picture 576, the model's 36; .*for_model"):
        other.check_fits(model)
    processor.tokenizer.add_tokens(["more"])
    processor.check_fits(model)
    processor.text_tokenizer.add_tokens(["unknown"])
    with pytest.raises(ValueError, match="gate's tokens"):
        processor.check_fits(model.config)
    assert IMAGE_MARK in processor.tokenizer.get_vocab()

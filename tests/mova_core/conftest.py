"""A MoVA of size mini with a tiny Llama: real classes, real files, random weights, no training."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mova_core.assemble import assemble
from mova_core.data import IMAGE_MARK
from mova_core.experts import EXPERTS, load_expert
from mova_core.features import LocalExperts
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from mova_core.routing import build_routing_prompt

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = [
    build_routing_prompt("what is in the picture, left or right?"),
    "user: assistant: system:",
    "A, B, C, none",
    "0123456789",
]


def llm_tokenizer(image_token: bool = True) -> PreTrainedTokenizerFast:
    marks = [IMAGE_MARK] if image_token else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "</s>", *marks],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=marks,
        chat_template=TEMPLATE,
    )


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Of single characters: what a trainer of word pieces finds, and how many, is different in every process."""
    letters = sorted(set("".join(TEXT)) - set(" \n"))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    )


@pytest.fixture(scope="session")
def mini_folder(tmp_path_factory):
    """A saved model and processor; the zero-initialised branches of the adapter are filled so that experts matter."""
    torch.manual_seed(0)
    tokenizer, gate = llm_tokenizer(), text_tokenizer()
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    bert = BertConfig(
        vocab_size=len(gate), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = assemble(llm, bert, image_token_id=2, size="mini", blocks=2)
    for parameter in model.adapter.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("mini")
    model.save_pretrained(folder)
    MoVAProcessor.for_model(model, tokenizer, gate, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def mini(mini_folder):
    return MoVAForConditionalGeneration.from_pretrained(mini_folder).eval()


@pytest.fixture(scope="session")
def processor(mini_folder):
    return MoVAProcessor.from_pretrained(mini_folder)


@pytest.fixture(scope="session")
def local_experts():
    return LocalExperts({name: load_expert(name, size="mini") for name in EXPERTS})


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Paths of three different pictures."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for index, (height, width) in enumerate([(90, 120), (64, 64), (130, 70)]):
        paths.append(folder / f"{index}.png")
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths

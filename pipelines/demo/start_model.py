"""The model that the demo's pre-training starts from: tokenizers and a small Llama taught the demo's language, without pictures."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from mova_core.assemble import assemble
from mova_core.data import IMAGE_MARK, Sample, read_samples
from mova_core.experts import EXPERTS
from mova_core.processing import IGNORE, MoVAProcessor
from mova_core.routing import build_routing_prompt, build_routing_reply
from pipelines.progress_bar import progress_bar

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}ASSISTANT:\n{{ message.content }}{{ eos_token }}\n"
    "{% elif message.role == 'user' %}USER: {{ message.content }}\n"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"  # a line break before the reply, so that it is tokenised as if alone
)
EOS, PAD = "</s>", "<pad>"


def create_start_model(folder: Path, train_file: Path, steps: int, seed: int, progress: bool) -> dict[str, Any]:
    """Trains tokenizers and a small Llama on the text of the training records, and writes the model and its processor.

    Args:
        folder: where `MoVAForConditionalGeneration` and `MoVAProcessor` are saved.
        train_file: LLaVA records; their images are not read.
        steps: of language training.

    Returns:
        `steps`, `loss` (nats per token) and `parameters`.
    """
    torch.manual_seed(seed)
    samples = read_samples(train_file)
    talk = [(f"{IMAGE_MARK * 36}\n{sample.question}", sample.answer) for sample in samples]
    orders = routing_orders(samples, random.Random(seed))
    tokenizer = llm_tokenizer([text for turns in talk + orders for text in turns])
    text_tokenizer = gate_tokenizer([text for sample in samples for _, text in sample.turns])
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
            initializer_range=0.08,  # keeps the embeddings of rare words apart, the routing letters among them
        )
    )
    loss = teach_language(llm, tokenizer, talk, orders, steps, seed, progress)
    bert = BertConfig(
        vocab_size=len(text_tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=256,
    )
    image_token = int(tokenizer.vocab[IMAGE_MARK])
    model = assemble(llm, bert, image_token_id=image_token, size="mini", blocks=2)
    model.save_pretrained(folder)
    MoVAProcessor(
        tokenizer,
        text_tokenizer,
        model.config.base_arch,
        model.config.image_tokens,
        model.config.routing_tokens,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return {"steps": steps, "loss": loss, "parameters": model.num_parameters()}


def routing_orders(samples: list[Sample], rng: random.Random) -> list[tuple[str, str]]:
    """Routing instructions with random replies: the model learns the form of a reply, not which experts to pick."""
    return [
        (
            f"{IMAGE_MARK * 9}\n{build_routing_prompt(sample.question)}",
            build_routing_reply([rng.random() < 0.3 for _ in EXPERTS]),
        )
        for sample in rng.choices(samples, k=64)
    ]


def llm_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the demo's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=[PAD, EOS, IMAGE_MARK],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[IMAGE_MARK],
        chat_template=TEMPLATE,
        model_max_length=1024,
    )


def gate_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer like BERT's, learned from the demo's text, for the adapter's text encoder."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
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


def teach_language(
    llm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    talk: list[tuple[str, str]],
    orders: list[tuple[str, str]],
    steps: int,
    seed: int,
    progress: bool,
) -> float:
    """Trains next-token prediction on short `talk`, in every eighth step on the long `orders`.

    Random vectors take the place of visual tokens: the model learns to answer beside them, and cannot learn to see.

    Returns:
        Mean loss on `talk` over the last tenth of the steps, in nats per token.
    """
    torch.set_num_threads(1)  # the matrices are small: on a shared machine two threads mostly wait for each other
    optimizer = torch.optim.AdamW(llm.parameters(), lr=3e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    rng, losses = random.Random(seed), []
    with progress_bar(steps, "language model", "steps", progress) as bar:
        for step in range(steps):
            turns = rng.choices(orders, k=4) if step % 8 == 7 else rng.choices(talk, k=32)
            texts = tokenizer.apply_chat_template(
                [
                    [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
                    for question, reply in turns
                ],
                tokenize=False,
            )
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            blind = batch["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE_MARK)
            embeds = llm.get_input_embeddings()(batch["input_ids"])
            embeds = torch.where(blind.unsqueeze(-1), torch.randn_like(embeds), embeds)
            labels = batch["input_ids"].masked_fill(blind | (batch["attention_mask"] == 0), IGNORE)
            loss = llm(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if step % 8 != 7:
                losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)

"""Demo: MoVA end to end on one machine, from pictures to a report, in minutes. Every stage is the real pipeline at size mini.

data -> language model -> precompute -> pretrain -> sft -> label -> router -> evaluate -> report.html
"""

import hashlib
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from cluster.session import ray_session
from mova_core.assemble import assemble
from mova_core.data import IMAGE_MARK, Sample, read_samples
from mova_core.experts import EXPERTS
from mova_core.features import FeatureStore
from mova_core.figures import number
from mova_core.io import strict_json
from mova_core.processing import IGNORE, MoVAProcessor
from mova_core.routing import build_routing_prompt, build_routing_reply
from pipelines.demo.data import build_demo_data
from pipelines.demo.report import write_report
from pipelines.evaluate.run import evaluate
from pipelines.label import label
from pipelines.precompute.listing import find_images
from pipelines.precompute.run import precompute
from pipelines.progress_bar import progress_bar
from pipelines.train.config import Stage, TrainConfig
from pipelines.train.run import train

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}ASSISTANT:\n{{ message.content }}{{ eos_token }}\n"
    "{% elif message.role == 'user' %}USER: {{ message.content }}\n"
    "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"  # a reply starts after a line break, so it is tokenised as if alone
)
EOS, PAD = "</s>", "<pad>"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo; the defaults are what `mova demo` runs."""

    folder: str
    images: int = 480
    seed: int = 0
    language_steps: int = 200
    pretrain_epochs: float = 1.0
    sft_epochs: float = 4.0
    router_epochs: float = 0.8
    batch_size: int = 32
    workers: int = 2


def demo(config: DemoConfig, progress: bool = True, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs or resumes the demo. Returns what `mova demo --json` prints.

    A stage that is finished is kept; features that are in the store are never computed again.
    """
    started = time.perf_counter()
    root = Path(config.folder).resolve()
    root.mkdir(parents=True, exist_ok=True)
    start, store, labelled, answered = root / "start", root / "store", root / "train.routed.json", root / "answers.json"
    stages = Stages(root, config, say)
    with PeakMemory() as memory:
        data = build_demo_data(root / "data", config.seed, config.images, bar_of("draw pictures", "images", progress))
        images = str(data.images)
        stages.build_on((data.folder / "demo_data.json").read_text())
        stages.run("language model", start, lambda: start_model(config, data.train, start, progress))

        def trained(stage: Stage, model: Path, records: Path, epochs: float, learning_rate: float) -> dict[str, Any]:
            settings = TrainConfig(
                stage=stage,
                model=str(model),
                data=str(records),
                images=images,
                store=str(store),
                output=str(root / stage),
                learning_rate=learning_rate,
                batch_size=config.batch_size // 2 if stage == "router" else config.batch_size,
                epochs=epochs,
                warmup=0.1,
                seed=config.seed,
                checkpoint_every=100,
                workers=config.workers,
                lora_rank=16,
                shuffle_pool=False,  # the small LLM reads letters, not descriptions
            )
            return train(settings, progress)

        def judged() -> dict[str, Any]:
            result = evaluate(
                str(root / "router"),
                str(data.test),
                str(store),
                images=images,
                train=str(data.train),
                progress=progress,
            )
            to_file(answered, result)
            return {"questions": len(result["answers"])}

        with ray_session():
            say("precompute: seven experts at size mini, frozen random networks")
            features = precompute(
                find_images(data.images),
                store,
                pools=[f"{name}=1,batch=16" for name in EXPERTS],
                size="mini",
                shard_mb=1,
                progress=progress,
            )
            stages.results["precompute"] = {"seconds": features.seconds}
            computed, reused = sum(features.computed.values()), sum(features.reused.values())
            say(
                f"precompute: {computed} features computed, {reused} reused, {len(features.quarantined)} pictures refused"
            )
            stages.build_on(str(sorted(FeatureStore(store).fingerprints.items())))
            stages.run(
                "pretrain",
                root / "pretrain",
                lambda: trained("pretrain", start, data.train, config.pretrain_epochs, 1e-3),
            )
            stages.run(
                "sft", root / "sft", lambda: trained("sft", root / "pretrain", data.train, config.sft_epochs, 1e-3)
            )
            stages.run(
                "label",
                labelled,
                lambda: asdict(
                    label(
                        str(root / "sft"), str(data.train), str(store), str(labelled), images=images, progress=progress
                    )
                ),
            )
            stages.run(
                "router", root / "router", lambda: trained("router", root / "sft", labelled, config.router_epochs, 1e-2)
            )
            stages.run("evaluate", answered, judged)
    result = json.loads(answered.read_text())
    out = {
        "kinds": result["kinds"],
        "seconds": round(time.perf_counter() - started, 1),
        "peak_bytes": memory.peak,
        "features_computed": computed,
        "features_reused": reused,
        "quarantined": features.quarantined,
    }
    write_report(root / "report.html", out, result["answers"], stages.results)
    say(f"report: {root / 'report.html'}")
    return out


class Stages:
    """Runs stages once: a stage is kept whose marker was made with the same settings after the same stages before it."""

    def __init__(self, root: Path, settings: DemoConfig, say: Callable[[str], None]):
        self.root, self.say = root, say
        self.chain = str(settings)
        self.results: dict[str, Any] = {}

    def build_on(self, what: str) -> None:
        """What the stages from here on read; when it changes they are run again."""
        self.chain = hashlib.sha256(f"{self.chain}/{what}".encode()).hexdigest()

    def run(self, name: str, output: Path, work: Callable[[], dict[str, Any]]) -> None:
        """Runs `work`, which makes `output` and returns numbers about it, unless that was done before."""
        self.build_on(name)
        marker = self.root / "stages" / f"{name}.json"
        done = json.loads(marker.read_text()) if marker.exists() and output.exists() else {}
        if done.get("settings") == self.chain:
            self.results[name] = done["result"]
            self.say(f"{name}: done before, kept ({output})")
            return
        started = time.perf_counter()
        self.results[name] = {**work(), "seconds": round(time.perf_counter() - started, 1)}
        to_file(marker, {"settings": self.chain, "result": self.results[name]})
        numbers = {key: value for key, value in self.results[name].items() if isinstance(value, int | float)}
        self.say(f"{name}: " + ", ".join(f"{key} {number(value)}" for key, value in numbers.items()))


class PeakMemory:
    """Measures the most memory this process and all its children held at once (proportional set size).

    It looks every three seconds: each look walks the page tables of some thirty processes.
    """

    peak = 0

    def __enter__(self) -> "PeakMemory":
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it ended meanwhile
                    continue
            self.peak = max(self.peak, total)
            if self.stop.wait(3.0):
                return


def start_model(config: DemoConfig, train_file: Path, folder: Path, progress: bool) -> dict[str, Any]:
    """Makes the model that pre-training starts from: tokenizers and a small Llama taught the demo's language, no picture seen."""
    torch.manual_seed(config.seed)
    samples = read_samples(train_file)
    talk = [(f"{IMAGE_MARK * 36}\n{sample.question}", sample.answer) for sample in samples]
    orders = routing_orders(samples, random.Random(config.seed))
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
            initializer_range=0.08,  # so that words it seldom sees stay apart, the routing letters among them
        )
    )
    loss = teach_language(llm, tokenizer, talk, orders, config.language_steps, config.seed, progress)
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
    return {"steps": config.language_steps, "loss": loss, "parameters": model.num_parameters()}


def routing_orders(samples: list[Sample], rng: random.Random) -> list[tuple[str, str]]:
    """Routing instructions with a reply by chance: their form is part of the language, which experts to pick is not."""
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
    """WordPiece as BERT's, learned from the demo's text."""
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
    """Next-token training on short `talk`, every eighth step on the long `orders`; returns the last loss on talk (nats per token).

    Noise stands where a picture's tokens will: the model learns to talk beside them, and cannot learn to see.
    """
    torch.set_num_threads(1)  # its matrices are small: on a shared machine two threads mostly wait for each other
    optimizer = torch.optim.AdamW(llm.parameters(), lr=3e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    rng, losses = random.Random(seed), []
    with progress_bar(steps, "language model", "steps", progress) as bar:
        for step in range(steps):
            turns = rng.choices(orders, k=4) if step % 8 == 7 else rng.choices(talk, k=32)
            texts = tokenizer.apply_chat_template(
                [[{"role": "user", "content": ask}, {"role": "assistant", "content": reply}] for ask, reply in turns],
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


def bar_of(what: str, unit: str, progress: bool) -> Callable[[int, int], None]:
    """A progress bar as a callback (done, total)."""
    bar = progress_bar(None, what, unit, progress)

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return update


def to_file(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(strict_json.dumps(value, indent=1))
    draft.replace(path)

"""Answers of a whole MoVA: batched against one at a time, time to first token by step, and against its LLM alone.

Weights are random, so what is said means nothing; how long it takes does. Pictures are drawn, questions are one sentence,
the router is asked for real and taken to name `--routed` experts, whose features lie in memory as they would in a store
that is read fast. Base features are kept from the first, unmeasured batch on, as between the turns of a conversation.
Without options it runs the two cases that a CPU can: `mini`, and `wide`, the published adapter's width and depth on a
smaller grid. `--case published` is the published size; give it `--device cuda --dtype bfloat16 --llm 8b`.
"""

import argparse
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from benchmarks.parts import parse_arguments

_GPU = ("--case", "published", "--llm", "8b", "--dtype", "bfloat16", "--repeat", "3", "--seconds", "0")
PARTS = {  # of benchmarks/gpu.py
    "batch-8": (*_GPU, "--batch", "8"),
    "batch-32": (*_GPU, "--batch", "32", "--singles", "1"),
}
QUICK = ("--case", "mini", "--llm", "small", "--dtype", "float32", "--batch", "2", "--tokens", "4", "--singles", "1")

CASES = {  # width of the adapter, side of its grid in tokens, blocks
    "mini": (128, 12, 2),
    "wide": (1024, 12, 3),
    "published": (1024, 48, 3),
}
LLMS: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    "8b": {  # Llama 3
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
EXPERTS = {  # expert -> (channels, grid) as the published experts give them (paper Table 12)
    "dinov2": (1536, 37),
    "vary": (512, 32),
    "codetr": (256, 37),
    "pix2struct": (1536, 45),
    "deplot": (768, 45),
    "biomedclip": (768, 14),
    "sam": (256, 64),
}
QUESTION = "Which of the two is left, and what is in the picture?"
ROUTER_SAYS = 4  # tokens of a routing reply, its end included (paper: 3.24 on average)


def test_tokenizers() -> tuple[Any, Any]:
    """The small ones that the tests train: of the LLM, and of the gate's text."""
    path = Path(__file__).resolve().parents[1] / "tests" / "mova_core" / "conftest.py"
    spec = importlib.util.spec_from_file_location("mova_test_models", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.llm_tokenizer(), module.text_tokenizer()


def build(case: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """A random model of a case's size, and its processor."""
    import torch
    from transformers import BertConfig, LlamaConfig

    from mova_core.adapter import BERT_LARGE, AdapterConfig
    from mova_core.config import MoVAConfig
    from mova_core.experts import expert_card
    from mova_core.model import MoVAForConditionalGeneration
    from mova_core.processing import MoVAProcessor

    torch.manual_seed(0)
    width, grid, blocks = CASES[case]
    llm_tokens, text_tokens = test_tokenizers()
    text: dict[str, Any] = (
        dict(BERT_LARGE) if case == "published" else {**BERT_LARGE, "num_hidden_layers": 2, "vocab_size": 2048}
    )
    adapter = AdapterConfig(
        expert_channels={name: channels if width > 128 else 64 for name, (channels, _) in EXPERTS.items()},
        out_width=LLMS[args.llm]["hidden_size"],
        width=width,
        grid=grid,
        blocks=blocks,
        text_encoder=BertConfig(**text).to_diff_dict() | text,
    )
    clip = dict(expert_card("clip").full if case == "published" else expert_card("clip").mini)
    config = MoVAConfig(
        text_config=LlamaConfig(max_position_embeddings=8192, bos_token_id=None, eos_token_id=1, **LLMS[args.llm]),
        base_arch=clip | {"width": width, "channels": width, "heads": width // 64, "image_size": 14 * grid},
        pool=[
            {"name": name, "channels": channels, "description": expert_card(name).description}
            for name, channels in adapter.expert_channels.items()
        ],
        adapter=adapter.to_dict(),
        image_token_id=llm_tokens.convert_tokens_to_ids("<image>"),
        routing_grid=grid // 4,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            model = MoVAForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    processor = MoVAProcessor.for_model(config, llm_tokens, text_tokens)
    return model.to(args.device, getattr(torch, args.dtype)), processor


class InMemory:
    """A source that has random features of every picture and expert at hand, on grids that go with the base grid."""

    fingerprints: Mapping[str, str] = {}

    def __init__(self, model: Any):
        import torch

        from mova_core.experts import Features

        self.features = {}
        for name, channels in model.adapter.config.expert_channels.items():
            side = max(1, round(EXPERTS[name][1] * model.adapter.config.grid / 48))
            self.features[name] = Features(torch.randn(side * side, channels).to(model.dtype), (side, side))

    def fetch(self, images: Sequence[Any], experts: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        return [{name: self.features[name] for name in names} for names in experts]


def picture(number: int) -> Any:
    """A picture like no other."""
    from PIL import Image

    from mova_core.images import ImageRef

    file = io.BytesIO()
    Image.new("RGB", (640, 480), (number * 37 % 256, number * 91 % 256, number * 53 % 256)).save(file, "png")
    return ImageRef(data=file.getvalue())


def in_turns(
    cases: Mapping[str, Callable[[], Any]], repeat: int, least_seconds: float, device: str
) -> dict[str, tuple[float, float, Any]]:
    """Per case the median seconds and CPU seconds of its runs, and what the last run returned. The cases take turns.

    Args:
        repeat, least_seconds: of every case, both at least.
    """
    import torch

    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    results: dict[str, Any] = {}
    while any(len(done) < repeat or sum(wall for wall, _ in done) < least_seconds for done in runs.values()):
        for name, run in cases.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            results[name] = run()
            if device == "cuda":
                torch.cuda.synchronize()
            runs[name].append((time.perf_counter() - started, time.process_time() - cpu_started))
    medians = {name: [statistics.median(times) for times in zip(*done, strict=True)] for name, done in runs.items()}
    return {name: (wall, cpu, results[name]) for name, (wall, cpu) in medians.items()}


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Answers per second one at a time and per batch size, each with seconds by step."""
    from mova_core.answering import Answerer, Question
    from mova_core.answering import answerer as module

    model, processor = build(case, args)
    questions = [Question(image=picture(number), text=QUESTION) for number in range(max(args.batch))]
    answerer = Answerer(model, processor, InMemory(model))
    pool = len(EXPERTS)
    names = [[(number * args.routed + more) % pool for more in range(args.routed)] for number in range(pool)]
    heard = iter(range(10**9))
    rows: list[dict[str, Any]] = []
    with (
        patch.object(module, "ROUTER_TOKENS", ROUTER_SAYS),
        patch.object(module, "read_reply", lambda *_: names[next(heard) % pool]),
    ):

        def ask(some: Sequence[Question], tokens: int = args.tokens) -> Any:
            return answerer.answer(some, tokens, min_new_tokens=tokens)

        ask(questions, 2)  # base features are kept from here on
        ask(questions[:1], 2)  # a GPU chooses its kernels anew for every batch size
        few = questions[: args.singles]
        answering: dict[str, Callable[[], Any]] = {"1": lambda: [ask([one])[0] for one in few]}
        answering |= {str(batch): partial(ask, questions[:batch]) for batch in args.batch if batch > 1}
        measured = in_turns(answering, args.repeat, args.seconds, args.device)
        for name, (seconds, cpu, answers) in measured.items():
            batch, asked = int(name), len(few) if name == "1" else int(name)
            steps = {step: sum(one.seconds[step] for one in answers) / len(answers) for step in answers[0].seconds}
            rows.append(
                {"batch": batch, "answers_per_second": asked / seconds, "per_cpu_second": asked / cpu, "seconds": steps}
            )
            rows[-1] |= beside_llm(model, processor, questions[:batch], partial(ask, questions[:batch], 1), args)
            rows[-1]["tokens_per_second"] = rows[-1]["answers_per_second"] * args.tokens
    return {"case": case, "rows": rows}


def beside_llm(
    model: Any, processor: Any, questions: Sequence[Any], ask_one_token: Callable[[], Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds from the question to an answer of one token, beside the same LLM on as many prompt tokens, text only."""
    import torch

    ids = processor([[("user", one.text)] for one in questions], [one.image for one in questions], pixels=False)
    ids = ids["input_ids"].masked_fill(ids["input_ids"] == processor.image_token_id, 5).to(model.device)

    def generate(tokens: int) -> None:
        with torch.inference_mode():
            model.language_model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                eos_token_id=1,
                pad_token_id=0,
            )

    cases: dict[str, Callable[[], Any]] = {
        "ours": ask_one_token,
        "first": partial(generate, 1),
        "whole": partial(generate, args.tokens),
    }
    for run in cases.values():
        run()
    measured = in_turns(cases, max(2, args.repeat), 0.0, args.device)
    first, alone = measured["ours"][0], measured["first"][0]
    return {
        "first_token_seconds": first,
        "overhead": 1 - alone / first,
        "llm_alone": {
            "prompt_tokens": ids.shape[1],
            "first_token_seconds": alone,
            "tokens_per_second": len(questions) * args.tokens / measured["whole"][0],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=["mini", "wide"], help="sizes to measure")
    parser.add_argument(
        "--llm", choices=LLMS, default="small", help="the LLM's shape: 2 million parameters, or 8 billion"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="questions per batch, beside one at a time")
    parser.add_argument("--singles", type=int, default=3, help="questions asked one at a time")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per answer")
    parser.add_argument("--routed", type=int, default=2, help="experts per question")
    parser.add_argument("--repeat", type=int, default=10, help="runs of each, at least; the median counts")
    parser.add_argument("--seconds", type=float, default=60.0, help="of answering per batch size, at least")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parse_arguments(parser, PARTS, (*QUICK, "--repeat", "1", "--seconds", "0"))
    if min(args.batch) < 1 or not 1 <= args.routed <= len(EXPERTS) or args.tokens < 2:
        parser.error("--batch from 1, --tokens from 2, --routed from 1 to the pool's 7")
    args.singles = min(args.singles, max(args.batch))

    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    found = [measure(case, args) for case in args.case]
    if args.json:
        print(json.dumps({"settings": vars(args), "cases": found}))
        return
    for one in found:
        width, grid, blocks = CASES[one["case"]]
        print(
            f"\n{one['case']}: adapter of width {width}, grid {grid}x{grid}, {blocks} blocks; LLM {args.llm}; ", end=""
        )
        where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
        print(f"{args.routed} experts a question, {args.tokens} tokens an answer; {where}, {args.dtype}")
        print(
            f"{'batch':>5} {'answers/s':>10} {'tokens/s':>9} {'LLM alone':>10} {'1st token':>10} {'LLM alone':>10} overhead"
        )
        for row in one["rows"]:
            bare = row["llm_alone"]
            print(
                f"{row['batch']:>5} {row['answers_per_second']:>10.2f} {row['tokens_per_second']:>9.0f} "
                f"{bare['tokens_per_second']:>10.0f} {1000 * row['first_token_seconds']:>7.0f} ms "
                f"{1000 * bare['first_token_seconds']:>7.0f} ms {row['overhead']:>7.0%}"
            )
        for row in one["rows"]:
            steps = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in row["seconds"].items())
            print(f"milliseconds by step, batch {row['batch']}: {steps}")
        first, last = one["rows"][0], one["rows"][-1]
        gain, cpu = (last[key] / first[key] for key in ("answers_per_second", "per_cpu_second"))
        print(
            f"batched by {last['batch']}: {gain:.1f} times the answers per second, {cpu:.1f} times those per CPU second"
        )


if __name__ == "__main__":
    main()

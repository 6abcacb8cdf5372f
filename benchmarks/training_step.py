"""A training step on one GPU: tokens/s, MFU, peak memory, and the memory plan's error.

Parts of the model at the widths of Vicuna-7B, with few layers, in bfloat16 as `mova train --precision bfloat16` computes. The
operations are those of `pipelines/train/flops.py`; the peak is that of the card's data sheet, and beside it stands what a
product of two large matrices reaches in the same process. The plan's error compares `pipelines/train/memory.py` without its
allowance for CUDA with the peak that PyTorch allocated.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from benchmarks.parts import parse_arguments

PARTS = {  # of benchmarks/gpu.py: what learns, and how many layers each part has
    "llm-7b": ("--freeze", "base,text", "--llm-layers", "8", "--clip-layers", "1", "--blocks", "1", "--batch", "4"),
    "clip": ("--freeze", "text,llm", "--clip-layers", "23", "--llm-layers", "1", "--blocks", "1", "--batch", "8"),
    "clip-checkpointed": (
        "--freeze", "text,llm", "--clip-layers", "23", "--llm-layers", "1", "--blocks", "1", "--batch", "8", "--checkpoint",
    ),
    "adapter": ("--freeze", "base,text,llm", "--clip-layers", "1", "--llm-layers", "1", "--blocks", "3", "--batch", "8"),
    "all": ("--freeze", "", "--clip-layers", "23", "--llm-layers", "4", "--blocks", "3", "--batch", "4", "--checkpoint"),
}  # fmt: skip
QUICK = ("--size", "mini", "--batch", "2", "--llm-layers", "1", "--clip-layers", "1", "--blocks", "1", "--repeat", "2")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a step, and what follows from it."""
    import torch

    from benchmarks.training_data import few_layers_model, sample_of
    from mova_core.config import MoVAConfig
    from mova_core.experts import Features
    from pipelines.train.config import TrainConfig
    from pipelines.train.flops import ModelFlops, peak_flops
    from pipelines.train.memory import plan_memory
    from pipelines.train.parallelize import parallelize
    from pipelines.train.stages import choose_parameters

    device, gpu = torch.device(args.device), args.device == "cuda"
    if gpu:
        device = torch.device("cuda", torch.cuda.current_device())
    model = few_layers_model(args.size, llm=args.llm_layers, clip=args.clip_layers, blocks=args.blocks)
    places: dict[str, Any] = dict.fromkeys(("model", "data", "store", "output"), "")
    sample = sample_of(model)
    config = TrainConfig(
        stage="sft", **places, freeze=tuple(filter(None, args.freeze.split(","))), precision="bfloat16", workers=1,
        max_length=sample["input_ids"].shape[1], checkpoint_activations=args.checkpoint, gpu=gpu,
    )  # fmt: skip
    choose_parameters(model, config)
    batch: dict[str, Any] = {
        name: value.expand(args.batch, *value.shape[1:]).contiguous().to(device)
        for name, value in sample.items() if isinstance(value, torch.Tensor)
    }  # fmt: skip
    batch["experts"] = {
        name: Features(found.tokens.expand(args.batch, -1, -1).to(device, torch.bfloat16), found.grid)
        for name, found in sample["experts"].items()
    }
    parallel = parallelize(
        model.train(), precision="bfloat16", checkpoint_activations=args.checkpoint, device=device, learning_rate=1e-5
    )
    answers = (batch["labels"][:, 1:] >= 0).sum()

    def step() -> None:
        parallel.step(1.0, parallel.backward([batch], answers)).item()

    seconds = timed(step, args.repeat, gpu)
    flops, tokens = ModelFlops(model).of(batch), batch["input_ids"].numel()
    product = matrix_product(device, 8192 if gpu else 512)
    peak = peak_flops(device, "bfloat16")
    share = float(answers) / tokens
    plan = plan_memory(config, cast(MoVAConfig, model.config), answer_share=share)
    planned = plan.state + max(plan.transient + args.batch * (plan.activations + plan.logits), plan.optimizer)
    allocated = torch.cuda.max_memory_allocated(device) if gpu else None
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "samples_per_second": args.batch / seconds,
        "flops_per_second": flops / seconds,
        "matrix_product": product,
        "of_matrix_product": flops / seconds / product,
        "mfu": flops / seconds / peak if peak else None,
        "planned_bytes": planned,
        "allocated_bytes": allocated,
        "plan_error": planned / allocated - 1 if allocated else None,
    }


def timed(work: Callable[[], object], repeat: int, gpu: bool) -> float:
    """Median seconds of `repeat` runs after two that choose kernels and allocate."""
    import torch

    times = []
    for _ in range(repeat + 2):
        started = time.perf_counter()
        work()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def matrix_product(device: Any, side: int) -> float:
    """Operations per second of a product of two square bfloat16 matrices."""
    import torch

    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / timed(lambda: torch.mm(left, right), 20, device.type == "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", choices=("full", "mini"), default="full", help="widths")
    parser.add_argument("--llm-layers", type=int, default=2, help="layers of the LLM")
    parser.add_argument("--clip-layers", type=int, default=2, help="layers of CLIP that run (published: 23)")
    parser.add_argument("--blocks", type=int, default=1, help="blocks of the adapter (published: 3)")
    parser.add_argument("--freeze", default="", help="parts that do not learn, by comma: base, text, llm")
    parser.add_argument("--checkpoint", action="store_true", help="compute activations twice")
    parser.add_argument("--batch", type=int, default=2, help="samples, each with a picture routed to two experts")
    parser.add_argument("--repeat", type=int, default=10, help="steps that count")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parse_arguments(parser, PARTS, QUICK)
    found = measure(args)
    if args.json:
        print(json.dumps({"settings": vars(args), **found}))
        return
    names = ("size", "llm_layers", "clip_layers", "blocks", "freeze", "checkpoint", "batch", "device")
    print(", ".join(f"{name} {getattr(args, name)}" for name in names))
    mfu = f", MFU {100 * found['mfu']:.1f} %" if found["mfu"] else ""
    print(
        f"step {found['seconds']:.3f} s: {found['tokens_per_second']:.0f} tokens/s, {found['samples_per_second']:.2f} samples/s{mfu}; "
        f"{found['flops_per_second'] / 1e12:.2f} TFLOP/s, {100 * found['of_matrix_product']:.0f} % of a matrix product's "
        f"{found['matrix_product'] / 1e12:.2f}"
    )
    planned = f"planned {found['planned_bytes'] / 1e9:.2f} GB"
    if found["allocated_bytes"]:
        planned += (
            f", allocated {found['allocated_bytes'] / 1e9:.2f} GB: the plan is {100 * found['plan_error']:+.1f} % off"
        )
    print(planned)


if __name__ == "__main__":
    main()

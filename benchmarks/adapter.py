"""Forward and backward of the MoV-Adapter: routed to a few experts, routed to all, and the equations written out.

The reference is the transcription in tests/mova_core/test_adapter.py: attention maps materialised, every expert run on
every picture. The cases take turns in one process for their time, so that a busy machine slows all of them, and run
in one process each for their peak memory.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

from benchmarks.parts import parse_arguments

_GPU = (
    "--width",
    "1024",
    "--out-width",
    "4096",
    "--grid",
    "48",
    "--blocks",
    "3",
    "--dtype",
    "bfloat16",
    "--repeat",
    "5",
)
PARTS = {  # of benchmarks/gpu.py: the published size
    "published": _GPU,
    "recomputed": (*_GPU, "--checkpointing", "--cases", "all", "routed"),
    "large-batch": (*_GPU, "--batch", "16", "--cases", "all", "routed"),  # the reference's maps would fill the memory
}
QUICK = ("--width", "64", "--out-width", "64", "--grid", "8", "--blocks", "1", "--batch", "2", "--repeat", "1")

# expert -> (channels, grid) as the published experts give them (paper Table 12)
EXPERTS = {
    "dinov2": (1536, 37),
    "vary": (512, 32),
    "codetr": (256, 37),
    "pix2struct": (1536, 45),
    "deplot": (768, 45),
    "biomedclip": (768, 14),
    "sam": (256, 64),
}
CASES = {
    "reference": "equations written out, every expert on every picture",
    "all": "MoVAdapter, routed to every expert",
    "routed": "MoVAdapter, routed to a few",
}


def transcription() -> Any:
    """The class `Equations` of the tests."""
    path = Path(__file__).resolve().parents[1] / "tests" / "mova_core" / "test_adapter.py"
    spec = importlib.util.spec_from_file_location("adapter_equations", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Equations


def measure(cases: Sequence[str], args: argparse.Namespace, repeat: int) -> dict[str, dict[str, float]]:
    """Per case the median seconds of its forward and backward and its output's mean square.

    Also the peak bytes beyond weights and inputs: the case's own if it is the only one.
    """
    import torch

    from mova_core.adapter import AdapterConfig, MoVAdapter
    from mova_core.experts.base import Features

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    gpu = device.type == "cuda"

    def peak() -> int:
        if gpu:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    config = AdapterConfig(
        expert_channels={name: channels for name, (channels, _) in EXPERTS.items()},
        out_width=args.out_width,
        width=args.width,
        grid=args.grid,
        blocks=args.blocks,
        text_encoder={"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 0, "vocab_size": 2},
        freeze_text_encoder=True,  # its features come ready made: what is measured is the fusion
    )
    adapter = MoVAdapter(config)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.02)  # a fresh adapter's zeros would make any two outputs agree
    adapter.to(device, dtype).train()
    adapter.gradient_checkpointing = args.checkpointing
    base = torch.randn(args.batch, args.grid**2, args.width).to(device, dtype)
    text = torch.randn(args.batch, 1024).to(device, dtype)
    experts = {}
    for name, (channels, side) in EXPERTS.items():
        side = max(1, round(side * args.grid / 48))
        experts[name] = Features(torch.randn(args.batch, side * side, channels).to(device, dtype), (side, side))
    everyone = torch.ones(args.batch, len(EXPERTS), dtype=torch.bool)
    chosen = torch.arange(args.batch * args.routed).view(args.batch, -1) % len(EXPERTS)
    few = torch.zeros_like(everyone).scatter_(1, chosen, True)  # to each expert as many pictures, as near as it goes
    everyone, few = everyone.to(device), few.to(device)
    equations = transcription()(adapter) if "reference" in cases else None
    run_of: dict[str, Callable[[], torch.Tensor]] = {
        "reference": lambda: equations(base, experts, everyone, text),  # type: ignore[misc]
        "all": lambda: adapter(base, experts, everyone, text),
        "routed": lambda: adapter(base, experts, few, text),
    }

    def run(case: str) -> tuple[float, float, float]:
        adapter.zero_grad(set_to_none=True)
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = run_of[case]().square().mean()
        loss.backward()
        value = loss.item()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start, time.process_time() - cpu_start, value

    before = peak()
    rounds = [{case: run(case) for case in cases} for _ in range(repeat)]
    found = {}
    for case in cases:
        # The first round chooses kernels and fills caches.
        counted = [one[case] for one in rounds[1:] or rounds]
        seconds, cpu_seconds, mean_square = map(statistics.median, zip(*counted, strict=True))
        found[case] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "mean_square": mean_square}
        found[case]["peak_bytes"] = peak() - before
    return found


def in_a_process(cases: Sequence[str], args: argparse.Namespace, repeat: int) -> dict[str, dict[str, float]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, cases, args, repeat).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="channels of the base tokens (published: 1024)")
    parser.add_argument("--out-width", type=int, default=512, help="channels of the visual tokens (published: 4096)")
    parser.add_argument("--grid", type=int, default=28, help="side of the base grid in tokens (published: 48)")
    parser.add_argument("--blocks", type=int, default=1, help="adapter blocks (published: 3)")
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--routed", type=int, default=2, help="experts per picture in the routed case")
    parser.add_argument("--repeat", type=int, default=20, help="runs per case; all but the first count")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what to measure")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parse_arguments(parser, PARTS, (*QUICK, "--dtype", "float32"))

    cases = in_a_process(args.cases, args, args.repeat)
    with patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="1000000"):  # glibc: freed blocks leave the process at once
        for case in args.cases:
            cases[case]["peak_bytes"] = in_a_process([case], args, 1)[case]["peak_bytes"]
    compared = (("routed", "all"), ("all", "reference"), ("routed", "reference"))
    ratios = {
        f"{one}/{other}": {key: cases[one][key] / cases[other][key] for key in ("seconds", "cpu_seconds", "peak_bytes")}
        for one, other in compared
        if one in cases and other in cases
    }
    if args.json:
        print(json.dumps({"settings": vars(args), "cases": cases, "ratios": ratios}))
        return
    names = ("width", "grid", "blocks", "batch", "routed", "device", "dtype")
    import torch

    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"forward and backward on {where},", ", ".join(f"{name} {getattr(args, name)}" for name in names))
    print(f"{'':16} {'time':>10} {'CPU time':>10} {'peak memory':>12}")
    for case, found in cases.items():
        memory = f"{found['peak_bytes'] / 2**30:8.2f} GiB"
        print(f"{case:16} {found['seconds']:8.2f} s {found['cpu_seconds']:8.2f} s {memory:>12}   {CASES[case]}")
    for name, ratio in ratios.items():
        print(f"{name:16} {ratio['seconds']:10.2f} {ratio['cpu_seconds']:10.2f} {ratio['peak_bytes']:12.2f}")


if __name__ == "__main__":
    main()

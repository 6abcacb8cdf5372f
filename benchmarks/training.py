"""Training against a bare torch loop, features from the store against experts online, and two ranks in one machine.

    python benchmarks/training.py [loop] [store] [experts] [ranks] [--seconds 60] [--repeat 1] [--size full] [--json]

loop: tokens/s of a run of `mova train sft` (one worker, features from a store, line of metrics per step) over those of a torch
loop that holds the same batches in memory and only computes: forward, backward, clipping, AdamW, schedule. Each side computes
on one thread for at least --seconds, in turns. A step lasts, on both sides, from asking for its batch to having its loss as a
number. data_wait is the share of the run's steps in which the worker waited for its batch.

store: steps whose samples have pictures with features from the store, beside steps of text alone with about as many tokens; both
timed with the wait for the trainer's own reader, which reads ahead. Pictures bring arithmetic of their own, so what is compared is operations per second.

experts: a step with given features, and the features of all seven experts, each network at its full width with one layer (--size
mini: in a second). What the store saves is (step + experts) / step; beside it the same ratio of the operations, and that
of the whole Vicuna-7B in stage 1.

ranks: two processes on one core each. DDP with an expert on zero rows where no image is routed to it (what `mova train` does) over
DDP that searches for unused parameters; and the bytes that a rank holds under DDP and FSDP2 over those of the memory plan.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
os.environ["PYTHONPATH"] = str(ROOT)  # of workers
BATCH, BATCHES = 8, 16  # samples of a step; steps of an epoch


def loop(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of both sides in turns; the first turn's bare loop is short and tells how many steps the time needs."""
    from benchmarks.training_data import write_run

    config = write_run(folder, BATCH * BATCHES, BATCH)
    step = _apart(bare_loop, config, 0.0)["seconds"] / BATCHES
    steps = BATCHES * math.ceil(max(options.seconds / step, 1) / BATCHES)
    turns = []
    for turn in range(options.repeat):
        bare = _apart(bare_loop, config, options.seconds)
        run = our_loop(replace(config, epochs=steps / BATCHES, output=f"{folder}/out-{turn}"))
        turns.append({"bare": bare, "run": run})
    ratios = [turn["run"]["tokens_per_second"] / turn["bare"]["tokens_per_second"] for turn in turns]
    waits = [turn["run"]["data_wait"] for turn in turns]
    return {"turns": turns, "ratio": statistics.median(ratios), "data_wait": statistics.median(waits)}


def our_loop(config: Any) -> dict[str, Any]:
    """The lines of `metrics.jsonl` of a whole run without its first epoch, in which caches fill."""
    from cluster.session import ray_session
    from pipelines.train.metrics import METRICS, read_metrics, summary
    from pipelines.train.run import train

    with ray_session():
        train(config, progress=False)
    lines = read_metrics(Path(config.output, METRICS).parent)
    counted = lines[BATCHES:] or lines
    return summary(counted) | {"steps": len(counted), "seconds": sum(line["seconds"] for line in counted)}


def bare_loop(config: Any, seconds: float) -> dict[str, Any]:
    """Trains on the batches of the run's first epoch, over and over, for at least `seconds` and one epoch."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    model, reader = open_run(config)
    batches = list(reader)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, 1000)
    spent, tokens, steps = 0.0, 0, 0
    while spent < seconds or steps < BATCHES:
        started = time.perf_counter()
        [batch] = batches[steps % len(batches)]
        loss = model(**batch.inputs, num_items_in_batch=batch.answers.sum()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss.item()
        spent += time.perf_counter() - started
        tokens += int(batch.inputs["attention_mask"].sum())
        steps += 1
    return {"tokens_per_second": tokens / spent, "steps": steps, "seconds": spent}


def open_run(config: Any) -> tuple[Any, Any]:
    """The model of a run and its `FeatureBatches`, read ahead as its only worker reads them."""
    import torch

    from mova_core.model import MoVAForConditionalGeneration
    from mova_core.processing import MoVAProcessor
    from pipelines.train.batches import open_batches
    from pipelines.train.data import check_data, read_chosen
    from pipelines.train.stages import choose_parameters

    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = check_data(config)
    samples, store = read_chosen(data.config, data.rows, data.sources)
    assert store is not None
    model = MoVAForConditionalGeneration.from_pretrained(config.model, dtype=torch.float32)
    choose_parameters(model, config)
    processor = MoVAProcessor.from_pretrained(config.model)
    return model, open_batches(data.config, samples, store, processor, model.config.pool, 0, 1)


def store(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Operations per second of steps with pictures and of steps of text, in turns of an epoch."""
    from benchmarks.training_data import write_run

    configs = {
        "pictures": write_run(folder / "pictures", BATCH * BATCHES, BATCH),
        "text": write_run(folder / "text", BATCH * BATCHES, BATCH, pictures=False),
    }
    sides = _apart(_read_and_train, configs, options.seconds)
    ratio = sides["pictures"]["flops_per_second"] / sides["text"]["flops_per_second"]
    return {"sides": sides, "ratio": ratio}


def _read_and_train(configs: Mapping[str, Any], seconds: float) -> dict[str, dict[str, float]]:
    from pipelines.train.flops import ModelFlops
    from pipelines.train.parallelize import parallelize

    sums = {side: {"seconds": 0.0, "tokens": 0.0, "flops": 0.0} for side in configs}
    runs = {side: open_run(config) for side, config in configs.items()}
    trainers = {side: parallelize(model.train(), learning_rate=1e-5) for side, (model, _) in runs.items()}
    while any(found["seconds"] < seconds for found in sums.values()):
        for side, (model, batches) in runs.items():
            parallel, flops, started = trainers[side], ModelFlops(model), time.perf_counter()
            for [batch] in batches:
                loss = parallel.backward([batch.inputs], batch.answers.sum())
                parallel.step(1.0, loss)
                sums[side]["tokens"] += int(batch.inputs["attention_mask"].sum())
                sums[side]["flops"] += flops.of(batch.inputs)
            sums[side]["seconds"] += time.perf_counter() - started
    return {
        side: found | {f"{key}_per_second": found[key] / found["seconds"] for key in ("tokens", "flops")}
        for side, found in sums.items()
    }


def experts(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step and of all seven experts, the fastest of --repeat + 1 turns each."""
    return _apart(_step_and_experts, options.size, options.repeat, threads=2)


def _step_and_experts(size: str, repeat: int) -> dict[str, Any]:
    import torch

    from benchmarks.training_data import few_layers_model, one_layer_experts, sample_of
    from mova_core.experts.cost import count_flops, example, shapes_of
    from pipelines.train.flops import ModelFlops
    from pipelines.train.parallelize import parallelize

    model = few_layers_model(size)
    model.language_model.requires_grad_(False)  # stage 1
    batch = sample_of(model)
    parallel = parallelize(model.train(), learning_rate=1e-5)
    pool, shapes = one_layer_experts(size), one_layer_experts(size, device="meta")
    pixels = {name: example(expert) for name, expert in pool.items()}

    def step() -> None:
        parallel.step(1.0, parallel.backward([batch], torch.tensor(8)))

    @torch.no_grad()
    def compute() -> None:
        for name, expert in pool.items():
            expert(pixels[name])

    seconds: dict[str, float] = {"step": math.inf, "experts": math.inf}
    for _ in range(repeat + 1):
        for name, work in (("step", step), ("experts", compute)):
            started = time.perf_counter()
            work()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    flops = {"step": ModelFlops(model).of(batch), "experts": float(sum(count_flops(e) or 0 for e in shapes.values()))}
    whole = {
        "step": _stage_1_flops(),
        "experts": float(sum(count_flops(shapes_of(name, "full")) or 0 for name in pool)),
    }
    ratio = {name: 1 + found["experts"] / found["step"] for name, found in
             {"seconds": seconds, "flops": flops, "flops of Vicuna-7B": whole}.items()}  # fmt: skip
    return {"seconds": seconds, "flops": flops, "ratio": ratio}


def _stage_1_flops() -> float:
    """Operations of a sample of 700 tokens in stage 1 of Vicuna-7B, routed to two experts."""
    import torch

    from benchmarks.training_data import sample_of
    from mova_core.model import MoVAForConditionalGeneration
    from pipelines.train.flops import ModelFlops
    from pipelines.train.memory import full_size
    from pipelines.train.recipes import VICUNA_7B

    with torch.device("meta"):
        model = MoVAForConditionalGeneration(full_size(VICUNA_7B))
    model.language_model.requires_grad_(False)
    return ModelFlops(model).of(sample_of(model, shapes=True))


def ranks(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Two gloo processes, see `benchmarks/training_ranks.py`."""
    import torch.multiprocessing

    from benchmarks.training_ranks import run_rank

    torch.multiprocessing.start_processes(run_rank, (str(folder), options.seconds), nprocs=2, start_method="spawn")
    return json.loads((folder / "ranks.json").read_text())


def _apart(work: Callable[..., Any], *arguments: Any, threads: int = 1) -> Any:
    """Runs a function in a process of its own, on so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


PARTS: Mapping[str, Callable[[Path, argparse.Namespace], Any]] = {
    "loop": loop,
    "store": store,
    "experts": experts,
    "ranks": ranks,
}


def table(part: str, result: Any) -> str:
    """For people: what was measured, and its goal."""
    if part == "loop":
        return (
            f"loop: {result['ratio']:.3f} of a bare loop's tokens/s (goal: 0.97), "
            f"waiting for data {100 * result['data_wait']:.1f} % of the time (goal: under 3 %)"
        )
    if part == "store":
        tokens = {side: found["tokens_per_second"] for side, found in result["sides"].items()}
        return (
            f"store: {result['ratio']:.2f} of the operations/s of text alone (goal: 0.95); tokens/s with pictures "
            f"{tokens['pictures']:.0f}, of text {tokens['text']:.0f}"
        )
    if part == "experts":
        ratio, seconds = result["ratio"], result["seconds"]
        return (
            f"experts: online {ratio['seconds']:.2f} times a step from the store (step {seconds['step']:.1f} s, experts "
            f"{seconds['experts']:.1f} s); by operations {ratio['flops']:.2f}, of the whole Vicuna-7B {ratio['flops of Vicuna-7B']:.2f}"
        )
    lines = [f"ranks: a step with zero rows takes {result['ratio']:.2f} of one that searches for unused parameters"]
    lines += [
        f"  {name}: a rank holds {held:.4f} of the plan's bytes" for name, held in result["held over plan"].items()
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="what to measure [all]")
    parser.add_argument("--seconds", type=float, default=60.0, help="of work of each side [60]")
    parser.add_argument("--repeat", type=int, default=1, help="turns of each side in `loop` and `experts` [1]")
    parser.add_argument("--size", choices=("full", "mini"), default="full", help="widths of `experts` [full]")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = parser.parse_args(argv)
    if options.seconds <= 0 or options.repeat < 1:
        parser.error("--seconds must be over 0 and --repeat at least 1")
    results: dict[str, Any] = {}
    for part in options.part or PARTS:
        with tempfile.TemporaryDirectory(prefix="mova-training-") as folder:
            results[part] = PARTS[part](Path(folder), options)
        if not options.json:
            print(table(part, results[part]), flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()

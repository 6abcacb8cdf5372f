"""Every GPU test and benchmark, one after another, each part in a process of its own with a limit of nine minutes.

Needs torch, transformers, timm, peft and pyarrow with the small libraries of pyproject.toml, and no Ray. A part that
fails or runs out of time does not stop the others; the exit status is 1 if there was one. `--device cpu --quick` tries
every part at its smallest size, in a few minutes without a GPU.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("experts", "adapter", "model", "training_step")
REQUIRED = (
    "torch",
    "transformers",
    "timm",
    "peft",
    "pyarrow",
    "safetensors",
    "accelerate",
    "xxhash",
    "fsspec",
    "tenacity",
)
NO_TESTS = 5  # pytest's exit status when it selects no test


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one part ended."""

    part: str
    state: str  # "passed", "failed (exit status N)" or "over the limit"
    seconds: float
    output: str


def list_parts(benchmark: str) -> list[str]:
    """Names of the parts of benchmarks/NAME.py."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{benchmark}.py"), "--list-parts"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line]


def command_of(part: str, device: str, quick: bool) -> list[str]:
    """The command of a part: "tests", or BENCHMARK:NAME."""
    if part == "tests":
        return [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/mova_core",
            "tests/golden",
            "tests/pipelines/train/test_gpu.py",
        ]
    benchmark, _, name = part.partition(":")
    script = str(ROOT / "benchmarks" / f"{benchmark}.py")
    return [sys.executable, script, "--part", name, "--device", device, *(["--quick"] if quick else [])]


def run_part(part: str, command: Sequence[str], limit_s: float) -> Result:
    """Runs a part, showing its output as it comes; ends it, with all its children, after `limit_s` seconds."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        accepted = (0, NO_TESTS) if part == "tests" else (0,)
        state = "passed" if process.returncode in accepted else f"failed (exit status {process.returncode})"
    except subprocess.TimeoutExpired:
        state = "over the limit"
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    except BaseException:  # Ctrl-C: the part's session does not get it
        os.killpg(process.pid, signal.SIGKILL)
        raise
    print(output, flush=True)
    return Result(part=part, state=state, seconds=time.monotonic() - started, output=output)


def describe_machine(device: str) -> str:
    """The card and the versions that the numbers belong to."""
    import torch
    import transformers

    card = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{card}, torch {torch.__version__}, transformers {transformers.__version__}"


def report(machine: str, results: Sequence[Result]) -> str:
    """The tables as Markdown for docs/performance.md, and how each part ended."""
    lines = [f"## On a GPU\n\n{machine}\n"]
    for result in results:
        lines += [f"### {result.part}: {result.state}, {result.seconds:.0f} s\n", "```", result.output.strip(), "```\n"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: whether every part runs")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these; default: all, see --list")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--minutes", type=float, default=9.0, help="longest time of one part, minutes; default: 9")
    parser.add_argument("--output", type=Path, help="also write the report to this Markdown file, after every part")
    args = parser.parse_args()
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        parser.error(f"not installed: {', '.join(missing)}")
    every = ["tests", *(f"{name}:{part}" for name in BENCHMARKS for part in list_parts(name))]
    if args.list:
        print("\n".join(every))
        return 0
    parts = args.parts or every
    if unknown := sorted(set(parts) - set(every)):
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(every)}")
    machine = describe_machine(args.device)
    print(machine, flush=True)
    results: list[Result] = []
    for number, part in enumerate(parts, 1):
        print(f"\n[{number} of {len(parts)}] {part}", flush=True)
        results.append(run_part(part, command_of(part, args.device, args.quick), 60 * args.minutes))
        if args.output:
            args.output.write_text(report(machine, results))
    print(f"\n{machine}")
    for result in results:
        print(f"{result.part:32} {result.seconds:6.0f} s   {result.state}")
    return int(any(result.state != "passed" for result in results))


if __name__ == "__main__":
    sys.exit(main())

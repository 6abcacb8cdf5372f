"""A trace of some steps of a run by torch.profiler."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule


def step_profiler(
    steps: tuple[int, int] | None, done: int, folder: Path, rank: int
) -> AbstractContextManager["profile | None"]:
    """A profiler whose `step()` the loop calls after each step; its context yields None where there is nothing to trace.

    Writes `rank<N>.json.gz` for chrome://tracing or Perfetto when the last of the steps is done.

    Args:
        steps: first and last step to trace, counted from 1.
        done: steps that were done before, by an earlier part of the run.
        folder: receives the trace.
        rank: of this process.
    """
    if steps is None or steps[0] <= done:  # a part of the steps would be taken for all of them
        return nullcontext()
    first, last = steps
    before = first - 1 - done
    warmup = min(before, 1)  # the first step of a profiler starts the tracing itself

    def write(profiler: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank{rank}.json.gz"))

    traced = schedule(skip_first=before - warmup, wait=0, warmup=warmup, active=last - first + 1, repeat=1)
    return profile(schedule=traced, on_trace_ready=write, acc_events=True)

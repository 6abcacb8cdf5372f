"""`metrics.jsonl`, a line per step of a run, and what it says of a whole run. Imports neither torch nor Ray."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mova_core.io import strict_json
from mova_core.io.atomic import write_atomic
from pipelines.train.config import TrainConfig

METRICS = "metrics.jsonl"
STOP_AFTER = 3  # skipped steps in a row that end a run


def find_metrics(output: str | Path) -> Path:
    """The folder with the `metrics.jsonl` of a trained model's folder, or of the run that is to write it.

    Raises:
        FileNotFoundError: there is none.
    """
    runs = Path(f"{output}.ray").glob(f"*/{METRICS}")
    found = [path for path in (Path(output, METRICS), *runs) if path.exists()]
    if not found:
        raise FileNotFoundError(f"{output} has no {METRICS}: give the --output of a training")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; empty where there is none. A line cut off by a kill is left out."""
    path = Path(folder, METRICS)
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsFile:
    """`metrics.jsonl` in a folder, written by one process.

    Args:
        steps: what a resumed run's checkpoint holds: lines of later steps are dropped, as those steps are done once more.
    """

    def __init__(self, folder: str | Path, steps: int):
        rows = [row for row in read_metrics(folder) if row["step"] <= steps]
        self.path = Path(folder, METRICS)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, "".join(strict_json.dumps(row) + "\n" for row in rows))

    def write(self, row: dict[str, Any]) -> None:
        """Appends a line; a number that is not finite becomes null."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(strict_json.dumps(row) + "\n")


class TrainingError(RuntimeError):
    """A run cannot go on; the message says why and what to change."""


def check_finite(rows: Sequence[dict[str, Any]], config: TrainConfig) -> None:
    """Refuses the end of a run that `StepMeter.stopped` ended.

    Raises:
        TrainingError: names a sample of the last step.
    """
    last = rows[-STOP_AFTER:]
    if len(last) == STOP_AFTER and all(row.get("skipped") for row in last):
        first, count = last[-1]["suspects"][0], len(last[-1]["suspects"])
        others = f" and {count - 1} more" if count > 1 else ""
        raise TrainingError(
            f"{config.stage} stopped at step {last[-1]['step']}: loss or gradient of {STOP_AFTER} steps in a row was no finite "
            f"number (the last with {first}{others}); give a lower --learning-rate, or check the features of these samples"
        )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a whole run did, from the lines of its steps.

    Returns:
        {"tokens_per_second", "data_wait", "mfu", "skipped_steps", "eval_loss"}: tokens of all workers per second of steps;
        the share of that time in which a worker waited for data; the MFU, None where unknown; the number of skipped steps; and
        the loss of the last evaluation, None without one.
    """
    seconds = sum(row["seconds"] for row in rows)
    used = [row["mfu"] * row["seconds"] for row in rows if row["mfu"] is not None]
    return {
        "tokens_per_second": sum(row["tokens"] for row in rows) / seconds if rows else None,
        "data_wait": sum(row["data_wait"] for row in rows) / seconds if rows else None,
        "mfu": sum(used) / seconds if used else None,
        "skipped_steps": sum(bool(row.get("skipped")) for row in rows),
        "eval_loss": next((row["eval_loss"] for row in reversed(rows) if "eval_loss" in row), None),
    }

"""Where the lines of a run go beside `metrics.jsonl`: TensorBoard, Weights & Biases and MLflow, each through its own package."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mova_core.data import DataError
from pipelines.train.config import TrainConfig
from pipelines.train.metrics import MetricsFile

PROJECT = "mova"  # of Weights & Biases
Log = Callable[[int, dict[str, float]], Any]  # takes a step and its numbers


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker that is unknown, or whose package is not installed.

    Raises:
        DataError: names the package and how to install it.
    """
    for name in names:
        if name not in TRACKERS:
            raise DataError(f"--log {name}: the trackers are {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise DataError(f"--log {name} needs the package {name}: pip install 'mova-ray[{name}]'")


def logs_folder(config: TrainConfig) -> Path:
    """Holds the files of trackers and profilers, beside the output: they stay when the checkpoints go."""
    return Path(f"{config.output}.logs")


@contextmanager
def open_log(config: TrainConfig, run_folder: str, steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that writes a step's line to `metrics.jsonl` and to the run's trackers.

    Args:
        run_folder: holds `metrics.jsonl`; its name identifies the run.
        steps: what the run's checkpoint holds; later lines of the file are dropped.
    """
    file = MetricsFile(run_folder, steps)
    folder, name = logs_folder(config), Path(run_folder).name
    if config.log:
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        logs = [opened.enter_context(TRACKERS[tracker](config, folder, name, steps)) for tracker in config.log]

        def write(line: dict[str, Any]) -> None:
            file.write(line)
            for log in logs:
                log(line["step"], numbers(line))

        yield write


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by name, as trackers take them: those of an object as "sources/NAME"."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        values = (
            {f"{key}/{name}": number for name, number in value.items()} if isinstance(value, dict) else {key: value}
        )
        flat |= {name: number for name, number in values.items() if isinstance(number, int | float) and name != "step"}
    return flat


@contextmanager
def _tensorboard(config: TrainConfig, folder: Path, name: str, steps: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides what was written for steps that are done once more.
    with SummaryWriter(str(folder / "tensorboard" / name), purge_step=steps + 1 if steps else None) as writer:

        def log(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        yield log


@contextmanager
def _wandb(config: TrainConfig, folder: Path, name: str, steps: int) -> Iterator[Log]:
    import wandb

    settings = {"project": PROJECT, "id": name, "name": f"{Path(config.output).name} {name}", "config": asdict(config)}
    with wandb.init(dir=str(folder), resume="allow", **settings) as run:
        yield lambda step, values: run.log(values, step=step)


@contextmanager
def _mlflow(config: TrainConfig, folder: Path, name: str, steps: int) -> Iterator[Log]:
    import mlflow

    run_id = folder / f"{name}.mlflow"  # MLflow chooses the ids of its runs
    known = run_id.read_text() if steps and run_id.exists() else None
    with mlflow.start_run(run_id=known, run_name=None if known else f"{Path(config.output).name} {name}") as run:
        run_id.write_text(run.info.run_id)
        if known is None:
            mlflow.log_params({key: str(value)[:500] for key, value in asdict(config).items()})
        yield lambda step, values: mlflow.log_metrics(values, step=step)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}

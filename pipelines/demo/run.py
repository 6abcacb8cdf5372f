"""Demo: MoVA end to end on one machine, from pictures to a report, in minutes. Every stage is the real pipeline at size mini.

data -> language model -> precompute -> pretrain -> sft -> label -> router -> evaluate -> report.html
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.session import ray_session
from mova_core.experts import EXPERTS
from mova_core.features import FeatureStore
from mova_core.figures import number
from mova_core.io import strict_json
from mova_core.io.atomic import write_atomic
from pipelines.demo.data import DemoData, build_demo_data
from pipelines.demo.report import write_report
from pipelines.demo.start_model import create_start_model
from pipelines.evaluate.run import evaluate
from pipelines.label import label
from pipelines.precompute.listing import find_images
from pipelines.precompute.run import precompute
from pipelines.progress_bar import progress_bar
from pipelines.train.config import Stage, TrainConfig
from pipelines.train.run import train

LABELLED, ANSWERS = "train.routed.json", "answers.json"  # files in the folder of the demo
MEMORY_SECONDS = 3.0  # between two measurements; each walks the page tables of some thirty processes


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo; `mova demo` runs with the defaults."""

    folder: str
    images: int = 480
    seed: int = 0
    language_steps: int = 200
    pretrain_epochs: float = 1.0
    sft_epochs: float = 4.0
    router_epochs: float = 0.8
    batch_size: int = 32
    workers: int = 2


def demo(config: DemoConfig, progress: bool = True, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs or resumes the demo. A stage that is finished is kept; features in the store are never computed again.

    Args:
        log: called with a line for each stage.

    Returns:
        What `mova demo --json` prints.

    Raises:
        FileExistsError: the folder holds something else.
    """
    started = time.perf_counter()
    root = Path(config.folder).resolve()
    root.mkdir(parents=True, exist_ok=True)
    stages = Stages(root, config, log)
    with PeakMemory() as memory:
        data = build_demo_data(root / "data", config.seed, config.images, _bar("draw pictures", "images", progress))
        stages.depend_on((data.folder / "demo_data.json").read_text())
        stages.run(
            "language model",
            root / "start",
            lambda: create_start_model(root / "start", data.train, config.language_steps, config.seed, progress),
        )
        with ray_session():
            log("precompute: seven experts at size mini, frozen random networks")
            features = precompute(
                find_images(data.images),
                root / "store",
                pools=[f"{name}=1,batch=16" for name in EXPERTS],
                size="mini",
                shard_mb=1,
                progress=progress,
            )
            stages.results["precompute"] = {"seconds": features.seconds}
            computed, reused = sum(features.computed.values()), sum(features.reused.values())
            log(
                f"precompute: {computed} features computed, {reused} reused, {len(features.quarantined)} pictures refused"
            )
            stages.depend_on(str(sorted(FeatureStore(root / "store").fingerprints.items())))
            _train_and_evaluate(config, root, data, stages, progress)
    result = json.loads((root / ANSWERS).read_text())
    out = {
        "kinds": result["kinds"],
        "seconds": round(time.perf_counter() - started, 1),
        "peak_bytes": memory.peak,
        "features_computed": computed,
        "features_reused": reused,
        "quarantined": features.quarantined,
    }
    write_report(root / "report.html", out, result["answers"], stages.results)
    log(f"report: {root / 'report.html'}")
    return out


def _train_and_evaluate(config: DemoConfig, root: Path, data: DemoData, stages: "Stages", progress: bool) -> None:
    """The stages that read the store, up to the answers to the test questions."""
    store, images, labelled, answers = str(root / "store"), str(data.images), root / LABELLED, root / ANSWERS

    def training(stage: Stage, model: str, records: Path, epochs: float, learning_rate: float) -> None:
        settings = TrainConfig(
            stage=stage,
            model=str(root / model),
            data=str(records),
            images=images,
            store=store,
            output=str(root / stage),
            learning_rate=learning_rate,
            batch_size=config.batch_size // 2 if stage == "router" else config.batch_size,
            epochs=epochs,
            warmup=0.1,
            seed=config.seed,
            checkpoint_every="100",
            workers=config.workers,
            lora_rank=16 if stage == "router" else 0,
            shuffle_pool=False,  # the small LLM reads letters, not descriptions
            unlabelled="random",  # the model that labels has seen every expert alone
        )
        stages.run(stage, root / stage, lambda: train(settings, progress))

    def labels() -> dict[str, Any]:
        return asdict(label(str(root / "sft"), str(data.train), store, str(labelled), images=images, progress=progress))

    def evaluation() -> dict[str, Any]:
        router, test, known = str(root / "router"), str(data.test), str(data.train)
        result = evaluate(router, test, store, images=images, train=known, progress=progress)
        write_atomic(answers, strict_json.dumps(result, indent=1))
        return {"questions": len(result["answers"])}

    training("pretrain", "start", data.train, config.pretrain_epochs, 1e-3)
    training("sft", "pretrain", data.train, config.sft_epochs, 1e-3)
    stages.run("label", labelled, labels)
    training("router", "sft", labelled, config.router_epochs, 1e-2)
    stages.run("evaluate", answers, evaluation)


class Stages:
    """Runs each stage once: keeps a finished stage whose settings, and whose stages before it, are unchanged.

    Args:
        root: the demo's folder; a file per finished stage lies in `stages/`.
    """

    def __init__(self, root: Path, settings: DemoConfig, log: Callable[[str], None]):
        self.root, self.log = root, log
        self.key = str(settings)  # identifies everything that the next stage depends on
        self.results: dict[str, Any] = {}

    def depend_on(self, content: str) -> None:
        """Makes all further stages depend on this content; when it changes, they run again."""
        self.key = hashlib.sha256(f"{self.key}/{content}".encode()).hexdigest()

    def run(self, name: str, output: Path, work: Callable[[], dict[str, Any]]) -> None:
        """Runs `work`, which writes `output` and returns numbers about it, unless this stage is finished."""
        self.depend_on(name)
        marker = self.root / "stages" / f"{name}.json"
        finished = json.loads(marker.read_text()) if marker.exists() and output.exists() else {}
        if finished.get("settings") == self.key:
            self.results[name] = finished["result"]
            self.log(f"{name}: done before, kept ({output})")
            return
        started = time.perf_counter()
        self.results[name] = {**work(), "seconds": round(time.perf_counter() - started, 1)}
        marker.parent.mkdir(exist_ok=True)
        write_atomic(marker, strict_json.dumps({"settings": self.key, "result": self.results[name]}, indent=1))
        numbers = {key: value for key, value in self.results[name].items() if isinstance(value, int | float)}
        self.log(f"{name}: " + ", ".join(f"{key} {number(value)}" for key, value in numbers.items()))


class PeakMemory:
    """Measures the peak memory in bytes of this process and all its children together (proportional set size)."""

    peak = 0

    def __enter__(self) -> "PeakMemory":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        this_process = psutil.Process()
        while True:
            total = 0
            for process in (this_process, *this_process.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # the process has ended since it was listed
                    continue
            self.peak = max(self.peak, total)
            if self._stop.wait(MEMORY_SECONDS):
                return


def _bar(what: str, unit: str, progress: bool) -> Callable[[int, int], None]:
    """A progress bar as a function of (done, total)."""
    bar = progress_bar(None, what, unit, progress)

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return update

"""What can go wrong in a precompute, on a real two-node cluster: kills at random moments, full disks, failing stores, bit rot.

After each fault the store must hold every feature once, pass `verify`, and have the bytes of a run that nothing disturbed.
The expert is tests/waiting_expert.py: it goes through the real server, actors and store, but computes no network, so
that a run is long enough to be hit and cheap enough to be run again. MOVA_FAULT_MOMENTS=10 for the full proof: kills per
kind, 2 by default. What was killed when is printed (`pytest -rP`) and kept in $MOVA_FAULT_REPORT, a JSON file, if named.
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.mova_core.features.test_store_remote import Server

ROOT = Path(__file__).parents[2]
MOMENTS = int(os.environ.get("MOVA_FAULT_MOMENTS", "2"))
PICTURES = 480
WAITING_MS = 5 * MOMENTS  # per picture: a node that dies and the next one that comes take seconds
COMMAND = (
    "precompute {pictures} --store {store} --experts waiting --import waiting_expert --size mini "
    "--pool waiting={actors},batch=8 --shard-mb 0.03 --json --quiet"
)
START = 0.4  # of a run's moments lie before its first commit: inspection, and the start of the actors
COMMITS = 0.95  # up to here they follow the commits; what is left is the end, with its snapshot
WORK = 0.85  # an actor or a node that dies later had nothing more to do

pytestmark = pytest.mark.ray
# Drivers are forked off a process that has done the imports, or half of this file's time would go into torch's.
forks = multiprocessing.get_context("forkserver")


def drive(arguments: Sequence[str], said: str) -> None:
    """In a process of its own: the command `mova ARGUMENTS`, its stdout and stderr into files."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["mova", *arguments]
    from pipelines.cli.main import main

    main()


def mova(folder: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """What a command prints as JSON; it must end with that exit code."""
    process = forks.Process(target=drive, args=(arguments, str(folder / "mova")))
    process.start()
    process.join()
    assert process.exitcode == code, (folder / "mova.err").read_text()
    return json.loads((folder / "mova.out").read_text())


class Driver:
    """A running `mova precompute`."""

    def __init__(self, place: Path, store: str, actors: int = 2, name: str = "driver"):
        self.store = store
        self.said = str(place / name)
        command = COMMAND.format(pictures=place / "pictures", store=store, actors=actors).split()
        self.found = _receipts(store)
        self.started = time.monotonic()
        self.process = forks.Process(target=drive, args=(command, self.said))
        self.process.start()

    def alive(self) -> bool:
        return self.process.is_alive()

    def end(self) -> dict[str, Any]:
        """Waits for its orderly end; its summary."""
        self.process.join()
        assert self.process.exitcode == 0, f"exit {self.process.exitcode}: {self.error()}"
        return json.loads(Path(f"{self.said}.out").read_text())

    def error(self) -> str:
        return Path(f"{self.said}.err").read_text().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@dataclass
class Place:
    """A two-node cluster, the pictures, and what an undisturbed run makes of them."""

    folder: Path
    cluster: Any
    s3: Server
    node: Any = None  # the second one, which may be killed; the first has no room for both actors
    bytes_of: dict[str, bytes] = field(default_factory=dict)
    first_commit: float = 0.0  # seconds from the start of a run
    shards: int = 0

    def add_node(self) -> None:
        self.node = self.cluster.add_node(num_cpus=2, labels={"speed": "1"})

    def actors(self) -> list[psutil.Process]:
        """The processes of the expert's actors, on both nodes."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "MapWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def computed(self) -> int:
        """Pictures that experts have computed since the last call, warm-ups left out."""
        log = self.folder / "waiting.log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        seen: set[str] = set()
        count = 0
        for _, process, pictures in lines:
            count += int(pictures) if process in seen else 0
            seen.add(process)
        return count


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("faults")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(11)
    for index in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).save(folder / "pictures" / f"{index:03}.png")
    path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        patch.setenv("WAITING_MS", str(WAITING_MS))
        patch.setenv("WAITING_LOG", str(folder / "waiting.log"))
        s3 = Server()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.http.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "any")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name, value in (("period_ms", 500), ("timeout_ms", 1000), ("failure_threshold", 3)):
            patch.setenv(f"RAY_health_check_{name}", str(value))  # a dead node is noticed in seconds
        patch.setenv("RAY_raylet_start_wait_time_s", "120")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        patch.setenv("RAY_ADDRESS", cluster.address)
        forks.set_forkserver_preload(
            ["cluster.session", "pipelines.cli.main", "pipelines.precompute.run", "waiting_expert"]
        )
        here = Place(folder, cluster, s3)
        try:
            here.add_node()
            run = Driver(folder, str(folder / "undisturbed"))
            while not _receipts(run.store) and run.alive():
                time.sleep(0.02)
            here.first_commit = time.monotonic() - run.started
            assert run.end()["computed"] == {"waiting": PICTURES}
            here.bytes_of = stored(run.store)
            here.shards = _receipts(run.store)
            assert len(here.bytes_of) == PICTURES and here.computed() == PICTURES
            yield here
        finally:
            cluster.shutdown()
            s3.close()


@pytest.fixture(autouse=True)
def nothing_left(place: Place) -> Iterator[None]:
    """Neither a count nor a driver of the test before."""
    place.computed()
    yield
    for process in multiprocessing.active_children():
        process.kill()


def _receipts(store: str) -> int:
    return sum(1 for _ in Path(store).glob("waiting/*/receipts/[!.]*.parquet"))


def reach(place: Place, run: Driver, moment: float, draw: random.Random) -> bool:
    """Waits for a moment, 0 to 1, of a run; False where it was over before."""
    until = run.started + moment / START * place.first_commit
    commits = min(place.shards, round((moment - START) / (COMMITS - START) * place.shards))

    def come() -> bool:
        there = _receipts(run.store)  # sooner than the undisturbed run had any, perhaps
        return there > run.found or time.monotonic() >= until if moment < START else there >= commits

    while not come():
        if not run.alive():
            return False
        time.sleep(0.01)
    time.sleep(draw.random() * 0.2)  # the time of a shard: anywhere in it
    return run.alive()


def wait_for_commits(run: Driver, commits: int) -> None:
    while _receipts(run.store) < commits:
        assert run.alive(), run.error()
        time.sleep(0.01)


def kill_driver(place: Place, run: Driver) -> str:
    run.kill()
    return "driver"


def kill_actor(place: Place, run: Driver) -> str:
    while not (actors := place.actors()):
        assert run.alive(), run.error()
        time.sleep(0.01)
    title = actors[0].cmdline()[0]
    actors[0].kill()
    return title


def kill_node(place: Place, run: Driver) -> str:
    raylet = psutil.Process(place.node.all_processes["raylet"][0].process.pid)
    processes = [raylet, *raylet.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    place.cluster.remove_node(place.node, allow_graceful=False)
    place.add_node()
    return f"{len(processes)} processes"


KILLS: dict[str, Callable[[Place, Driver], str]] = {"driver": kill_driver, "actor": kill_actor, "node": kill_node}


@pytest.mark.parametrize("kind", KILLS)
@pytest.mark.timeout(300 + 60 * MOMENTS)
def test_kill(place, kind, tmp_path):
    """kill -9 at moments spread at random over a run. A driver is started again; a run outlives its actors and nodes."""
    draw = random.Random(kind)
    last = 1.0 if kind == "driver" else WORK
    moments = [last * (number + draw.random()) / MOMENTS for number in range(MOMENTS)]
    run = Driver(place.folder, str(tmp_path / "store"))
    killed = []
    for moment in moments:
        if not reach(place, run, moment, draw):
            break
        seen = phase(place, run)
        killed.append({"moment": round(moment, 2), **seen, "killed": KILLS[kind](place, run)})
        if kind == "driver":
            run = Driver(place.folder, run.store)
    summary = run.end()
    report(kind, killed=killed, redone=place.computed() - PICTURES, last_run=summary["computed"]["waiting"])
    assert len(killed) >= sum(moment < COMMITS for moment in moments), "a run ended before its time"
    check(place, run.store)


def test_full_disk(place, small_disk):
    """A disk with room enough at the start, which something else fills in mid-run."""
    disk = small_disk("16m")
    run = Driver(place.folder, str(disk / "store"))
    wait_for_commits(run, place.shards // 3)
    with open(disk / "another", "wb", buffering=0) as another:
        while run.alive():
            with contextlib.suppress(OSError):
                another.write(bytes(4096))
                continue
            time.sleep(0.001)
    run.process.join()
    assert run.process.exitcode == 1
    assert re.fullmatch(r"mova: [^\n]*cannot write to store [^\n]*: free space there[^\n]*", run.error()), run.error()
    kept = stored(run.store)
    assert 0 < len(kept) < PICTURES and kept.items() <= place.bytes_of.items()
    (disk / "another").unlink()
    again = Driver(place.folder, run.store).end()
    assert again["reused"] == {"waiting": len(kept)}
    report("full disk", kept=len(kept), redone=place.computed() - PICTURES)
    check(place, run.store)


def test_two_precomputes_on_one_store(place, tmp_path):
    """Neither knows of the other. Both end well, and what both computed is stored once."""
    store = str(tmp_path / "store")
    both = [Driver(place.folder, store, actors=1, name=name) for name in ("one", "other")]
    computed = [run.end()["computed"]["waiting"] for run in both]
    report("two precomputes", computed=computed, twice=place.computed() - PICTURES)
    check(place, store)


def test_flipped_bytes(place, tmp_path):
    """100 random bytes of a finished store, whatever they are of: `verify` names all, the next precompute makes them anew."""
    store = tmp_path / "store"
    shutil.copytree(place.folder / "undisturbed", store)
    [partition] = store.glob("waiting/*")
    rows = [row for receipt in partition.glob("receipts/*.parquet") for row in pq.read_table(receipt).to_pylist()]
    files = [
        path for path in sorted(store.rglob("*")) if path.is_file() and path.name not in ("store.json", "expert.json")
    ]
    ends = np.cumsum([path.stat().st_size for path in files])
    draw = random.Random(0)
    hit = []  # file, relative to the partition, and where
    for place_in_store in draw.sample(range(int(ends[-1])), 100):
        number = int(np.searchsorted(ends, place_in_store, "right"))
        path, at = files[number], place_in_store - int(ends[number - 1] if number else 0)
        with open(path, "r+b") as file:
            file.seek(at)
            [byte] = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ draw.randrange(1, 256)]))
        hit.append((str(path.relative_to(partition if path.is_relative_to(partition) else store)), at))

    told = mova(tmp_path, "store", "verify", str(store), "--json", "--quiet", code=1)
    damaged = {(damage["shard"], damage["key"]) for damage in told["damaged"]}
    shards = {shard for shard, _ in damaged}
    for name, at in hit:
        receipt = f"receipts/{Path(name).name.partition('-')[0]}.parquet"
        if name.startswith("shards/") and receipt not in shards:
            inside = [row["key"] for row in rows if f"shards/{row['file']}" == name and row["offset"] <= at]
            assert (name, inside[-1] if inside else "") in damaged, f"{name} at {at}"
        elif name.startswith("shards/") or name in shards:
            continue  # known by its receipt, which is damaged itself
        elif name.startswith("receipts/"):
            shard = next(row["file"] for row in rows if row["file"].startswith(Path(name).stem))
            assert f"shards/{shard}" in shards
        else:
            assert f"index/{Path(name).stem}.arrow" in shards

    missing = PICTURES - len(stored(str(store)))
    # With receipt, shard header and index damaged, nothing says which features a shard had: they are not counted.
    receipts = {Path(name).stem for name in shards if name.startswith("receipts/")}
    unnamed = sum(row["file"].partition("-")[0] in receipts for row in rows)
    assert missing - unnamed <= told["withdrawn"] <= missing
    again = Driver(place.folder, str(store)).end()
    assert again["computed"]["waiting"] == missing and not again["quarantined"]
    report("100 flipped bytes", files=len({name for name, _ in hit}), damages=len(damaged), redone=place.computed())
    check(place, str(store))


def test_a_store_on_s3_that_fails_one_call_in_twenty(place):
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it keeps the endpoint of who asked first
    fsspec.filesystem("s3").mkdir("faults")
    place.s3.failing, before = 0.05, len(place.s3.asked)
    try:
        summary = Driver(place.folder, "s3://faults/store").end()
    finally:
        place.s3.failing = 0.0
    assert summary["computed"] == {"waiting": PICTURES} and place.s3.failed
    calls = len(place.s3.asked) - before
    report("failing S3", calls=calls, failed=place.s3.failed, redone=place.computed() - PICTURES)
    check(place, "s3://faults/store")


def phase(place: Place, run: Driver) -> dict[str, Any]:
    """Where a run is, by what lies in its store and which processes there are."""
    store = Path(run.store)
    return {
        "commits": _receipts(run.store),
        "actors": len(place.actors()),
        "drafts": sum(1 for _ in store.glob("waiting/*/*/.*.tmp")),
        "snapshots": sum(1 for _ in store.glob("waiting/*/snapshots/[!.]*")),
    }


def check(place: Place, store: str) -> None:
    """Every feature once, every checksum right, every byte as if nothing had happened; and an index over them."""
    from mova_core.features import FeatureStore

    assert stored(store) == place.bytes_of
    assert list(FeatureStore(store).verify()) == []
    assert FeatureStore(store).partition("waiting").storage.list_files("snapshots", ".json")


def report(fault: str, **told: Any) -> None:
    """What was done to a run and what it cost: printed, and a line of $MOVA_FAULT_REPORT."""
    line = json.dumps({"fault": fault, **told})
    print(line)
    if path := os.environ.get("MOVA_FAULT_REPORT"):
        with open(path, "a") as file:
            file.write(line + "\n")


def stored(store: str, **options: Any) -> dict[str, bytes]:
    """Image key -> the bytes of its feature, as the receipts tell, read past the code under test. Each is there once."""
    files, root = fsspec.url_to_fs(store, **options)
    shards: dict[str, bytes] = {}
    found: dict[str, bytes] = {}
    for receipt in files.glob(f"{root}/waiting/*/receipts/*.parquet"):
        with files.open(receipt) as file:
            rows = pq.read_table(file).to_pylist()
        folder = receipt.rpartition("/receipts/")[0]
        for row in rows:
            shard = f"{folder}/shards/{row['file']}"
            if shard not in shards:
                shards[shard] = files.cat_file(shard)
            assert row["key"] not in found, f"{row['key']} is in two receipts"
            found[row["key"]] = shards[shard][row["offset"] : row["offset"] + row["length"]]
    return found

"""The samples that a stage learns from, checked before torch and Ray start (neither is imported here)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import starmap
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from mova_core.data import DataError, quarantine_check
from mova_core.features import FeatureStore, MissingFeatures
from mova_core.io.uris import absolute, local_path
from pipelines.invalid_records import no_usable_record, on_invalid, report_left_out, report_skipped
from pipelines.pictures import missing_files
from pipelines.read_data import check_unchanged, open_store, read_pool, version_of
from pipelines.train.config import LABEL_STAGES, TrainConfig
from pipelines.train.index import ROW, DataSource, IndexedSamples, SampleIndex
from pipelines.train.settings import check_settings

PROBES = 64  # samples whose features are looked up before any worker starts
AT_ONCE = 1 << 18  # records whose pictures are looked for together


@dataclass(kw_only=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        config: `fingerprints` names what the store serves for every expert: the run means the same in every process.
        rows: the samples, `ROW`; a sample that an epoch passes over twice stands there twice.
        sources: the data files.
        pool: the model's experts in routing order.
        left_out: reason -> number of valid records that the stage cannot use, and where the first one stands.
        skipped: the error of each invalid record left out.
        held_out: the samples of `config.eval_data`.
    """

    config: TrainConfig
    rows: np.ndarray
    sources: list[DataSource]
    pool: tuple[str, ...]
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    held_out: "TrainingData | None" = None

    @property
    def samples(self) -> IndexedSamples:
        return IndexedSamples(self.rows, self.sources, self.pool)

    def counts(self) -> dict[str, int]:
        """Reason -> number of records left out."""
        return {reason: number for reason, (number, _) in self.left_out.items()}

    def report(self) -> None:
        """Writes to stderr what was skipped and left out."""
        report_skipped(self.skipped)
        report_left_out(self.left_out)
        if self.held_out is not None:
            self.held_out.report()


def check_data(config: TrainConfig) -> TrainingData:
    """Reads the data of a run and refuses what would fail later, in a second or two for the first invalid record.

    Raises:
        DataError: an output that is no local folder, settings that do not go together, an invalid data file or record,
            samples without a routing label, or too few samples.
        StoreError: no store; features of other weights, or of several and none was chosen.
        MissingFeatures: the store lacks features of some of `PROBES` random samples.
    """
    if local_path(config.output) is None:
        raise DataError(f"--output {config.output}: training writes to a local folder; upload the folder afterwards")
    check_settings(config)
    data = _read(config)
    steps = total_steps(config, len(data.rows))
    if config.profile_steps is not None and config.profile_steps[1] > steps:
        raise DataError(
            f"--profile-steps ends at {config.profile_steps[1]}, the run at step {steps}: name earlier steps"
        )
    if config.eval_data is not None:
        data.held_out = _read(held_out_config(config))
    return data


def _read(config: TrainConfig) -> TrainingData:
    """The samples that a stage can use, and their features looked up."""
    store, pool = open_run_store(config)
    data = TrainingData(
        config=replace(config, fingerprints=dict(store.fingerprints)) if store else config,
        rows=np.empty(0, ROW), sources=data_sources(config), pool=pool,
    )  # fmt: skip
    is_quarantined = quarantine_check(store.quarantined() if store else ())
    usable = [_usable(data, number, is_quarantined) for number in range(len(data.sources))]
    weights = (1.0, *config.mix.values())
    parts = [_passes(found.rows, weight, config.seed) for found, weight in zip(usable, weights, strict=True)]
    data.rows = np.concatenate([*parts, _routing_rows(config, usable)])
    _check_samples(data, usable)
    if store and config.features == "store":
        check_features(data, store)
    return data


def held_out_config(config: TrainConfig) -> TrainConfig:
    """The settings by which `config.eval_data` is read: each sample once, for a loss per answer token."""
    assert config.eval_data is not None
    return replace(
        config, data=config.eval_data, mix={}, routing_samples=0, loss="token", batch_size=1, micro_batch=0, eval_data=None
    )  # fmt: skip


def data_sources(config: TrainConfig) -> list[DataSource]:
    """The data files of a run as they are now; each is named as its file, or by more of its path where two have one name."""
    paths = [config.data, *config.mix]
    if repeated := {path for path in paths if paths.count(path) > 1}:
        raise DataError(f"--mix {min(repeated)}: the file is a source already; give it once, with its weight")
    names = [PurePosixPath(path).stem for path in paths]
    names = [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
    return [
        DataSource(name=name, path=path, images=config.images, version=version_of(path))
        for name, path in zip(names, paths, strict=True)
    ]


def read_chosen(
    config: TrainConfig, rows: np.ndarray, sources: Sequence[DataSource]
) -> tuple[IndexedSamples, FeatureStore | None]:
    """The samples that the driver chose and the store, as a worker reads them.

    All workers must train on the samples that the driver chose, whatever becomes of a picture meanwhile: ranks that disagree
    would wait for each other for ever.

    Raises:
        DataError: a data file is another one now.
    """
    for source in sources:
        check_unchanged(source.path, source.version)
    store, pool = open_run_store(config)
    return IndexedSamples(rows, sources, pool), store


def open_run_store(config: TrainConfig) -> tuple[FeatureStore | None, tuple[str, ...]]:
    """The run's store, None where it uses none, and the model's experts in routing order.

    Raises:
        DataError: no model.
        StoreError: no store, or features of other weights than the model's.
    """
    if config.features == "online":
        return None, tuple(expert["name"] for expert in read_pool(config.model))
    return open_store(config, config.fingerprints, create=config.features == "tiered")


def check_features(data: TrainingData, store: FeatureStore) -> None:
    """Looks up the features of `PROBES` random samples; the label stages read no features.

    Raises:
        MissingFeatures: some are not in the store.
    """
    config, samples = data.config, data.samples
    if config.stage in LABEL_STAGES:
        return
    probed = random.Random(config.seed).sample(range(len(samples)), min(PROBES, len(samples)))
    keys: dict[str, dict[str, None]] = {}  # expert -> image keys, each once
    unlabelled = data.pool if config.unlabelled == "random" else ()
    for sample in (samples[position] for position in probed if not data.rows["routing"][position]):
        for name in unlabelled if sample.routing is None else sample.routing:
            keys.setdefault(name, {}).update((image.key, None) for image in sample.images)
    missing = [(key, name) for name, wanted in keys.items() for key in store.missing(list(wanted), name)]
    if missing:
        raise MissingFeatures.of(store.location, missing)


def total_steps(config: TrainConfig, samples: int) -> int:
    """Optimizer steps of a run; the incomplete batch at the end of an epoch is left out."""
    return max(1, round(samples // config.batch_size * config.epochs))


@dataclass(kw_only=True)
class _Usable:
    """The samples of one data file that the stage can use.

    Attributes:
        rows: `ROW` of each.
        can_route: bool, those with a routing label and one picture.
        unlabelled: samples with a picture and without a label; and where the first one stands.
    """

    rows: np.ndarray
    can_route: np.ndarray
    unlabelled: int = 0
    first_unlabelled: str = ""


def _usable(data: TrainingData, number: int, is_quarantined: Callable[[str], bool]) -> _Usable:
    """Reads source `number`, and adds to `data` what is left out of it.

    Raises:
        DataError: an invalid record, unless invalid records are to be skipped.
    """
    config, source = data.config, data.sources[number]
    errors: list[DataError] = []
    index = SampleIndex(source, data.pool, on_invalid(config.bad_rows, errors))
    data.skipped += map(str, errors)
    rows = np.zeros(len(index), ROW)
    can_route, used = np.zeros(len(index), bool), np.zeros(len(index), bool)
    found = _Usable(rows=rows, can_route=can_route)
    begin = 0
    for batch in index.batches(AT_ONCE):
        part = slice(begin, begin := begin + len(batch))
        for name in ("offset", "size", "number", "line", "length"):
            rows[name][part] = batch[name]
        reasons = _reasons(batch, config, is_quarantined)
        labelled, pictures = (
            batch["labelled"].to_numpy(zero_copy_only=False),
            batch["images"].value_lengths().to_numpy(),
        )
        used[part] = [reason is None for reason in reasons]
        can_route[part] = labelled & (pictures == 1)
        for at, reason in enumerate(reasons):
            where = f"{source.path}, record {batch['number'][at]}, line {batch['line'][at]}"
            if reason is not None:
                count, first = data.left_out.get(reason, (0, where))
                data.left_out[reason] = (count + 1, first)
            elif pictures[at] and not labelled[at]:
                found.unlabelled += 1
                found.first_unlabelled = found.first_unlabelled or where
    rows["source"] = number
    found.rows, found.can_route = rows[used], can_route[used]
    return found


def _reasons(batch: pa.RecordBatch, config: TrainConfig, is_quarantined: Callable[[str], bool]) -> list[str | None]:
    """Why the stage cannot use each record of a batch of the index; None where it can."""
    pictures = [[absolute(path) for path in paths] for paths in batch["images"].to_pylist()]
    missing = missing_files({path for paths in pictures for path in paths})
    columns = zip(pictures, batch["problem"].to_pylist(), batch["labelled"].to_pylist(), strict=True)
    of_labels = config.stage in LABEL_STAGES

    def reason(paths: list[str], problem: str | None, labelled: bool) -> str | None:
        if of_labels and len(paths) != 1:
            return "several pictures" if paths else "no picture"
        if any(map(is_quarantined, paths)):
            return "picture in quarantine"
        if not missing.isdisjoint(paths):
            return "picture cannot be read"
        return problem or ("no routing label" if of_labels and not labelled else None)

    return list(starmap(reason, columns))


def _passes(rows: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """`rows` as often as an epoch passes over them: `weight` times, of a fraction the same random share in every epoch."""
    whole, rest = divmod(weight * len(rows), len(rows) or 1)
    share = np.random.default_rng([seed, 2]).permutation(len(rows))[: round(rest)]
    return np.concatenate([*[rows] * int(whole), rows[np.sort(share)]])


def _check_samples(data: TrainingData, usable: Sequence[_Usable]) -> None:
    """Refuses samples without a label, and too few of them.

    Raises:
        DataError: says how many and names the first one.
    """
    config, files = data.config, ", ".join(source.path for source in data.sources)
    if config.stage in LABEL_STAGES:
        if not len(data.rows) and "no routing label" in data.left_out:
            raise DataError(f"{files} holds no routing label: run `mova label` and give the file it writes")
    elif config.unlabelled == "refuse" and (unlabelled := sum(found.unlabelled for found in usable)):
        first = next(found.first_unlabelled for found in usable if found.unlabelled)
        raise DataError(
            f"{unlabelled} records have no routing label (the first: {first}): run `mova label` and "
            "give the file it writes, or choose --unlabelled random (0 to 3 experts by chance, for the model that labels) or "
            "--unlabelled none (no expert)"
        )
    if not len(data.rows):
        raise no_usable_record(files, data.left_out)
    reasons = ", ".join(f"{reason}: {number}" for reason, number in data.counts().items())
    if len(data.rows) < config.batch_size:
        raise DataError(
            f"{files} holds {len(data.rows)} usable samples{f' (left out: {reasons})' if reasons else ''}, "
            f"fewer than --batch-size {config.batch_size}: give a smaller one"
        )


def _routing_rows(config: TrainConfig, usable: Sequence[_Usable]) -> np.ndarray:
    """The routing samples of supervised fine-tuning (the paper's are 2,000): labelled samples with one picture.

    Raises:
        DataError: there are fewer.
    """
    candidates = np.concatenate([found.rows[found.can_route] for found in usable])
    if len(candidates) < config.routing_samples:
        raise DataError(
            f"--routing-samples {config.routing_samples}: only {len(candidates)} records have a routing label and one picture"
        )
    rows = np.random.default_rng([config.seed, 1]).choice(candidates, config.routing_samples, replace=False)
    rows["routing"] = True
    return rows

"""The samples that a stage learns from, checked before torch and Ray start (neither is imported here)."""

import random
from collections.abc import Collection
from dataclasses import dataclass, replace

from mova_core.data import DataError, Sample, iterate_samples
from mova_core.features import FeatureStore, MissingFeatures
from mova_core.io.uris import local_path
from pipelines.read_data import ReadData, check_unchanged, open_store, read_data
from pipelines.train.config import LABEL_STAGES, TrainConfig

PROBES = 64  # samples whose features are looked up before any worker starts


@dataclass(kw_only=True)
class TrainingData(ReadData):
    """`ReadData`, and the config with every fingerprint settled: the run means the same in every process.

    Attributes:
        config: `fingerprints` names what the store serves for every expert.
    """

    config: TrainConfig


def check_data(config: TrainConfig) -> TrainingData:
    """Reads the data of a run and refuses what would fail later, in a second or two for the first invalid record.

    Raises:
        DataError: an output that is no local folder, an invalid data file or record, or too few samples.
        StoreError: no store; features of other weights, or of several and none was chosen.
        MissingFeatures: the store lacks features of some of `PROBES` random samples.
    """
    if local_path(config.output) is None:
        raise DataError(f"--output {config.output}: training writes to a local folder; upload the folder afterwards")
    data, store = read_training_data(config)
    check_features(data.config, data.samples, data.pool, store)
    return data


def read_training_data(config: TrainConfig) -> tuple[TrainingData, FeatureStore]:
    """The samples that the stage can use: each has an answer and a picture; for a router also a label.

    Raises:
        DataError, StoreError: as `check_data`.
    """
    data, store = read_data(config, fingerprints=config.fingerprints)
    if config.stage in LABEL_STAGES:
        data.leave_out("no routing label", lambda sample: sample.routing is None)
        if not data.samples:
            raise DataError(f"{config.data} holds no routing label: run `mova label` and give the file it writes")
    # Batch statistics of the light router need two samples per worker.
    smallest = config.workers * (2 if config.stage == "light-router" else 1)
    if config.batch_size < smallest:
        raise DataError(
            f"--batch-size {config.batch_size} is too small for --workers {config.workers}: give {smallest}"
        )
    if config.micro_batch and config.batch_size % (config.workers * config.micro_batch):
        raise DataError(
            f"--batch-size {config.batch_size} is no multiple of --workers {config.workers} x --micro-batch {config.micro_batch}"
        )
    if config.stage == "light-router" and (config.strategy != "ddp" or config.micro_batch):
        raise DataError("light-router trains with --strategy ddp and without --micro-batch: the light router is small")
    if len(data.samples) < config.batch_size:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in data.counts().items())
        raise DataError(
            f"{config.data} holds {len(data.samples)} usable samples{f' (left out: {reasons})' if reasons else ''}, "
            f"fewer than --batch-size {config.batch_size}: give a smaller one"
        )
    settled = replace(config, fingerprints=dict(store.fingerprints))
    return TrainingData(**vars(data), config=settled), store


def read_chosen(
    config: TrainConfig, numbers: Collection[int], version: str | None
) -> tuple[list[Sample], FeatureStore]:
    """The samples with these numbers and the store, as a worker reads them.

    All workers must train on the samples that the driver chose, whatever becomes of a picture meanwhile: ranks that disagree
    would wait for each other for ever.

    Args:
        version: of the data file that the driver read.

    Raises:
        DataError: the data file is another one now.
    """
    check_unchanged(config.data, version)
    store, pool = open_store(config, config.fingerprints)
    chosen = set(numbers)
    samples = iterate_samples(config.data, config.images, lambda _: None, pool)
    return [sample for sample in samples if sample.number in chosen], store


def check_features(config: TrainConfig, samples: list[Sample], pool: tuple[str, ...], store: FeatureStore) -> None:
    """Looks up the features of `PROBES` random samples; the label stages read no features.

    Raises:
        MissingFeatures: some are not in the store.
    """
    if config.stage in LABEL_STAGES:
        return
    probed = random.Random(config.seed).sample(samples, min(PROBES, len(samples)))
    keys: dict[str, dict[str, None]] = {}  # expert -> image keys, each once
    for sample in probed:
        for name in pool if sample.routing is None else sample.routing:
            if sample.image is not None:
                keys.setdefault(name, {})[sample.image.key] = None
    missing = [(key, name) for name, wanted in keys.items() for key in store.missing(list(wanted), name)]
    if missing:
        raise MissingFeatures.of(store.location, missing)


def total_steps(config: TrainConfig, samples: int) -> int:
    """Optimizer steps of a run; the incomplete batch at the end of an epoch is left out."""
    return max(1, round(samples // config.batch_size * config.epochs))

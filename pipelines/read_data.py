"""Reads and checks what training, labelling and evaluation work on. Imports neither torch nor Ray.

The command line calls these checks first: torch and Ray take 10 to 30 s to start, an invalid record is found in one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mova_core.data import IMAGE_MARK, DataError, Sample, split_usable
from mova_core.features import FeatureStore
from mova_core.io.filesystem import ReadError
from mova_core.io.read import file_version
from mova_core.io.uris import absolute, local_path
from pipelines.data_args import DataArgs
from pipelines.invalid_records import no_usable_record, read_valid_samples, report_left_out, report_skipped
from pipelines.model_config import read_model_config
from pipelines.pictures import missing_files

EMPTY_QUESTION, NO_ANSWER = "empty question", "no answer"  # reasons to leave a record out


@dataclass(kw_only=True)
class ReadData:
    """The samples of a data file.

    Attributes:
        samples: those that can be used.
        left_out: reason -> valid samples that cannot be used.
        skipped: the error of each invalid record left out, which names its file, number and line.
        pool: the model's experts in routing order.
        version: of the data file when it was read, as `file_version` gives it; what is known by a record's number holds for
            this version alone.
    """

    samples: list[Sample]
    left_out: dict[str, list[Sample]]
    skipped: list[str]
    pool: tuple[str, ...] = field(default=())
    version: str | None = None

    def counts(self) -> dict[str, int]:
        """Reason -> number of samples left out."""
        return {reason: len(samples) for reason, samples in self.left_out.items()}

    def leave_out(self, reason: str, unusable: Callable[[Sample], bool]) -> None:
        """Moves the samples for which `unusable` is true from the usable ones to those left out."""
        usable: list[Sample] = []
        for sample in self.samples:
            if unusable(sample):
                self.left_out.setdefault(reason, []).append(sample)
            else:
                usable.append(sample)
        self.samples = usable

    def require_samples(self, path: str) -> None:
        """Raises DataError, which says why each record of the file is left out, where none can be used."""
        if not self.samples:
            raise no_usable_record(path, self.told())

    def told(self) -> dict[str, tuple[int, str]]:
        """Reason -> number of samples left out, and where the first one stands."""
        return {reason: (len(samples), samples[0].where) for reason, samples in self.left_out.items()}

    def report(self) -> None:
        """Writes to stderr what was skipped and left out."""
        report_skipped(self.skipped)
        report_left_out(self.told())


def read_pool(model: str) -> list[dict[str, Any]]:
    """The expert pool in a model's config.json, as `MoVAConfig.pool`.

    Raises:
        DataError: the folder holds no MoVA model, or one without a pool.
    """
    try:
        return [{**expert, "name": str(expert["name"])} for expert in read_model_config(model)["pool"]]
    except ValueError as error:
        raise DataError(str(error)) from None
    except (KeyError, TypeError):
        raise DataError(f"{model}: config.json has no list of experts, `pool`: make the model anew") from None


def open_store(
    args: DataArgs, fingerprints: Mapping[str, str] | None = None, create: bool = False
) -> tuple[FeatureStore, tuple[str, ...]]:
    """The store, opened for the features that the model was trained on, and the model's experts in routing order.

    Args:
        fingerprints: expert -> features to read where the store has several; those of the model come first.
        create: an empty store where there is none.

    Raises:
        DataError: no model.
        StoreError: no store, or features of other weights than the model's.
    """
    pool = read_pool(args.model)
    trained_on = {expert["name"]: expert["fingerprint"] for expert in pool if expert.get("fingerprint")}
    store = FeatureStore(args.store, fingerprints={**(fingerprints or {}), **trained_on}, create=create)
    return store, tuple(expert["name"] for expert in pool)


def read_data(args: DataArgs, *, fingerprints: Mapping[str, str] | None = None) -> tuple[ReadData, FeatureStore]:
    """Reads the data file and opens the store. What cannot be used is left out alike for every command.

    Args:
        fingerprints: as `open_store` takes them.

    Returns:
        The samples with a question, an answer and pictures that can be had, at least one; and the store.

    Raises:
        DataError: no model, an invalid data file or record, or no sample that can be used.
        StoreError: no store, or features of other weights than the model's.
    """
    store, names = open_store(args, fingerprints)

    version = version_of(args.data)
    valid, skipped = read_valid_samples(
        args.data, args.images, args.bad_rows, partial(check_routing, pool=names), names
    )
    samples, left_out = split_usable(valid, store.quarantined())
    data = ReadData(samples=samples, left_out=left_out, skipped=skipped, pool=names, version=version)
    missing = missing_files({path for sample in samples for path in picture_paths(sample)})
    data.leave_out("picture cannot be read", lambda sample: not missing.isdisjoint(picture_paths(sample)))
    data.leave_out(EMPTY_QUESTION, lambda sample: problem_of(sample) == EMPTY_QUESTION)
    data.leave_out(NO_ANSWER, lambda sample: problem_of(sample) == NO_ANSWER)
    data.require_samples(args.data)
    return data, store


def check_routing(sample: Sample, pool: Sequence[str]) -> None:
    """Raises DataError for a label that names an expert which the model does not have."""
    if unknown := sorted(set(sample.routing or ()) - set(pool)):
        raise DataError(f"{sample.where}: `routing` names {', '.join(unknown)}; the model has {', '.join(pool)}")


def check_unchanged(path: str, version: str | None) -> None:
    """Refuses a data file that was written again since it was read, because the records may have other numbers now.

    Raises:
        DataError: the file has changed, or is gone.
    """
    if version != (now := version_of(path)):
        raise DataError(f"{path} has {'changed' if now else 'vanished'} since the command began: start it again")


def version_of(path: str) -> str | None:
    """What tells this content of a data file from a later one; None where there is no telling, or no such file."""
    try:
        return file_version(path)
    except ReadError:  # the reader says what is wrong
        return None


def picture_paths(sample: Sample) -> list[str]:
    """Absolute paths or URLs of a sample's pictures."""
    return [absolute(image.path or "") for image in sample.images]


def problem_of(sample: Sample) -> str | None:
    """Why no command can use a valid sample: a question has no words that router or gate could read, or no answer follows one."""
    if any(role == "user" and not text.replace(IMAGE_MARK, "").strip() for role, text in sample.turns):
        return EMPTY_QUESTION
    return None if sample.exchanges else NO_ANSWER


def check_label_data(args: DataArgs, output: str) -> ReadData:
    """The samples that `mova label` can label.

    Raises:
        DataError: invalid data, or an output that is no local file.
        StoreError: no store, or features of other weights than the model's.
    """
    if local_path(output) is None:
        raise DataError(f"--output {output}: labels are written to a local file; upload the file afterwards")
    return read_data(args)[0]

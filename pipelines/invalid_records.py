"""Records of a data file that cannot be used: the first one ends the command, or all are left out and reported."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mova_core.data import DataError, Sample, iterate_samples
from pipelines.data_args import BadRows

__all__ = [
    "BadRows",
    "no_usable_record",
    "on_invalid",
    "read_valid_samples",
    "report_failed",
    "report_left_out",
    "report_skipped",
]

SHOWN = 5  # invalid records reported in full


def read_valid_samples(
    path: str | Path,
    images: str | Path | None = None,
    bad_rows: BadRows = "raise",
    check: Callable[[Sample], Any] | None = None,
    pool: Sequence[str] | None = None,
) -> tuple[list[Sample], list[str]]:
    """The samples of a data file, and the error of each invalid record left out, which names its file, number and line.

    Args:
        path, images, pool: as `read_samples` takes them.
        bad_rows: "raise" ends at the first invalid record, "skip" leaves invalid records out.
        check: raises DataError for a sample that the caller cannot use.

    Raises:
        DataError: an invalid record with "raise"; a file without a valid record.
    """
    errors: list[DataError] = []
    invalid = on_invalid(bad_rows, errors)
    samples = []
    for sample in iterate_samples(path, images, invalid, pool):
        try:
            if check is not None:
                check(sample)
        except DataError as error:
            invalid(error)
            continue
        samples.append(sample)
    if not samples:
        reason = f"no usable record, the first error: {errors[0]}" if errors else "no record"
        raise DataError(f"{path} holds {reason}: give a LLaVA JSON array or one JSON object per line")
    return samples, [str(error) for error in errors]


def on_invalid(bad_rows: BadRows, errors: list[DataError]) -> Callable[[DataError], None]:
    """What to do with the error of an invalid record: end with it, or collect it in `errors`."""

    def invalid(error: DataError) -> None:
        if bad_rows == "raise":
            raise DataError(f"{error} (--bad-rows skip leaves such records out)")
        errors.append(error)

    return invalid


def no_usable_record(files: str, left_out: Mapping[str, tuple[int, str]]) -> DataError:
    """The error of data of which every record is left out; `left_out` as `report_left_out` takes it."""
    reasons = ", ".join(f"{reason}: {number}" for reason, (number, _) in left_out.items())
    first = next((where for _, where in left_out.values()), "")
    fix = ": check --images, the folder of the pictures" if "picture cannot be read" in left_out else ""
    return DataError(f"{files} holds no usable record ({reasons}; the first: {first}){fix}")


def report_skipped(skipped: Sequence[str]) -> None:
    """Writes to stderr how many invalid records were left out, and the errors of the first `SHOWN`."""
    if skipped:
        tqdm.write(f"bad rows skipped: {len(skipped)}", file=sys.stderr)
        for line in skipped[:SHOWN]:
            tqdm.write(f"  {line}", file=sys.stderr)
        if len(skipped) > SHOWN:
            tqdm.write(f"  and {len(skipped) - SHOWN} more", file=sys.stderr)


def report_left_out(left_out: Mapping[str, tuple[int, str]]) -> None:
    """Writes to stderr how many valid records cannot be used, by reason: "3 records left out: no picture (the first: ...)".

    Args:
        left_out: reason -> number of records, and where the first one stands.
    """
    for reason, (number, first) in left_out.items():
        count = f"{number} record{'' if number == 1 else 's'}"
        tqdm.write(f"{count} left out: {reason} (the first: {first})", file=sys.stderr)


def report_failed(what: str, reason: str, errors: Sequence[str]) -> None:
    """Writes to stderr how many valid records or questions failed, and the first error."""
    if errors:
        count = f"{len(errors)} {what}{'' if len(errors) == 1 else 's'}"
        tqdm.write(f"{count} left out: {reason} (the first: {errors[0]})", file=sys.stderr)

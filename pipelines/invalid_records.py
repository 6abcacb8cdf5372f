"""Bad rows of a data file: fatal, or left out and told of."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mova_core.data import DataError, Sample, read_samples

BadRows = Literal["raise", "skip"]
SHOWN = 5  # of the rows left out


def read_rows(
    path: str | Path,
    images: str | Path | None = None,
    bad_rows: BadRows = "raise",
    check: Callable[[Sample], Any] | None = None,
) -> tuple[list[Sample], list[str]]:
    """Samples of a data file, and of each bad row that was left out what was wrong with it, which names file and line.

    Args:
        path, images: as `read_samples` takes them.
        bad_rows: whether the first bad row ends it, or all are left out.
        check: raises DataError for a sample that is sound but of no use to the caller.

    Raises:
        DataError: a bad row where `bad_rows` says so, or no good one.
    """
    errors: list[DataError] = []
    samples = []
    for sample in read_samples(path, images, bad_rows, errors):
        try:
            if check is not None:
                check(sample)
            samples.append(sample)
        except DataError as error:
            if bad_rows == "raise":
                raise
            errors.append(error)
    if not samples:
        raise DataError(f"{path} holds no usable record, the first error: {errors[0]}")
    return samples, [str(error) for error in errors]


def report_skipped(skipped: Sequence[str]) -> None:
    """Says on stderr, beside the progress bars, how many bad rows were left out, and what was wrong with the first."""
    if skipped:
        tqdm.write(f"bad rows skipped: {len(skipped)}", file=sys.stderr)
        for line in skipped[:SHOWN]:
            tqdm.write(f"  {line}", file=sys.stderr)
        if len(skipped) > SHOWN:
            tqdm.write(f"  and {len(skipped) - SHOWN} more", file=sys.stderr)

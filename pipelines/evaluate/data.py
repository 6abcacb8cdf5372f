"""What evaluation reads, checked before torch and Ray start (neither is imported here)."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mova_core.data import Sample
from mova_core.io.uris import absolute
from mova_core.metrics import normalise
from pipelines.data_args import DataArgs
from pipelines.invalid_records import read_valid_samples
from pipelines.read_data import ReadData, read_data

# Fields that a record may have (docs/data_format.md). KIND groups the table: "chart", "photo", ...; FORM names the template
# of the question, within which the baseline looks for the most frequent training answer.
KIND, FORM = "kind", "form"


@dataclass(kw_only=True)
class TestData(ReadData):
    """`ReadData`, and the baseline's answers: form of question -> most frequent training answer; None without training data."""

    __test__ = False  # pytest collects no class of this name

    guesses: dict[str, str] | None = None


def check_data(args: DataArgs, train: str | None = None) -> TestData:
    """Reads test and training data and refuses what cannot be evaluated; starts neither torch nor Ray by itself.

    Raises:
        DataError, StoreError: as `evaluate`.
    """
    data, _ = read_data(args)
    guesses = None
    if train is not None:
        training, skipped = read_valid_samples(absolute(train), bad_rows=args.bad_rows, pool=data.pool)
        guesses = most_frequent(training)
        data.skipped += skipped
    return TestData(**vars(data), guesses=guesses)


def most_frequent(samples: Sequence[Sample]) -> dict[str, str]:
    """Form of question -> its most frequent answer."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        counts[sample.extra.get(FORM, "")][normalise(sample.answer)] += 1
    return {form: answers.most_common(1)[0][0] for form, answers in counts.items()}

"""What evaluation reads, checked before torch and Ray start (neither is imported here)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mova_core.data import Sample, Turn
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


@dataclass(frozen=True, kw_only=True)
class TestQuestion:
    """One user turn of a test record that an answer follows; it is asked with the turns before it as history.

    Attributes:
        turn: number of the question within its record, from 1.
    """

    __test__ = False

    sample: Sample
    turn: int
    history: tuple[Turn, ...]
    text: str
    truth: str

    @property
    def kind(self) -> str:
        """Group of the question in the table of accuracies."""
        return text_of(self.sample, KIND, "all")

    @property
    def form(self) -> str:
        """Template of the question, for the baseline."""
        return text_of(self.sample, FORM, "")


def questions_of(samples: Iterable[Sample]) -> list[TestQuestion]:
    """The questions of conversations, in their order."""
    return [
        TestQuestion(sample=sample, turn=turn, history=history, text=text, truth=truth)
        for sample in samples
        for turn, (history, text, truth) in enumerate(sample.exchanges, 1)
    ]


def text_of(sample: Sample, name: str, default: str) -> str:
    """A field of a record as text; the default where the record has none, or null."""
    value = sample.extra.get(name)
    return default if value is None else str(value)


def check_data(args: DataArgs, train: str | None = None) -> TestData:
    """Reads test and training data and refuses what cannot be evaluated; starts neither torch nor Ray by itself.

    Raises:
        DataError, StoreError: as `evaluate`.
    """
    data, _ = read_data(args)
    data.leave_out("several pictures", lambda sample: len(sample.images) > 1)
    data.require_samples(args.data)
    guesses = None
    if train is not None:
        training, skipped = read_valid_samples(absolute(train), bad_rows=args.bad_rows, pool=data.pool)
        guesses = most_frequent(training)
        data.skipped += skipped
    return TestData(**vars(data), guesses=guesses)


def most_frequent(samples: Sequence[Sample]) -> dict[str, str]:
    """Form of question -> its most frequent answer."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions_of(samples):
        counts[question.form][normalise(question.truth)] += 1
    return {form: answers.most_common(1)[0][0] for form, answers in counts.items()}

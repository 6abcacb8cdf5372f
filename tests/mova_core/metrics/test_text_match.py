import pytest

from mova_core.metrics import exact_match, normalise


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("Left.", "left", True),
        ("the  top left", "Top left", True),
        ("a cat", "cat", True),
        ("A", "a", True),
        ("", "A", False),
        ("", "+", False),
        ("5", "-5", False),
        ("-5.", "-5", True),
        ("-5 m", "5 m", False),
        ("12", "1", False),
        ("", "", True),
    ],
)
def test_exact_match(answer, truth, same):
    assert exact_match(answer, truth) == float(same)


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("The  top\nLeft!", "top left"),
        ("a cat and an owl.", "cat and owl"),
        ("-5.", "-5"),
        ("-12 m", "-12 m"),
        ("- yes", "yes"),
        ("A", "a"),
        ("+", "+"),
        ("another", "another"),
    ],
)
def test_normalised_answer(answer, plain):
    assert normalise(answer) == plain

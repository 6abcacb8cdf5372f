import pytest

from mova_core.metrics import exact_match


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
        ("12", "1", False),
        ("", "", True),
    ],
)
def test_exact_match(answer, truth, same):
    assert exact_match(answer, truth) == float(same)

"""How an answer is judged against the truth, per benchmark's own rule."""

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(answer: str) -> str:
    """Lower case, no punctuation at the ends, no articles, single spaces (after the VQA evaluation's rules)."""
    answer = _ARTICLES.sub(" ", answer.lower().strip().strip(string.punctuation))
    return " ".join(answer.split())


def exact_match(answer: str, truth: str) -> float:
    """1.0 when both say the same after `normalise`, else 0.0."""
    return float(normalise(answer) == normalise(truth))

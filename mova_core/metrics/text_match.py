"""How an answer is judged against the truth, per benchmark's own rule."""

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(answer: str) -> str:
    """Lower case, no punctuation at the ends, no articles, single spaces (after the VQA evaluation's rules).

    What would leave nothing stays as it is ("A" is a letter, "+" a sign), and so does the sign of a number.
    """
    plain = " ".join(answer.lower().split())
    bare = plain.strip(string.punctuation)
    if plain.startswith("-") and bare[:1].isdigit():
        bare = "-" + bare
    return " ".join(_ARTICLES.sub(" ", bare).split()) or bare or plain


def exact_match(answer: str, truth: str) -> float:
    """1.0 when both say the same after `normalise`, else 0.0."""
    return float(normalise(answer) == normalise(truth))

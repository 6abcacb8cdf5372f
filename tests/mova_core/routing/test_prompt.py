import random

import pytest

from mova_core.routing import (
    build_routing_prompt,
    build_routing_reply,
    label_experts,
    parse_routing,
    read_reply,
)


def letters(mask):
    return "".join(letter for letter, chosen in zip("ABCDEFG", mask, strict=True) if chosen)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A, C", "AC"),
        ("a, c", "AC"),
        ("F.", "F"),
        ("The answer is D", "D"),
        ("Both A and B.", "AB"),
        ("D. This model shows", "D"),
        ("A,B,C,D", "ABC"),
        ("G; F; E; A", "EFG"),
        ("A\nB", "AB"),
        ("none", ""),
        ("None of these", ""),
        ("NONE", ""),
        ("C, none", "C"),
        ("Because", ""),
        ("BIOMEDICAL", ""),
        ("a chart, a dog", ""),
        ("H", ""),
        ("", ""),
    ],
)
def test_reply_counts_whole_letters_only(reply, expected):
    assert letters(parse_routing(reply)) == expected


def test_reply_tells_none_from_nonsense():
    assert read_reply("none") == []
    assert read_reply("I cannot say") is None
    assert read_reply("") is None
    assert read_reply("D, A") == [3, 0], "the order in which the router named them is kept"


def test_prompt_of_another_pool():
    prompt = build_routing_prompt("q?", ["sees cats", "reads maps"])
    assert "\nA. sees cats\nB. reads maps\n\nQuestion:\nq?" in prompt
    with pytest.raises(ValueError, match="1 to 26"):
        build_routing_prompt("q?", [])


def test_reply_and_parser_are_inverse():
    rng = random.Random(0)
    for _ in range(50):
        mask = [False] * 7
        for index in rng.sample(range(7), rng.randint(0, 3)):
            mask[index] = True
        assert parse_routing(build_routing_reply(mask)) == mask


def test_label_is_the_papers_criterion():
    losses = {"dinov2": 0.9, "vary": 1.0, "codetr": 0.2, "sam": 0.5, "deplot": 0.7}
    assert label_experts(1.0, losses) == ["codetr", "sam", "deplot"], "below the loss without, lowest first, at most 3"
    assert label_experts(0.1, losses) == []

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
    assert read_reply("None of these") == read_reply("The answer is none") == []
    assert read_reply("the answer is d") == [3], "lower case counts among connecting words"
    assert read_reply("H") is None and read_reply("H", num_experts=8) == [7], "a pool has seven experts by default"
    assert read_reply("A, B, C", max_experts=2) == [0, 1]


def test_what_the_pool_lacks_takes_no_place_among_the_chosen():
    assert letters(parse_routing("H, A, B, C")) == "ABC"
    assert parse_routing("C, B", num_experts=3, max_experts=1) == [False, False, True]


def test_prompt_of_another_pool():
    prompt = build_routing_prompt("q?", ["sees cats", "reads maps"])
    assert "\nA. sees cats\nB. reads maps\n\nQuestion:\nq?" in prompt
    assert "\nModel pool:\nA. sees cats\n\nQuestion:\nq?" in build_routing_prompt("q?", ["sees cats"])
    assert "\nZ. sees cats\n\nQuestion:" in build_routing_prompt("q?", ["sees cats"] * 26)
    for count in (0, 27):
        with pytest.raises(ValueError, match=f"1 to 26 experts, got {count}"):
            build_routing_prompt("q?", ["sees cats"] * count)


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
    close = {"dinov2": 1.0, "vary": 1.0001, "codetr": 1.05, "sam": 0.9999}
    assert label_experts(1.0, close) == ["sam"], "an expert that changes nothing or costs a little is no help"
    assert label_experts(1.0, losses, max_experts=1) == ["codetr"]

import random

from mova_core.experts import EXPERTS, expert_card
from mova_core.routing import (
    LETTERS,
    REWRITTEN,
    build_routing_prompt,
    parse_routing,
    pool_descriptions,
    routing_turns,
    shuffle_pool,
)

POOL = [{"name": name, "description": expert_card(name).description} for name in EXPERTS]


def test_routing_samples_tell_the_labelled_experts_in_any_pool():
    """Whatever chance makes of the pool, the letters of the reply stand for the labelled experts."""
    words = {name: [expert_card(name).description, *REWRITTEN[name]] for name in EXPERTS}
    assert set(REWRITTEN) == set(EXPERTS) and all(len(set(said)) == 3 for said in words.values())
    whose = {text: name for name, said in words.items() for text in said}
    sizes, seen, orders = set(), set(), set()
    for seed in range(300):
        rng = random.Random(seed)
        routing = rng.sample(EXPERTS, rng.randint(0, 3))
        (_, prompt), (_, reply) = routing_turns("Which way?", routing, POOL, rng, REWRITTEN)
        pool = prompt.split("Model pool:\n")[1].split("\n\nQuestion:\n")[0].split("\n")
        assert [line[:3] for line in pool] == [f"{letter}. " for letter in LETTERS[: len(pool)]]
        names = [whose[line[3:]] for line in pool]
        mask = parse_routing(reply, len(pool))
        assert {name for name, chosen in zip(names, mask, strict=True) if chosen} == set(routing)
        assert prompt.endswith("Which way?") and (reply == "none") == (not routing)
        sizes.add(len(pool))
        orders.add(tuple(names))
        seen |= {line[3:] for line in pool}
    assert sizes == set(range(2, 8)) and seen == set(whose) and len(orders) > 250
    plain = routing_turns("Which way?", ["vary"], POOL)
    assert plain == (("user", build_routing_prompt("Which way?")), ("assistant", "B"))


def test_an_expert_without_other_words_keeps_its_card():
    _, (_, reply) = routing_turns("Which way?", ["sam"], POOL, random.Random(0), {"vary": ("Reads.",)})
    assert len(reply) == 1


def test_shuffled_pool_keeps_the_labelled_experts():
    cards = pool_descriptions()
    mask = [name in (2, 5) for name in range(7)]
    wanted = {cards[2], cards[5]}
    orders = set()
    for seed in range(20):
        shuffled, new_mask = shuffle_pool(cards, mask, random.Random(seed), keep=4)
        assert len(shuffled) == 4
        assert {card for card, chosen in zip(shuffled, new_mask, strict=True) if chosen} == wanted
        orders.add(tuple(shuffled))
    assert len(orders) > 10

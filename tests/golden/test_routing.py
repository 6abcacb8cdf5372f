"""Golden case 9: the published routing prompt and reply parser."""

from mova_core.routing import build_routing_prompt, parse_routing


def test_prompt_is_the_published_one(golden):
    _, facts = golden("prepare_inputs")
    assert build_routing_prompt("Q?") == facts["prompt_strings"]["routing_prompt"] + "Q?"


def test_published_parser_on_every_reply(golden):
    _, facts = golden("prepare_inputs")
    table = facts["get_routing_weights"]["table"]
    assert len(table) == 33
    for reply, weights in table.items():
        assert parse_routing(reply, compat="published") == [bool(weight) for weight in weights], reply

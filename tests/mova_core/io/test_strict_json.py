import json

from mova_core.io.strict_json import dumps


def test_no_number_that_json_does_not_have_is_written():
    value = {"loss": float("nan"), "rows": [(1, float("inf")), {"x": -float("inf")}], "n": 2.5, "s": "NaN", "t": {1}}

    def refuse(name):
        raise AssertionError(name)

    read = json.loads(dumps(value, indent=1), parse_constant=refuse)
    assert read == {"loss": None, "rows": [[1, None], {"x": None}], "n": 2.5, "s": "NaN", "t": "{1}"}

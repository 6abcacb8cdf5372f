"""Records whose answers leave no token to learn are refused before any worker starts, with the line, the reason and the fix."""

import json
import re
from typing import Any

import pytest

from mova_core.data import DataError
from pipelines.train.answers import check_answers
from pipelines.train.config import TrainConfig
from pipelines.train.data import check_data
from tests.pipelines.train.test_loop import places  # noqa: F401  # a fixture


def checked(places: dict[str, str], **settings: Any) -> None:  # noqa: F811
    check_answers(
        check_data(TrainConfig(output="out", batch_size=2, workers=1, **{"stage": "sft", **places, **settings}))
    )


def test_answers_that_teach_something_pass(places):  # noqa: F811
    checked(places)
    checked(places, routing_samples=2)
    checked(places, stage="router")


def test_a_template_without_answers_is_refused(places, tmp_path):  # noqa: F811
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% endif %}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    config = tmp_path / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    message = r"7 of 7 probed records have no answer token to learn (the first: {}, record 1, line 1): the tokenizer's chat template"
    with pytest.raises(DataError, match=re.escape(message.format(places["data"]))):
        checked(places)


def test_answers_beyond_the_length_are_refused_where_they_are_many(places, tmp_path):  # noqa: F811
    with pytest.raises(DataError, match=r"record 1, line 1\): --max-length 50 cuts off its whole answer"):
        checked(places, max_length=50)
    with pytest.raises(DataError, match=r"max_length 3 cuts the picture's 36 tokens"):
        checked(places, max_length=3)
    with open(places["data"]) as file:
        records = [json.loads(line) for line in file][:1] * 200
    for number, wrong in ((2, False), (3, True)):  # 1 % is borne
        talks = [{"from": "human", "value": "word " * 900}, {"from": "gpt", "value": "A"}]
        data = [record | ({"conversations": talks} if at < number else {}) for at, record in enumerate(records)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
        if wrong:
            with pytest.raises(DataError, match=r"3 of 200 probed records"):
                checked(places, max_length=400)
        else:
            checked(places, max_length=400)

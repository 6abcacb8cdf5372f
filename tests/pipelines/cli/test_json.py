"""docs/json.md names the keys that the commands print."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mova_core.answering import Answer
from mova_core.features import FeatureStore
from pipelines.cli.main import app
from tests.mova_core.features.test_store import KEYS, describe, fill

PAGE = (Path(__file__).parents[3] / "docs" / "json.md").read_text()


def documented(command: str) -> dict[str, bool]:
    """Path of a key -> whether the command must print it."""
    [section] = re.findall(rf"## `mova {command}`\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)
    return {path: "*optional*" not in meaning for path, meaning in re.findall(r"^\| `(.+?)` \| (.*)$", section, re.M)}


def paths(value: Any, above: str = "") -> set[str]:
    """Paths of all keys of a document."""
    if isinstance(value, dict):
        return {path for key, part in value.items() for path in paths(part, f"{above}.{key}".lstrip("."))}
    if isinstance(value, list) and value:
        return {path for part in value for path in paths(part, f"{above}[]")}
    return {above}


def pattern(path: str) -> str:
    return re.sub(r"\b[A-Z]+\b", r"[\\w-]+", re.escape(path))


def mova(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = FeatureStore(tmp_path_factory.mktemp("json") / "store", create=True)
    fill(store.add_expert(describe()), KEYS)
    return store.location


@pytest.mark.parametrize(
    "name", ["experts", "store ls", "store stat", "store verify", "store gc", "store diff", "store export"]
)
def test_commands_print_what_the_page_says(name, store, tmp_path):
    further = {"store diff": [store], "store export": [tmp_path / "other"], "experts": ["--size", "mini"]}.get(name, [])
    printed = paths(mova(*name.split(), *([store] if name != "experts" else []), *further))
    for path, required in documented(name).items():
        assert not required or any(re.fullmatch(pattern(path), key) for key in printed) or path == "damaged[]", path
    if name in ("experts", "store gc", "store diff", "store export"):  # the page lists all that these print
        known = [pattern(path) for path in documented(name)]
        assert all(any(re.fullmatch(path, key) for path in known) for key in printed), printed


def test_the_keys_of_results_are_on_the_page():
    from pipelines.label import LabelSummary

    assert documented("label").keys() == {field.name for field in fields(LabelSummary)}
    roots = {re.split(r"[.\[]", path)[0] for path in documented("ask")}
    assert roots == {field.name for field in fields(Answer)}

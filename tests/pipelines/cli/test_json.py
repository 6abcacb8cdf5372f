"""docs/json.md has every key that a command prints, with its type, and no other. Tests that run a command call `check` too."""

import json
import re
from dataclasses import asdict
from typing import Any

import pytest
from typer.testing import CliRunner

from mova_core.answering import Answer
from mova_core.experts.cost import read_profiles
from mova_core.features import FeatureStore
from pipelines.cli.main import app
from pipelines.precompute.progress import ExpertLog, Sample
from pipelines.precompute.run import Summary
from pipelines.train.config import STAGES
from tests.mova_core.features.test_store import KEYS, describe, fill
from tests.pipelines.cli.json_page import PAGE, check, documented
from tests.pipelines.cli.test_help import COMMANDS


def mova(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stderr == "", "neither bars nor warnings"
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = FeatureStore(tmp_path_factory.mktemp("json") / "store", create=True)
    described = describe() | {"arch": {"width": 12}, "preprocessing": "clip/fixed"}  # as `VisionExpert.describe`
    fill(store.add_expert(described), KEYS)
    return store.location


def test_every_command_has_its_table():
    """A stage of training has that of `mova train`; `mova precompute run` that of `mova precompute`."""
    commands = {" ".join(path) for path, command in COMMANDS.items() if not hasattr(command, "commands")}
    named = {re.sub(rf"^(train|precompute) ({'|'.join(STAGES)}|run)$", r"\1", name) for name in commands}
    assert named | {"precompute --dry-run"} == set(re.findall(r"^## `mova (.+)`$", PAGE, re.M))
    assert all(documented(name) for name in named)
    for table in re.split(r"^##+ ", PAGE, flags=re.M):
        keys = re.findall(r"^\| `(.+?)` \|", table, re.M)
        assert len(set(keys)) == len(keys), f"a key stands twice below {table.splitlines()[0]}"


@pytest.mark.parametrize(
    "name", ["experts", "store ls", "store stat", "store verify", "store gc", "store diff", "store export"]
)
def test_commands_print_what_the_page_says(name, store, tmp_path):
    further = {"store diff": [store], "store export": [tmp_path / "other"], "experts": ["--size", "mini"]}.get(name, [])
    check(name, mova(*name.split(), *([store] if name != "experts" else []), *further))


def test_the_summary_and_the_status_of_a_run():
    log = ExpertLog(total=4, samples=[Sample(0.0, 0, 0), Sample(1.0, 4, 1)], pools=["sam=1"])
    summary = Summary(job="j", computed={"sam": 4}, reused={"sam": 0}, experts={"sam": log.summary()})
    summary.quarantined, summary.events = [{"path": "a.png", "reason": "torn"}], [[0.1, "begins"]]
    check("precompute", summary.to_dict() | {"skipped": ["data.json, line 2: no `conversations`"]})
    check("precompute status", [{"job": "j", "store": "/s", "seconds": 1.0, "experts": {"sam": log.status()}}])
    check("precompute resize", {"sam": ["sam=2..4"]})


def test_an_answer():
    answer = Answer(
        text="red",
        experts=["sam"],
        over_budget={"vary": 2.0},
        router="G",
        gates=[{"sam": 1.0}],
        seconds={"base encoder": 0.1},
    )
    check("ask", asdict(answer))


def test_the_profile_of_the_page_can_be_read(tmp_path):
    [text] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "hand.json").write_text(text)
    [profile] = read_profiles(tmp_path / "hand.json")
    assert (profile.device, profile.threads, profile.best().batch) == ("T4", 1, 8)
    check("profile", [json.loads(json.dumps(asdict(profile)))])


@pytest.mark.parametrize(
    "document, message",
    [
        ({"files": 1}, "prints no bytes"),
        ({"files": 1, "bytes": 2, "more": 3}, "lacks mova store gc: more"),
        ({"files": 1.5, "bytes": 2}, "files is 1.5"),
        ({"files": True, "bytes": 2}, "files is True"),
        ({"files": None, "bytes": 2}, "files is None"),
    ],
)
def test_the_comparison_notices_a_difference(document, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        check("store gc", document)

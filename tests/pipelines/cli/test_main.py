"""The `mova` command: what its help shows, what experts cost, bad rows."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import typer
from rich.text import Text
from typer.testing import CliRunner

from mova_core.config import MoVAConfig
from mova_core.data import DataError
from mova_core.experts import EXPERTS, expert_card
from mova_core.experts.cost import Measured, Profile, count_flops, device_kind, shapes_of, write_profiles
from pipelines.cli.ask import _costs
from pipelines.cli.main import app
from pipelines.invalid_records import read_rows, report_skipped
from pipelines.precompute.listing import find_images


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_shows_every_word(path):
    """Rich reads [words] in a help text as markup and shows nothing of them."""
    told = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "400", "TERM": "dumb"})
    assert told.exit_code == 0
    shown = " ".join("".join(letter for letter in told.output if letter not in "│╭╮╰╯─").split())
    for words in (getattr(parameter, "help", None) for parameter in COMMANDS[path].params):
        assert Text.from_markup(words or "").plain == (words or "")
        assert " ".join((words or "").split()) in shown


def config(size: str = "mini", **fields) -> MoVAConfig:
    pool = [{"name": name, "description": "", "channels": 8} for name in EXPERTS]
    return MoVAConfig(pool=pool, expert_size=size, **fields)


def test_a_budget_is_in_gflops_or_in_what_was_measured_or_given(tmp_path):
    flops = {name: count_flops(shapes_of(name, "mini")) for name in EXPERTS}
    assert {name: round(1e9 * cost) for name, cost in _costs([], None, config()).items()} == flops
    assert _costs([f"{name}=2.5" for name in EXPERTS], None, config()) == dict.fromkeys(EXPERTS, 2.5)
    with pytest.raises(typer.BadParameter, match=r"no cost of dinov2, vary.*give a --cost for each"):
        _costs(["sam=1"], None, config())
    with pytest.raises(typer.BadParameter, match="sam=fast: write NAME=NUMBER"):
        _costs(["sam=fast"], None, config())

    here, speeds = device_kind(torch.device("cpu")), {name: 10.0 * n for n, name in enumerate(EXPERTS, 1)}
    profiles = [
        Profile(
            expert=name,
            arch=expert_card(name).mini,
            dtype="float32",
            device=device,
            threads=1,
            batches=(
                Measured(batch=1, images_per_second=speed, peak_bytes=None),
                Measured(batch=2, images_per_second=9 * speed, peak_bytes=None),
            ),
        )
        for name, speed in speeds.items()
        for device in (here, "another")
        if (name, device) != ("sam", here)
    ]
    path = tmp_path / "profile.json"
    write_profiles(path, profiles)
    with pytest.raises(typer.BadParameter, match=r"no cost of sam; .* run `mova profile` here"):
        _costs([], path, config())
    write_profiles(path, [Profile(**{**vars(profiles[0]), "expert": "sam", "arch": expert_card("sam").mini})])
    costs = _costs([], path, config())
    assert costs == {name: pytest.approx(1000 / speeds[name]) for name in EXPERTS} | {"sam": pytest.approx(100)}
    with pytest.raises(typer.BadParameter, match="no cost of dinov2"):
        _costs([], path, config("full"))
    with pytest.raises(typer.BadParameter, match="give one of them"):
        _costs(["sam=1"], path, config())


def test_bad_rows_end_it_or_are_left_out_and_told(tmp_path, capsys):
    def record(image: str | list[str]) -> str:
        said = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]
        return json.dumps({"image": image, "conversations": said})

    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([record("a.png"), "{image}", record(["b.png", "c.png"]), *["[]"] * 6, record("d.png")]))
    with pytest.raises(DataError, match="line 2"):
        find_images(path)
    assert capsys.readouterr().err == ""
    skipped: list[str] = []
    found = find_images(path, None, "skip", skipped)["image"].to_pylist()
    assert found == [str(tmp_path / f"{name}.png") for name in "abcd"]
    assert len(skipped) == 7 and f"{path}, line 2: broken JSON" in skipped[0]
    told = capsys.readouterr().err.splitlines()
    assert told == ["bad rows skipped: 7", *(f"  {line}" for line in skipped[:5]), "  and 2 more"]

    samples, left_out = read_rows(path, None, "skip", check=lambda sample: sample.image)
    assert [sample.where for sample in samples] == [f"{path}, line 1", f"{path}, line 10"]
    assert len(left_out) == 8 and any("line 3: it has 2 pictures" in line for line in left_out)
    path.write_text(record(["b.png", "c.png"]))
    for how in ("raise", "skip"):
        with pytest.raises(DataError, match="line 1: it has 2 pictures"):
            read_rows(path, None, how, check=lambda sample: sample.image)
    assert len(read_rows(path)[0]) == 1
    report_skipped([])
    assert capsys.readouterr().err == ""

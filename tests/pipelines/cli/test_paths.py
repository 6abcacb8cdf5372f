"""Paths of the command line: a URL is used or refused while options are parsed, and no output replaces what it must not."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import fsspec
import pytest
import typer
from typer.testing import CliRunner

from mova_core.checkpoint.output import write_folder
from mova_core.features import FeatureStore
from pipelines.cli.main import app
from pipelines.cli.options import weights_location
from pipelines.cli.paths import (
    check_demo_folder,
    check_output_file,
    check_output_folder,
    hub_id_or_folder,
    model_folder,
    output_path,
)
from pipelines.data_args import DataArgs
from pipelines.evaluate.data import check_data as check_evaluation
from pipelines.read_data import check_label_data
from pipelines.train.config import TrainConfig
from pipelines.train.data import check_data as check_training
from tests.pipelines.cli.test_help import COMMANDS

URL = "s3://bucket/some/thing.json"
TEXTS = {  # options whose value is text, and never a path
    "accelerator", "chat_format", "column", "cost", "experts", "fingerprints", "forbid", "force", "imports", "job", "name",
    "names", "pool", "questions", "router", "wanted", "codec", "weights", "freeze", "log", "profile_steps", "recipe", "checkpoint_every",
}  # fmt: skip


def path_options() -> list[Any]:
    """Parser of every option and argument that may hold a path."""
    found = []
    for path, command in COMMANDS.items():
        for parameter in () if hasattr(command, "commands") else command.params:
            described = parameter.type_descriptor
            texts = parameter.name in TEXTS or (path[-1], parameter.name) == ("resize", "pools")
            kinds = (described.annotation, *get_args(described.annotation))  # list[str]: list of paths
            if not texts and (str in kinds or Path in kinds):
                name = f"{' '.join(path)} {parameter.name}"
                found.append(pytest.param(described.parameter_info.parser, id=name))
    return found


@pytest.mark.parametrize("parser", path_options())
def test_a_url_is_used_as_it_stands_or_refused_at_once(parser):
    """`pathlib` once made the local folder `s3:/bucket` of a URL."""
    assert parser is not None, "an option without a parser takes a URL for a path: see pipelines.cli.paths"
    try:
        assert parser(URL) == URL
    except typer.BadParameter as error:
        assert f"{URL} is a URL" in error.message


def test_options_of_paths_are_found():
    names = {str(case.id).split()[-1] for case in path_options()}
    assert names >= {"data", "images", "store", "model", "output", "source", "target", "answers", "summary", "also"}


def model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mova", "pool": [{"name": "sam"}]}))
    return folder


def test_training_labelling_and_evaluation_read_urls(tmp_path):
    """Data, pictures and store of the three commands at URLs, as far as they are read before Ray starts."""
    FeatureStore("memory://paths/store", create=True)
    record = {
        "image": "a.png",
        "routing": [],
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    }
    fsspec.filesystem("memory").pipe_file("memory://paths/data.json", json.dumps([record]).encode())
    fsspec.filesystem("memory").pipe_file("memory://paths/pictures/a.png", b"a")
    shared: dict[str, Any] = {
        "model": str(model(tmp_path / "model")),
        "data": "memory://paths/data.json",
        "store": "memory://paths/store",
        "images": "memory://paths/pictures",
    }
    config = TrainConfig(stage="router", output=str(tmp_path / "out"), **shared, batch_size=1, workers=1)
    args = DataArgs(**shared)
    for read in (check_training(config), check_label_data(args, str(tmp_path / "l.json")), check_evaluation(args)):
        [sample] = read.samples
        assert sample.image is not None and sample.image.path == "memory://paths/pictures/a.png"


@pytest.mark.parametrize(
    "text, message",
    [
        ("./nowhere", "no file or folder"),
        (URL, "is a URL"),
        ("a/b/c", "a/b/c is no hub id"),
        ("sam.safetensors", "no file or folder /"),
    ],
)
def test_weights_are_a_path_that_exists_or_a_hub_id(text, message):
    with pytest.raises(typer.BadParameter, match=re.escape(message)):
        hub_id_or_folder(text)
    assert hub_id_or_folder("owner/name-7b.v1") == "owner/name-7b.v1" and hub_id_or_folder("gpt2") == "gpt2"
    with pytest.raises(ValueError, match=r"no file or folder gpt2 in .* owner/name"):
        weights_location("gpt2")


def test_a_model_is_a_local_folder_that_holds_one(tmp_path):
    assert model_folder(str(model(tmp_path / "model"))) == tmp_path / "model"
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    for name, message in {
        "file": "is a file",
        "nowhere": "no folder",
        ".": r"is no MoVA model \(no config.json\): make one with `mova init`",
        "other": "a model of type 'llama'",
    }.items():
        with pytest.raises(typer.BadParameter, match=message):
            model_folder(str(tmp_path / name))


def test_an_output_folder_is_replaced_only_if_it_is_a_model_and_the_user_says_so(tmp_path):
    def refused(folder: Path, overwrite: bool, *inputs: object) -> str:
        with pytest.raises(typer.BadParameter) as error:
            check_output_folder("--output", folder, overwrite, inputs)
        assert str(folder) in error.value.message
        return error.value.message

    old, notes, file = model(tmp_path / "old"), tmp_path / "notes", tmp_path / "file"
    notes.mkdir()
    check_output_folder("--output", notes, False)  # empty
    check_output_folder("--output", tmp_path / "new" / "deep", False)
    (notes / "thesis.tex").write_text("years of work")
    file.write_text("")
    assert "--overwrite" in refused(old, False)
    check_output_folder("--output", old, True, ["s3://bucket/data.json", None, tmp_path / "data.json"])
    assert "which would be deleted" in refused(old, True, old)
    assert "which would be deleted" in refused(old, True, f"file://{old}/data.json")
    assert "thesis.tex" in refused(notes, True)
    assert "is a file" in refused(file, True)
    assert "is a file, not a folder" in refused(file / "below", True)


def test_an_output_file_is_replaced_only_if_the_user_says_so(tmp_path):
    file = tmp_path / "made" / "out.json"
    check_output_file("--output", None, False)
    check_output_file("--output", file, False)
    file.write_text("labels")
    with pytest.raises(typer.BadParameter, match="exists: name another file, or replace this one with --overwrite"):
        check_output_file("--output", file, False)
    check_output_file("--output", file, True)
    check_output_file("--summary", file, False, lambda path: path.read_text() == "labels")
    with pytest.raises(typer.BadParameter, match="is a folder: name a file"):
        check_output_file("--output", tmp_path, True)


def test_the_demo_writes_into_no_folder_of_other_things(tmp_path):
    check_demo_folder(tmp_path / "new")
    check_demo_folder(tmp_path)
    (tmp_path / "thesis.tex").write_text("years of work")
    for folder in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(typer.BadParameter, match="missing or empty, or one of an earlier demo"):
            check_demo_folder(folder)
    (tmp_path / "data").mkdir()
    check_demo_folder(tmp_path)


WRITERS = {
    "init --llm LLM --size mini --output": "folder",
    "train sft --model MODEL --data d.json --store s --output": "folder",
    "convert MODEL": "folder",
    "label --model MODEL --data d.json --store s --output": "file",
    "evaluate --model MODEL --data d.json --store s --answers": "file",
    "plan --profile FILE --output": "file",
    "precompute SOURCE --store s --summary": "file",
    "precompute SOURCE --store s --picture": "file",
}


@pytest.mark.parametrize("line", WRITERS)
def test_every_command_that_writes_asks_before_it_replaces(line, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.session.ray_session", lambda *_, **__: pytest.fail("Ray was started"))
    existing = tmp_path / "standing.png"
    if WRITERS[line] == "folder":
        model(existing)
    else:
        existing.write_text("{}")
    words = {
        "MODEL": str(model(tmp_path / "model")),
        "LLM": str(tmp_path / "model"),
        "FILE": str(tmp_path / "standing.png"),
    }
    result = CliRunner().invoke(app, [*(words.get(word, word) for word in line.split()), str(existing)])
    assert result.exit_code == 2 and "--overwrite" in result.output, (result.output, result.exception)


def test_every_option_that_writes_has_been_tried():
    """A new output option belongs into `WRITERS`, unless it only ever adds (`profile`) or resumes (`demo`)."""
    parsers = {
        (path, parameter.name)
        for path, command in COMMANDS.items()
        for parameter in command.params
        if parameter.name not in TEXTS and parameter.type_descriptor.parameter_info.parser is output_path
    }
    tried = {line.split()[0] for line in WRITERS} | {"profile", "demo"}
    assert {path[0] for path, _ in parsers} == tried


def test_a_converted_folder_is_replaced_when_the_new_one_is_complete(tmp_path):
    target = model(tmp_path / "target")
    settings: dict[str, Any] = {"dry_run": False, "progress": lambda _: None, "begin": lambda _: None}

    def finish(folder: Path) -> None:
        folder.mkdir()
        (folder / "new").write_text("")

    with pytest.raises(FileExistsError, match="is there already"):
        write_folder(tmp_path, target, {}, {}, {}, finish, overwrite=False, **settings)
    assert (target / "config.json").exists()
    write_folder(tmp_path, target, {}, {}, {}, finish, overwrite=True, **settings)
    assert sorted(path.name for path in target.iterdir()) == ["conversion.json", "new"]

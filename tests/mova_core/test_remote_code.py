"""No code of a model, tokenizer or processor folder runs, whatever its configuration files name, and nobody is asked to run it."""

import builtins
import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mova_core.checkpoint.config import read_llm_tokenizer, read_text_encoder
from mova_core.checkpoint.names import PublishedParts
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from mova_core.start_model import build_start_model

CLASSES = ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor")
PLANTED = {name: "planted.Planted" for name in CLASSES} | {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}
LOADERS: dict[str, Callable[[Any], Any]] = {
    "model": MoVAForConditionalGeneration.from_pretrained,
    "processor": MoVAProcessor.from_pretrained,
    "LLM tokenizer": lambda folder: read_llm_tokenizer(Path(folder)),
    "text encoder": lambda folder: read_text_encoder(str(folder), PublishedParts()),
    "start model": lambda folder: build_start_model(str(folder), str(folder), size="mini"),
}


@pytest.fixture
def planted(mini_folder, tmp_path, monkeypatch):
    """A saved model whose every configuration file names a class of its own folder; `ran` appears if that class is imported."""
    folder = tmp_path / "planted"
    shutil.copytree(mini_folder, folder)
    ran = tmp_path / "ran"
    asked: list[str] = []
    files = [path for path in folder.rglob("*.json") if "config" in path.name]
    assert {path.name for path in files} >= {"config.json", "tokenizer_config.json", "processor_config.json"}
    for path in files:
        fields = json.loads(path.read_text()) | {"auto_map": PLANTED}
        if "text_config" in fields:
            fields["text_config"]["auto_map"] = PLANTED
        path.write_text(json.dumps(fields))
        (path.parent / "planted.py").write_text(f"open({str(ran)!r}, 'w')\nclass Planted:\n    pass\n")

    def agree(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", agree)
    yield folder
    assert not ran.exists(), "code of the folder was run"
    assert not asked, "the user was asked to run code of the folder"


@pytest.mark.parametrize("unknown", [False, True], ids=["known classes", "unknown classes"])
@pytest.mark.parametrize("loader", LOADERS)
def test_planted_code_is_neither_run_nor_offered(planted, loader, unknown):
    if unknown:  # a class that only the planted code defines: refused, not fetched
        for path in planted.rglob("*config.json"):
            fields = json.loads(path.read_text())
            changed = {key: "Planted" for key in ("tokenizer_class", "processor_class") if key in fields}
            changed |= {"model_type": "planted"} if "model_type" in fields else {}
            path.write_text(json.dumps(fields | changed))
    with contextlib.suppress(Exception):  # it may be refused; the fixture looks at what ran
        LOADERS[loader](planted)

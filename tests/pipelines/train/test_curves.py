"""Curves of trainings: in numbers, in a picture, and while a training goes on."""

import json
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.train.metrics import MetricsFile
from tests.pipelines.cli.json_page import check


def write(folder, steps: int, shift: float = 0.0) -> None:
    log = MetricsFile(folder, 0)
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step, "loss": 6 / step + shift, "grad_norm": 1.0 / step, "lr": 1e-3, "tokens": 100, "seconds": 0.5,
            "data_wait": 0.05, "mfu": None,
        }  # fmt: skip
        if step % 4 == 0:
            line["eval_loss"] = 7 / step
        if step == 3:
            line |= {"loss": None, "grad_norm": None, "skipped": True, "suspects": ["data.json, record 1"]}
        log.write(line)


def mova(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["train", "curves", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_two_trainings_of_which_one_goes_on(tmp_path):
    write(tmp_path / "done", 240)
    write(tmp_path / "going.ray" / "sft-0123", 9, shift=1e-4)
    picture = tmp_path / "curves.png"
    document = json.loads(mova(tmp_path / "done", tmp_path / "going", "--picture", picture, "--json").stdout)
    check("train curves", document)
    done, going = document
    assert (done["steps"], going["steps"]) == (240, 9) and done["difference"] is None and done["skipped_steps"] == 1
    assert going["difference"] == pytest.approx(1e-4) and done["tokens_per_second"] == pytest.approx(200)
    assert done["eval_loss"] == 7 / 240 and going["eval_loss"] == 7 / 8
    with Image.open(picture) as drawn:
        assert drawn.size == (1200, 1080) and drawn.info["Software"] == "mova train"
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 20) or ()}
    assert {(255, 127, 14), (255, 0, 0)} <= colours, "the second training's curve, and a skipped step"
    assert "1.0e-04" in mova(tmp_path / "done", tmp_path / "going").stdout
    (tmp_path / "other.png").write_bytes(b"of someone else")
    assert "exists" in mova(tmp_path / "done", "--picture", tmp_path / "other.png", code=2).stderr
    assert "give the --output of a training" in mova(tmp_path / "nothing", code=2).stderr


def test_curves_need_neither_torch_nor_ray():
    script = (
        "import sys, pipelines.train.curves, pipelines.train.metrics; "
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

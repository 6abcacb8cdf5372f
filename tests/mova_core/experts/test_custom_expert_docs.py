"""The Python snippets of docs/custom_expert.md, run as printed but for the paths and the size."""

import re
import sys
from pathlib import Path

import pytest
import torch

from mova_core import start_model
from mova_core.experts import EXPERTS
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor

SNIPPETS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs" / "custom_expert.md").read_text(), flags=re.DOTALL
)


@pytest.fixture
def siglip(own_registry, tmp_path, monkeypatch):
    """The folder with siglip_expert.py in it, which is the working folder."""
    (tmp_path / "siglip_expert.py").write_text(SNIPPETS[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("siglip_expert", None)


def test_a_start_model_with_the_expert(siglip, monkeypatch):
    built: dict[str, object] = {}
    saved: list[str] = []

    class Part:
        def save_pretrained(self, folder):
            saved.append(folder)

    def build(llm, pool):
        built["pool"] = pool
        return Part(), Part()

    monkeypatch.setattr(start_model, "build_start_model", build)
    exec(SNIPPETS[1], {})
    assert built == {"pool": (*EXPERTS, "siglip")} and saved == ["start/", "start/"]


def test_a_trained_model_grows(siglip, mini_folder, processor, pictures):
    (siglip / "mova").symlink_to(mini_folder)
    exec(SNIPPETS[2], {})
    old, grown = (MoVAForConditionalGeneration.from_pretrained(name).eval() for name in ("mova/", "grown/"))
    assert grown.config.experts == (*EXPERTS, "siglip") and grown.config.pool[-1]["channels"] == 64
    MoVAProcessor.from_pretrained("grown/").check_fits(grown)
    batch = processor([[("user", "what is in the picture?")]], [pictures[0]])
    with torch.no_grad():
        assert torch.equal(grown(**batch).logits, old(**batch).logits)

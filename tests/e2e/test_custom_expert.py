"""The expert of docs/custom_expert.md, as it stands there: imported by name, through precompute and the adapter."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import ray
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from actors.expert_pool import ExpertDeploymentConfig, ExpertPool
from mova_core.adapter import AdapterConfig, MoVAdapter
from mova_core.experts import BASE, EXPERTS, WeightsError, expert_card, expert_class, load_expert, registry
from mova_core.experts.base import Features
from mova_core.features import FeatureStore
from mova_core.images import ImageRef
from pipelines.cli.main import app
from pipelines.cli.options import import_modules

ROOT = Path(__file__).parents[2]
BERT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the document's file and some pictures; the file is imported here, too."""
    place = tmp_path_factory.mktemp("custom")
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "custom_expert.md").read_text(), re.S)
    assert code is not None and len(code[1].splitlines()) < 40
    (place / "siglip_expert.py").write_text(code[1])
    (place / "pictures").mkdir()
    rng = np.random.default_rng(5)
    for index in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(place / "pictures" / f"{index}.png")
    sys.path.append(str(place))
    importlib.import_module("siglip_expert")
    yield place
    sys.path.remove(str(place))


def mova(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user in that folder gives it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli.main", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "test_resnet"])
def test_any_backbone_of_timm(place, model):
    inside: Any = timm.create_model(model)
    last, side = inside.feature_info[-1], inside.default_cfg["input_size"][1]
    arch = {"model": model, "image_size": side, "patch_size": last["reduction"], "channels": last["num_chs"]}
    save_file(
        {name: tensor.contiguous() for name, tensor in inside.state_dict().items()}, place / f"{model}.safetensors"
    )
    expert = load_expert("siglip", weights=place / f"{model}.safetensors", size="mini", arch=arch)
    batch = expert.preprocess([place / "pictures" / "0.png", place / "pictures" / "1.png"])
    tokens, grid = expert(batch)
    assert grid == expert.grid and tokens.shape == (2, grid[0] * grid[1], expert.channels)
    with torch.no_grad():  # what timm itself makes of the same pixels and weights
        wanted = inside.eval().forward_features(batch["pixel_values"])
    maps = wanted.ndim == 4
    wanted = wanted.flatten(2).transpose(1, 2) if maps else wanted[:, inside.num_prefix_tokens :]
    torch.testing.assert_close(tokens, wanted, atol=1e-5, rtol=1e-5)


def test_full_size_needs_weights(place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match=r"timm/vit_base_patch16_siglip_512\.webli"):
        load_expert("siglip")


def test_a_module_that_is_not_there(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "lacking.py").write_text("import siglip_exper")
    with pytest.raises(typer.BadParameter, match=r"--import siglip_exper: no such module in .*custom"):
        import_modules(["siglip_exper"])
    with pytest.raises(ModuleNotFoundError, match="No module named 'siglip_exper'"):
        import_modules(["lacking"])


@pytest.mark.ray
def test_through_precompute_and_the_adapter(ray_cluster, place):
    """The actors of the run are told which module to import; a pool grown by the expert answers as before, then uses it."""
    command = "precompute pictures --store store --size mini --json --experts siglip --import siglip_expert"
    done = mova(place, *command.split(), RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["computed"] == {"siglip": 6}

    store = FeatureStore(place / "store")
    images = [ImageRef(path=str(path)) for path in sorted((place / "pictures").iterdir())]
    stored = store.fetch(images, [["siglip"]] * 6)
    expert, old = load_expert("siglip", size="mini"), load_expert("biomedclip", size="mini")
    for image, row in zip(images, stored, strict=True):
        torch.testing.assert_close(
            row["siglip"].tokens, expert(expert.preprocess([image])).tokens[0], atol=1e-5, rtol=0
        )

    torch.manual_seed(0)
    config = AdapterConfig(
        expert_channels={"biomedclip": 64}, out_width=16, width=32, grid=8, heads=2, text_encoder=BERT, text_width=32
    )
    adapter = MoVAdapter(config).eval()
    base, text = torch.randn(6, 64, 32), torch.randn(6, 32)
    stack = {"biomedclip": old(old.preprocess(images))}
    before = adapter(base, stack, torch.ones(6, 1, dtype=torch.bool), text)
    stack["siglip"] = Features(torch.stack([row["siglip"].tokens for row in stored]), expert.grid)
    adapter.add_expert("siglip", expert_card("siglip").mini["channels"])
    routing = torch.tensor([[True, True]] * 3 + [[True, False]] * 3)
    torch.testing.assert_close(adapter(base, stack, routing, text), before, atol=1e-6, rtol=0)

    wanted = torch.randn_like(before)
    optimizer = torch.optim.Adam(adapter.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (adapter(base, stack, routing, text) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapter.eval()
    other = {**stack, "siglip": stack["siglip"]._replace(tokens=stack["siglip"].tokens.flip(0))}
    changed = (adapter(base, stack, routing, text) - adapter(base, other, routing, text)).abs().amax((1, 2))
    assert (changed[:3] > 1e-4).all() and (changed[3:] < 1e-6).all(), "it counts where it is routed to, and only there"


@pytest.mark.ray
def test_a_class_of_the_running_script_cannot_be_sent(ray_cluster, place, monkeypatch):
    monkeypatch.setattr(type(load_expert("siglip", size="mini")), "__module__", "__main__")
    pool = ExpertPool({"siglip": ExpertDeploymentConfig(server={"size": "mini"})})
    with pytest.raises(ValueError, match="expert 'siglip' is defined in the script or notebook that runs"):
        pool.fetch([ImageRef(data=b"")], [["siglip"]])


def test_the_expert_is_listed_with_its_weights(place, tmp_path, monkeypatch):
    """Weights are found where the hub's client keeps them, and nowhere is asked."""
    for repository, weights in (
        ("timm/vit_base_patch16_siglip_512.webli", "model.safetensors"),
        ("facebook/sam-vit-huge", "config.json"),
    ):
        folder = tmp_path / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / weights).write_text("")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(snapshot.name)
    command = "experts --json --size mini --import siglip_expert"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    known = {name: expert_class(name) for name in (BASE, *EXPERTS, "siglip")}  # without those of other tests
    monkeypatch.setattr(registry, "_REGISTRY", known)
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["expert"] for row in rows] == [BASE, *EXPERTS, "siglip"]
    assert [row["expert"] for row in rows if row["weights_here"]] == ["siglip"], "of sam there are no weights"
    row = rows[-1]
    assert (row["title"], row["input"], row["grid"], row["channels"]) == ("SigLIP ViT-B/16", 160, [10, 10], 64)
    assert row["bytes"] == 2 * 100 * 64 and row["flops"] > 1e7

"""Conversion as a user meets it: the command, .bin shards, chosen experts, memory, and everything that can be wrong."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from mova_core.checkpoint import convert, convert_back, from_published, to_published
from mova_core.experts import BASE, EXPERTS, WeightsError, expert_card, load_expert
from mova_core.model import ROUTING_LORA, MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.cli.main import app
from tests.pipelines.cli.json_page import check

SHARDS = 3


@pytest.fixture(scope="module")
def published(mini_folder, tmp_path_factory):
    """The mini model in the published form, as .bin shards."""
    folder = tmp_path_factory.mktemp("published") / "mova"
    folder.mkdir()
    model = MoVAForConditionalGeneration.from_pretrained(mini_folder)
    parts = {"language_model": model.language_model.state_dict(), "adapter": model.adapter.state_dict()}
    parts[BASE] = model.base_encoder.state_dict()
    parts |= {name: load_expert(name, size="mini").state_dict() for name in EXPERTS}
    archs = {name: dict(expert_card(name).mini) for name in (BASE, *EXPERTS)}
    state = to_published(parts, archs)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].bfloat16()  # dtypes may be mixed
    names = sorted(state)
    index: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"pytorch_model-{shard + 1:05}-of-{SHARDS:05}.bin"
        torch.save({name: state[name].clone() for name in names[shard::SHARDS]}, folder / file)
        index |= dict.fromkeys(names[shard::SHARDS], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    adapter = model.config.adapter
    config = model.config.text_config.to_dict() | {
        "model_type": "mova_llama",
        "mm_hidden_size": adapter["width"],
        "image_feat_size": adapter["grid"],
        "expert_channels": [channels for _, channels in adapter["expert_channels"]],
        "num_projector_layers": adapter["blocks"],
        "topk_experts": adapter["topk"],
        "num_routing_tokens": model.config.routing_tokens,
        "mm_projector_text_encoder": str(mini_folder.parent / "bert-that-is-not-there"),
        "expert_archs": archs,
    }
    (folder / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(mini_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(processor, tmp_path_factory):
    """The text encoder's tokenizer, without a config."""
    folder = tmp_path_factory.mktemp("bert")
    processor.text_tokenizer.save_pretrained(folder)
    return str(folder)


def invoke(*arguments):
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code or "-q" not in arguments or result.stderr == "", "neither bars nor warnings"
    return result


def test_bin_shards_there_and_back(published, bert, mini, tmp_path):
    report = json.loads(invoke(published, tmp_path / "ours", "--text-encoder", bert, "--json", "-q").stdout)
    check("convert", report)
    source = {name: tensor for file in published.glob("*.bin") for name, tensor in torch.load(file).items()}
    assert {row["published"] for row in report["tensors"]} == set(source)
    assert sum(row["parameters"] for row in report["parts"].values()) == sum(it.numel() for it in source.values())
    ours = MoVAForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
    assert ours.keys() == mini.state_dict().keys()
    bits = mini.state_dict()["language_model.model.embed_tokens.weight"].bfloat16()
    assert all(
        torch.equal(ours[name], bits.float() if name.endswith("embed_tokens.weight") else tensor)
        for name, tensor in mini.state_dict().items()
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(processor, MoVAProcessor) and processor.chat_format == "vicuna_v1"
    (tmp_path / "ours" / ROUTING_LORA).mkdir()
    shown = invoke(tmp_path / "ours", tmp_path / "back", "--to-published", "-q").stdout
    assert "language_model" in shown and "conversion.json" in shown and f"no place for it: {ROUTING_LORA}" in shown
    back = {name: it for file in (tmp_path / "back").glob("*.safetensors") for name, it in load_file(file).items()}
    assert back.keys() == source.keys()
    assert all(back[name].dtype == it.dtype and torch.equal(back[name], it) for name, it in source.items())


def test_only_chosen_experts_are_kept(published, bert, tmp_path):
    report = convert(published, tmp_path / "ours", experts="sam, dinov2", text_encoder=bert)
    assert {folder.name for folder in (tmp_path / "ours" / "experts").iterdir()} == {"sam", "dinov2"}
    left_out = [row["part"] for row in report["tensors"] if row.get("note") == "left out with its expert"]
    assert set(left_out) == set(EXPERTS) - {"sam", "dinov2"}
    served = load_expert("sam", weights=tmp_path / "ours" / "experts" / "sam", arch=expert_card("sam").mini)
    assert served.describe() == load_expert("sam", size="mini").describe()
    with pytest.raises(WeightsError, match=r"no experts/vary, experts/codetr, .*copy them there"):
        convert_back(tmp_path / "ours", tmp_path / "back")
    invoke(published, tmp_path / "none", "--experts", "drop", "--text-encoder", bert, "-q")
    assert not (tmp_path / "none" / "experts").exists()
    assert invoke(published, tmp_path / "no", "--experts", "sam,eagle").exit_code == 2


def test_dry_run_checks_and_writes_nothing(published, bert, tmp_path):
    report = json.loads(invoke(published, tmp_path / "a", "--text-encoder", bert, "--dry-run", "--json").stdout)
    check("convert", report)
    assert not any(tmp_path.iterdir())
    assert all(row["file"] for row in report["tensors"]) and report["bytes"] > 1e6


def test_a_target_that_is_there_is_refused(published, bert, tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        convert(published, tmp_path, text_encoder=bert)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_bad_input_is_named(published, bert, tmp_path):
    with pytest.raises(WeightsError, match=r"bert-that-is-not-there cannot be read .*--text-encoder"):
        convert(published, tmp_path / "a")
    with pytest.raises(WeightsError, match=r"config.json cannot be read"):
        convert(tmp_path, tmp_path / "a", text_encoder=bert)
    with pytest.raises(WeightsError, match=r"vision_tower_8.x: there is no such tower"):
        from_published({"model.vision_tower.vision_tower_8.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="no part 'eagle'"):
        to_published({"eagle": {}})
    folder = tmp_path / "broken"
    shutil.copytree(published, folder)
    shard = folder / f"pytorch_model-00002-of-{SHARDS:05}.bin"
    torch.save({"model.norm.weight": {"nested": torch.zeros(1)}}, shard)
    with pytest.raises(WeightsError, match=r"00002-of-00003.bin: holds more than a state dict"):
        convert(folder, tmp_path / "a", text_encoder=bert)
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(WeightsError, match=r"00002-of-00003.bin: torn"):
        convert(folder, tmp_path / "a", text_encoder=bert)
    shard.unlink()
    with pytest.raises(WeightsError, match=r"shards that are not there: pytorch_model-00002-of-00003.bin"):
        convert(folder, tmp_path / "a", text_encoder=bert)
    assert not (tmp_path / "a").exists()


def test_a_torn_safetensors_file_is_named(published, bert, tmp_path):
    convert(published, tmp_path / "ours", text_encoder=bert)
    file = tmp_path / "ours" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"model.safetensors: torn"):
        convert_back(tmp_path / "ours", tmp_path / "back")


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A quarter of a gigabyte in tensors of 16 MB passes through a process that grows by little more than one of them.

    One process, because its imports take 4 CPU-seconds, copies both formats.
    """
    tensors = {f"t{index}": torch.full((1 << 22,), float(index)) for index in range(16)}
    for suffix, save in (("safetensors", save_file), ("bin", torch.save)):
        (tmp_path / suffix).mkdir()
        save(tensors, tmp_path / suffix / f"model.{suffix}")
    code = f"""
from pathlib import Path
from mova_core.checkpoint import stored_tensors, write_tensors

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

for folder in (Path({str(tmp_path)!r}) / suffix for suffix in ("safetensors", "bin")):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = kilobytes("VmRSS")
    write_tensors(folder / "copy" / "model.safetensors", stored_tensors(folder), lambda _: None)
    print((kilobytes("VmHWM") - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown = [float(line) for line in run.stdout.split()]
    assert len(grown) == 2 and max(grown) < 96, "MB"
    for suffix in ("safetensors", "bin"):
        copied = load_file(tmp_path / suffix / "copy" / "model.safetensors")
        assert all(torch.equal(copied[name], tensor) for name, tensor in tensors.items())


def test_a_model_that_never_was_published_cannot_go_back(mini_folder, tmp_path):
    with pytest.raises(WeightsError, match="only a model that `mova convert` made from a published one can go back"):
        convert_back(mini_folder, tmp_path / "back")


def test_parts_are_a_mapping():
    parts = from_published({"lm_head.weight": torch.zeros(2, 3), "model.mm_projector.pos_embed": torch.zeros(1, 4, 5)})
    assert set(parts) == {"language_model", "adapter"} and "adapter" in parts and len(parts) == 2
    assert {name: set(state) for name, state in parts.items()} == {
        "language_model": {"lm_head.weight"},
        "adapter": {"pos_embed"},
    }
    del parts["adapter"]
    assert set(to_published(parts)) == {"lm_head.weight"} == set(to_published(dict(parts)))

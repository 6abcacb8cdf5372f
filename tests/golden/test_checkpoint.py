"""Golden cases 9 and 11: a published checkpoint becomes ours, answers as the published code does, and goes back to the bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mova_core.assemble import stack_features
from mova_core.checkpoint import convert, convert_back, from_published, stored_tensors, to_published
from mova_core.experts import BASE, EXPERTS, WeightsError, expert_class, load_expert
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from mova_core.routing import build_routing_prompt, parse_routing

ADAPTER, TOWER, TEXT = "model.mm_projector.", "model.vision_tower.", "model.mm_projector.text_encoder."
SHARDS = 3


def archs_of(config):
    """What the shapes of the tiny towers do not tell."""
    heads = {
        name: {"heads": config[name]["num_attention_heads"]} for name in ("clip", "dinov2", "pix2struct", "deplot")
    }
    windowed = config["codetr"]["window_block_indexes"]  # each of its rotary tables is stored only once here
    heads["codetr"] = {"global_blocks": sorted(set(range(config["codetr"]["depth"])) - set(windowed))}
    heads["biomedclip"] = {"heads": config["biomedclip"]["num_heads"]}
    for name in ("pix2struct", "deplot"):
        heads[name]["image_size"] = 7 * 16  # the golden pictures are 7 patches wide
    return heads


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """A folder in the published form: config, tokenizer, and sharded weights under the published names."""
    tower, tower_facts = golden("shared_tiny_tower")
    tensors, facts = golden("prepare_inputs")
    folder = tmp_path_factory.mktemp("published") / "mova-tiny"
    shutil.copytree(golden.dir / "shared_llama3_tokenizer", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    config = facts["config"] | {"model_type": "mova_llama", "architectures": ["MovaLlamaForCausalLM"]}
    config["mm_projector_text_encoder"] = str(golden.dir / "shared_text_encoder")
    (folder / "config.json").write_text(json.dumps(config | {"expert_archs": archs_of(tower_facts["config"])}))
    bert = load_file(golden.dir / "shared_text_encoder" / "model.safetensors")
    state = {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}
    state |= {TOWER + name.removeprefix("sd."): tensor for name, tensor in tower.items()}
    state |= {TEXT + name: tensor.float() for name, tensor in bert.items()}
    state["lm_head.weight"] = tensors["e2e.seed58.lm_head.weight"]  # the one that `two_stage` ran with
    state[f"{TEXT}cls.predictions.bias"] = torch.arange(7.0)  # what MoVA never reads comes back as well
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8.0)
    names: list[str] = sorted(state)
    index: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({name: state[name].contiguous() for name in names[shard::SHARDS]}, folder / file)
        index |= dict.fromkeys(names[shard::SHARDS], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours") / "mova"
    return folder, convert(published, folder, shard_gb=0.002)


def weights(folder):
    state: dict[str, torch.Tensor] = {}
    for file in {stored.file for stored in stored_tensors(folder).values()}:
        state |= load_file(file)
    return state


def test_there_and_back_to_the_bit(published, converted, tmp_path):
    folder, report = converted
    state = weights(published)
    told = {row["published"]: row for row in report["tensors"]}
    assert {name for name, row in told.items() if row["file"]} == set(state)
    assert all("rope.freqs" in name for name in told.keys() - state.keys())
    rest = [name for name, row in told.items() if row.get("note") and row["file"]]
    assert sorted(rest) == ["model.layers.0.self_attn.rotary_emb.inv_freq", f"{TEXT}cls.predictions.bias"]
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert json.loads((folder / "conversion.json").read_text()) == report
    convert_back(folder, tmp_path / "back")
    back = weights(tmp_path / "back")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (published / file).read_bytes()


def test_state_dict_there_and_back(published):
    state = weights(published)
    parts = from_published(state, json.loads((published / "config.json").read_text())["expert_archs"])
    assert set(parts) == {"language_model", "adapter", BASE, *EXPERTS}
    for name in (BASE, *EXPERTS):
        load_expert(name, weights=parts[name], arch=parts.archs[name])  # strict
    back = to_published(parts)
    assert back.keys() == state.keys() and all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_answers_as_the_published_code(golden, converted):
    """Two stages on three questions: routing letters, then the answer, every token and the first logits."""
    folder, _ = converted
    tensors, facts = golden("prepare_inputs")
    model = MoVAForConditionalGeneration.from_pretrained(folder).eval()
    processor = MoVAProcessor.from_pretrained(folder)
    archs = {name: json.loads((folder / "experts" / name / "config.json").read_text())["arch"] for name in EXPERTS}
    experts = {name: load_expert(name, weights=folder / "experts" / name, arch=archs[name]) for name in EXPERTS}
    calls = iter(facts["two_stage"]["runs"]["seed58"]["calls"])
    for number, question in enumerate(facts["two_stage"]["questions"]):
        pixels, high = tensors[f"e2e.q{number}.images"], tensors[f"e2e.q{number}.high"]
        patches = tensors[f"e2e.q{number}.flattened"]
        routing = torch.zeros(1, len(EXPERTS), dtype=torch.bool)
        for stage, coarse in enumerate((True, False)):
            call = next(calls)
            prompt = build_routing_prompt(question["text"]) if coarse else question["text"]
            batch = processor([[("user", prompt)]], [b"not looked at"], routing=coarse, pixels=False)
            ids = batch["input_ids"][0].tolist()
            shown = [at for at, token in enumerate(ids) if token == processor.image_token_id]
            ids[shown[0] : shown[-1] + 1] = [-200]
            assert ids == call["input_ids"], "prompt"
            features = {}
            for name, routed in zip(EXPERTS, routing[0].tolist(), strict=True):
                if routed:
                    source = {"dinov2": pixels[:, 3:], "biomedclip": pixels[:, :3]}.get(name, high)
                    key = "flattened_patches" if name in ("pix2struct", "deplot") else "pixel_values"
                    made = experts[name]({key: patches if key == "flattened_patches" else source})
                    features[name] = made._replace(tokens=made.tokens[0])
            inputs = dict(
                batch,
                pixel_values=pixels[:, :3],
                **processor.gate_text([question["text"]]),
                experts=stack_features([features], EXPERTS, model.device, model.dtype),
                routing=routing,
                coarse=coarse,
            )
            with torch.inference_mode():
                logits = model(**inputs).logits[0, -1]
                said = model.generate(
                    **inputs,
                    max_new_tokens=call["max_new_tokens"],
                    do_sample=False,
                    eos_token_id=processor.tokenizer.eos_token_id,
                    pad_token_id=processor.tokenizer.pad_token_id,
                )[0]
            first = tensors[f"e2e.seed58.call{2 * number + stage}.first_step_logits"]
            torch.testing.assert_close(logits, first, atol=5e-5, rtol=0)
            assert said.tolist() == call["output_ids"][1:]
            reply = processor.tokenizer.decode(said, skip_special_tokens=True)
            routing = torch.tensor([parse_routing(reply, compat="published")])


def test_every_published_name_at_full_size(golden):
    """All 3762 names one to one, with the shapes of our modules, on the meta device."""
    _, facts = golden("state_dict_names")
    state = {name: torch.empty(about["shape"], device="meta") for name, about in facts["names"].items()}
    assert len(state) == facts["n_entries"] == 3762
    parts = from_published(state)
    assert set(parts.rest) == {f"{TOWER}vision_tower_6.head.proj.weight"}
    back = to_published(parts)
    assert {name: tensor.shape for name, tensor in back.items()} == {name: it.shape for name, it in state.items()}
    for name in (BASE, *EXPERTS):
        full = expert_class(name).card.full
        assert {key: parts.archs[name][key] for key in full} == dict(full)
        with torch.device("meta"):
            module = expert_class(name)(parts.archs[name])
        assert {key: it.shape for key, it in module.state_dict().items()} == {
            k: t.shape for k, t in parts[name].items()
        }


def damaged(published, folder, **files):
    shutil.copytree(published, folder)
    return folder


def test_a_missing_shard_is_named(published, tmp_path):
    folder = damaged(published, tmp_path / "a")
    (folder / f"model-00002-of-{SHARDS:05}.safetensors").unlink()
    with pytest.raises(WeightsError, match="model-00002-of-00003"):
        convert(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        f"{ADAPTER}blocks.0.gate.2.bias",
        f"{TOWER}vision_tower_0.vision_model.embeddings.class_embedding",
        f"{TOWER}vision_tower_3.patch_embed.proj.weight",
        f"{TOWER}vision_tower_6.trunk.pos_embed",
    ],
)
def test_a_renamed_tensor_is_named(published, tmp_path, name):
    folder = damaged(published, tmp_path / "a")
    shard = next(stored.file for stored in stored_tensors(folder).values() if stored.name == name)
    state = load_file(shard)
    state[f"{name}_old"] = state.pop(name)
    save_file(state, shard)
    with pytest.raises(WeightsError) as error:
        convert(folder, tmp_path / "b")
    assert f"1 missing: {name}; 1 unexpected: {name}_old" in str(error.value)


def test_a_misshapen_tensor_is_named(published, tmp_path):
    folder = damaged(published, tmp_path / "a")
    shard = stored_tensors(folder)["lm_head.weight"].file
    state = load_file(shard)
    save_file(state | {"lm_head.weight": torch.zeros(2, 64)}, shard)
    with pytest.raises(WeightsError, match=r"1 of another shape: lm_head.weight \(2, 64\) instead of \(405, 64\)"):
        convert(folder, tmp_path / "b")

"""Loading from several threads, and folders of weights as training code and damaged downloads leave them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mova_core.experts import WeightsError, load_expert
from mova_core.experts.weights import read_weights


def test_threads_load_experts_at_the_same_time():
    """With accelerate's `init_empty_weights` 12 of 20 loads from two threads failed: "Cannot copy out of meta tensor"."""
    names = ("codetr", "dinov2", "biomedclip") * 6  # one with buffers, one whose names depend on the library
    expected = {name: load_expert(name, size="mini").state_dict() for name in names[:3]}
    with ThreadPoolExecutor(8) as threads:
        loading = threads.map(lambda name: load_expert(name, size="mini"), names)
        others = [nn.Linear(2, 2) for _ in range(2000)]  # meanwhile, on this thread
        loaded = list(loading)
    assert not any(parameter.is_meta for network in others for parameter in network.parameters())
    for name, expert in zip(names, loaded, strict=True):
        state = expert.state_dict()
        assert state.keys() == expected[name].keys()
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in state.items())
        assert not any(buffer.is_meta for buffer in expert.buffers())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_files_of_a_training_run_are_no_weights(tmp_path, suffix):
    """`training_args.bin` is a pickle of code's objects; the weights beside it are the only candidate."""
    weights = {"a": torch.ones(2)}
    if suffix == ".bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "model.safetensors")
    names = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
    for name in (*names, "rng_state_0.pth", "random_states_0.pth", "optimizer_1.bin", "optimizer.safetensors"):
        (tmp_path / name).write_bytes(b"not read")
    assert read_weights(tmp_path)["a"].tolist() == [1, 1]
    (tmp_path / f"other{suffix}").write_bytes(b"a second candidate")
    with pytest.raises(WeightsError, match=f"more than one weights file .*other{suffix}"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"a": "model.safetensors", "b": 5}}',
        b'{"weight_map": {"a": null}}',
        b'{"weight_map": {"a": ["model.safetensors"]}}',
        b'{"weight_map": {"a": ""}}',
        b'{"weight_map": {"a": "model.json"}}',
        b'{"weight_map": {}}',
        b'{"weight_map": 5}',
        b'{"metadata": {}}',
        b"[]",
        b"5",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_wrong_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json: torn") as caught:
        load_expert("vary", weights=tmp_path, size="mini")
    assert "\n" not in str(caught.value)


def test_an_index_leads_out_of_no_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    save_file({"a": torch.ones(1)}, tmp_path.parent / "outside.safetensors")
    with pytest.raises(WeightsError, match=r"shards that are not there: outside\.safetensors"):
        read_weights(tmp_path)

"""Headers built here are read by the safetensors library, and headers of the library are parsed here."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mova_core.io.safetensors_header import MAX_HEADER_BYTES, TensorSpec, build_header, parse_header, read_header


def header_of(content):
    return read_header(lambda offset, size: content[offset : offset + size])


def test_the_library_reads_a_file_that_was_streamed(tmp_path):
    tensors = {
        "weight": torch.randn(3, 5).bfloat16(),
        "bias": torch.randn(4),
        "scalar": torch.tensor(7, dtype=torch.int8),
    }
    words = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8"}
    specs = {name: TensorSpec(words[tensor.dtype], tensor.shape, tensor.nbytes) for name, tensor in tensors.items()}
    path = tmp_path / "streamed.safetensors"
    for alignment in (8, 4096):
        header = build_header(specs, {"format": "pt"}, alignment)
        path.write_bytes(header + b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values()))
        assert len(header) % alignment == 0
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())
        parsed = header_of(path.read_bytes())
        assert parsed.size == len(header) and parsed.metadata == {"format": "pt"}
        assert list(parsed.tensors) == list(tensors)
        assert [entry.start for entry in parsed.tensors.values()] == [len(header), len(header) + 30, len(header) + 46]


def test_a_file_of_the_library_is_parsed(tmp_path):
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.randn(5, dtype=torch.float16)}
    path = tmp_path / "plain.safetensors"
    save_file(tensors, path)
    parsed, content = header_of(path.read_bytes()), path.read_bytes()
    assert parsed.metadata == {} and {name: entry.dtype for name, entry in parsed.tensors.items()} == {
        "a": "I64",
        "b": "F16",
    }
    for name, tensor in tensors.items():
        entry = parsed.tensors[name]
        assert entry.shape == tuple(tensor.shape)
        assert content[entry.start : entry.start + entry.size] == tensor.numpy().tobytes()


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[1]", b"7", b"{", b"\xff", b'{"a":1}', b'{"a":{"dtype":"F32"}}', b'{"a":{}}', b'{"__metadata__":3}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4]}}', b'{"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b'{"a":{"dtype":"F32","shape":["x"],"data_offsets":[0,4]}}',
    ],
)  # fmt: skip
def test_text_that_is_no_header_is_a_value_error(text):
    with pytest.raises(ValueError, match="header"):
        parse_header(text)


def test_a_header_that_is_cut_off_or_absurdly_long_is_a_value_error():
    whole = build_header({"a": ("U8", [3], 3)})
    assert json.loads(whole[8:])["a"]["data_offsets"] == [0, 3]
    for content in (b"", whole[:5], whole[:20], (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + whole):
        with pytest.raises(ValueError, match="header"):
            header_of(content)

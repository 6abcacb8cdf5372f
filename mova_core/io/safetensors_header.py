"""The header of a safetensors file: build it for tensors that are written piece by piece, and parse it back.

A safetensors file is: 8 bytes (length of the JSON text, little endian), the JSON text, then the tensors' bytes one
after another without holes (https://github.com/huggingface/safetensors#format). The library writes whole tensors that
are in memory; this module is for writers that stream, and for readers that want only to know where a tensor's bytes lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses a longer header, too
_LENGTH_BYTES = 8
_METADATA = "__metadata__"


class TensorSpec(NamedTuple):
    """A tensor to be written."""

    dtype: str  # in safetensors' spelling: "BF16", "F32", "U8", ...
    shape: Sequence[int]
    size: int  # bytes


class TensorEntry(NamedTuple):
    """A tensor in a file."""

    dtype: str  # in safetensors' spelling
    shape: tuple[int, ...]
    start: int  # of its bytes, counted from the beginning of the file
    size: int  # bytes


class SafetensorsHeader(NamedTuple):
    """A parsed header."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    size: int  # bytes, the length field included: the tensors' bytes begin here


def build_header(
    tensors: Mapping[str, TensorSpec | tuple[str, Sequence[int], int]],
    metadata: Mapping[str, str] | None = None,
    alignment: int = 8,
) -> bytes:
    """The first bytes of a file whose tensors follow in the order of the mapping, without holes.

    Args:
        tensors: name -> (dtype, shape, size in bytes).
        metadata: free text that travels with the file.
        alignment: the header is padded with spaces to a multiple of this many bytes, so that the first tensor lies there.
            A multiple of 8, as the format recommends.
    """
    header: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    begin = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % alignment)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(read: Callable[[int, int], Any]) -> SafetensorsHeader:
    """Reads and parses a file's header with two reads.

    Args:
        read: (offset, size) -> at most so many bytes of the file from there on, as a bytes-like object.

    Raises:
        ValueError: the bytes are no safetensors header. It is not checked that the file is as long as the header says.
    """
    length_field = bytes(read(0, _LENGTH_BYTES))
    length = int.from_bytes(length_field, "little")
    if len(length_field) < _LENGTH_BYTES or length > MAX_HEADER_BYTES:
        raise ValueError("no safetensors header: its length field is missing or absurd")
    text = bytes(read(_LENGTH_BYTES, length))
    if len(text) < length:
        raise ValueError("the safetensors header is cut off")
    return parse_header(text)


def parse_header(text: bytes) -> SafetensorsHeader:
    """Parses the JSON text of a header, its padding included.

    Raises:
        ValueError: the text is no safetensors header.
    """
    begin = _LENGTH_BYTES + len(text)
    try:
        entries = json.loads(text)
        metadata = dict(entries.pop(_METADATA, None) or {})
        tensors = {name: _entry(entry, begin) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no safetensors header: {error}") from None
    return SafetensorsHeader(tensors, metadata, begin)


def _entry(entry: Mapping[str, Any], begin: int) -> TensorEntry:
    """A tensor's entry, its offsets counted from the beginning of the file."""
    first, last = (int(offset) for offset in entry["data_offsets"])
    if not 0 <= first <= last:
        raise ValueError(f"data_offsets {first} to {last}")
    return TensorEntry(str(entry["dtype"]), tuple(int(side) for side in entry["shape"]), begin + first, last - first)

"""The bytes of a shard: a plain safetensors file whose features begin at page boundaries and whose header is checked too.

A shard's header follows from its receipt alone: the receipt's rows and the checksum of the receipt's file. So receipt
and header vouch for each other, and a lost receipt can be rebuilt from the header (all of it but the recorded loss).

Shapes: H x W the expert's native grid, N = H*W tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from mova_core.features.codec import CODECS, Codec, checksum
from mova_core.features.index import RECEIPT, binary_keys, parquet
from mova_core.io.safetensors_header import SafetensorsHeader, TensorSpec, build_header

if TYPE_CHECKING:
    from mova_core.experts import Features

# A page: a feature that begins at one can be mapped without its neighbours and read past the page cache (O_DIRECT).
PAGE = 4096


class EncodedFeature(NamedTuple):
    """One feature as it is stored."""

    row: Mapping[str, Any]  # its receipt row; "file", "offset" and "length" are set when a shard is laid out
    content: Any  # its bytes: uint8, 1-D


def padding(size: int) -> int:
    """Bytes from the end of `size` bytes that began at a page boundary to the next page boundary."""
    return -size % PAGE


def encode_features(expert: str, codec: Codec, features: Mapping[str, Features]) -> list[EncodedFeature]:
    """Casts features to the stored dtype.

    Args:
        expert: named in errors.
        codec: of the stored dtype.
        features: image key -> Features with tokens (H*W, C) of any float dtype on any device.

    Raises:
        ValueError: a key that is no sha256, tokens that do not fit their grid, or a value that the dtype cannot hold.
    """
    binary_keys(list(features))
    encoded = []
    for key, (tokens, grid) in features.items():
        if tokens.ndim != 2 or tokens.shape[0] != grid[0] * grid[1] or not tokens.numel():
            raise ValueError(f"{expert} feature of image {key}: {tuple(tokens.shape)} is no (H*W, C), grid {grid}")
        try:
            content, loss = codec.encode(tokens)
        except ValueError as error:
            raise ValueError(f"{expert} feature of image {key}: {error}") from None
        row = {
            "key": key.lower(),
            "grid": [int(side) for side in grid],
            "dtype": codec.dtype,
            "channels": tokens.shape[1],
            "xxh3": checksum(content),
            "loss": loss,
        }
        encoded.append(EncodedFeature(row, content))
    return encoded


def lay_out(
    expert: str, fingerprint: str, file: str, encoded: Sequence[EncodedFeature]
) -> tuple[pa.Buffer, Sequence[Any]]:
    """The receipt of a shard (a Parquet file), and the shard's bytes piece by piece.

    Args:
        expert, fingerprint: of the partition.
        file: name of the shard's file.
        encoded: its features, in file order.
    """
    rows = [{**feature.row, "file": file, "length": len(feature.content)} for feature in encoded]
    offset = len(shard_header(expert, fingerprint, rows, receipt_checksum=0))
    for row in rows:
        row["offset"] = offset
        offset += row["length"] + padding(row["length"])
    receipt = parquet(pa.Table.from_pylist(rows, schema=RECEIPT))
    pieces: list[Any] = [shard_header(expert, fingerprint, rows, checksum(receipt))]
    for feature in encoded:
        pieces += (feature.content, bytes(padding(len(feature.content))))
    return receipt, pieces


def shard_header(expert: str, fingerprint: str, rows: Sequence[Mapping[str, Any]], receipt_checksum: int) -> bytes:
    """A shard's first bytes, padded to a page.

    Args:
        expert, fingerprint: of the partition.
        rows: the receipt's rows, in file order.
        receipt_checksum: xxh3-64 of the receipt's file.
    """
    metadata = {"expert": expert, "fingerprint": fingerprint, "receipt": f"{receipt_checksum:016x}"}
    tensors: dict[str, TensorSpec | tuple[str, Sequence[int], int]] = {}
    for number, row in enumerate(rows):
        metadata[row["key"]] = f"{row['xxh3']:016x}"
        tensors.update(CODECS[row["dtype"]].tensors(row["key"], row["grid"], row["channels"]))
        if gap := padding(row["length"]):
            tensors[f"pad.{number}"] = ("U8", [gap], gap)  # safetensors allows no holes between tensors
    return build_header(tensors, metadata, alignment=PAGE)


def rows_from_header(file: str, header: SafetensorsHeader) -> list[dict[str, Any]]:
    """The receipt rows of a shard as its header has them; "loss" is None, because only the receipt records it.

    Raises:
        ValueError: the header is not that of a shard.
    """
    names = {codec.container: codec.dtype for codec in CODECS.values()}
    rows: list[dict[str, Any]] = []
    try:
        for key, mark in header.metadata.items():
            if len(key) != 64:  # not an image key: expert, fingerprint, receipt
                continue
            tokens = header.tensors[key]
            first = header.tensors.get(f"{key}.scale", tokens)
            height, width, channels = tokens.shape
            rows.append(
                {
                    "key": key,
                    "file": file,
                    "offset": first.start,
                    "length": tokens.start + tokens.size - first.start,
                    "grid": [height, width],
                    "dtype": names[tokens.dtype],
                    "channels": channels,
                    "xxh3": int(mark, 16),
                    "loss": None,
                }
            )
        binary_keys([row["key"] for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"shard {file} has a damaged header ({error})") from None
    return rows

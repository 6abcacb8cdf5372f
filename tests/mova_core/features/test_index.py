"""Keys as receipts and people write them, and as an index holds them."""

import hashlib

import pytest

from mova_core.features.index import binary_keys, hex_keys


@pytest.mark.parametrize("count", [0, 1, 3])
def test_hexadecimal_keys_become_binary_and_come_back(count):
    keys = [hashlib.sha256(bytes([number])).hexdigest() for number in range(count)]
    binary = binary_keys(keys)
    assert binary.tobytes() == b"".join(map(bytes.fromhex, keys)) and len(binary) == count
    assert hex_keys(binary) == keys and hex_keys(binary[1:]) == keys[1:]

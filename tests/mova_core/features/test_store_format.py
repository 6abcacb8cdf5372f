"""The format on disk does not change: a store written by commit b8fa632 is read, and the same features get the same bytes.

That commit's code wrote tests/mova_core/features/data/store_b8fa632, two partitions of three features each: two features,
a snapshot, then one more. docs/store_format.md describes the files; its snippet runs here.
"""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from mova_core.experts import Features
from mova_core.features import FeatureStore

OLD = Path(__file__).parent / "data" / "store_b8fa632"
DOCUMENT = Path(__file__).parents[3] / "docs" / "store_format.md"


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def feature(number):
    return Features(torch.arange(24).reshape(6, 4) * (0.25 if number % 2 else -0.5) + number, (2, 3))


@pytest.mark.parametrize("expert", ["clip-bfloat16", "clip-int8"])
def test_a_store_of_an_older_commit(tmp_path, expert):
    shutil.copytree(OLD, tmp_path / "store")
    store = FeatureStore(tmp_path / "store")
    assert list(store.verify()) == [] and store.quarantined()[0]["image"] == "a.png"
    partition = store.partition(expert)
    assert partition.snapshot() == 2
    for number, read in enumerate(partition.read([key(number) for number in range(3)])):
        assert read.grid == (2, 3)
        torch.testing.assert_close(read.tokens.float(), feature(number).tokens, rtol=0.01, atol=0.1)
    new = FeatureStore(tmp_path / "new", create=True).add_expert(partition.description)
    assert new.fingerprint == partition.fingerprint
    keys = [key(0), key(1)]
    [old_shard] = Path(partition.location, "shards").glob(f"{new.shard_id(keys)}-*")
    rows = new.write(new.shard_id(keys), {key(number): feature(number) for number in range(2)})
    content, old = (path.read_bytes() for path in (Path(new.location, "shards", rows[0]["file"]), old_shard))
    # The receipt names the shard's file, whose last part is random, so the headers differ in the receipt's checksum.
    mark = re.compile(rb'"receipt":"[0-9a-f]{16}"')
    assert mark.sub(b"", content) == mark.sub(b"", old)
    assert Path(new.location, "expert.json").read_bytes() == Path(partition.location, "expert.json").read_bytes()


def test_the_snippet_of_the_document_runs(tmp_path, monkeypatch):
    [snippet] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, DOCUMENT, "exec"), {"__name__": "__main__"})

"""Data, images and store at a URL or a path; what is refused before torch and Ray start; batches and their resumption."""

import itertools
import json
import pickle
import subprocess
import sys
from typing import Any

import fsspec
import pytest

from mova_core.data import DataError
from mova_core.experts import EXPERTS
from mova_core.features import FeatureStore, MissingFeatures
from pipelines.data_args import DataArgs
from pipelines.evaluate.data import check_data as check_test_data
from pipelines.read_data import check_label_data
from pipelines.train.config import TrainConfig
from pipelines.train.data import check_data, total_steps

POOL = [{"name": name, "description": name, "channels": 4} for name in EXPERTS]


def record(picture: Any = "a.png", answer: str = "A cat", **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **({} if picture is None else {"image": picture}), **fields}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mova", "pool": POOL}))
    return str(folder)


def place(root: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """A data file, two pictures and an empty store at a folder or URL; returns the arguments that name them."""
    for name in ("a.png", "b.png"):
        with fsspec.open(f"{root}/images/{name}", "wb", auto_mkdir=True) as file:
            file.write(name.encode())
    with fsspec.open(f"{root}/data.jsonl", "w") as file:
        file.write("\n".join(map(json.dumps, records)))
    FeatureStore(f"{root}/store", create=True)
    return {"data": f"{root}/data.jsonl", "images": f"{root}/images", "store": f"{root}/store"}


@pytest.mark.parametrize("kind", ["path", "file", "memory"])
def test_data_images_and_store_may_stand_at_a_url(tmp_path, model, kind):
    root = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[kind]
    places = place(root, [record(), record("b.png", routing=[]), record(None), record("a.png", answer="")])
    args = DataArgs(model=model, **places)
    # `file://` becomes a path; no URL is taken for a relative path.
    plain = root.removeprefix("file://")
    assert (args.data, args.images, args.store) == tuple(f"{plain}/{n}" for n in ("data.jsonl", "images", "store"))
    labelled = check_label_data(args, str(tmp_path / "out.json"))
    assert [sample.image.path for sample in labelled.samples if sample.image] == [
        f"{plain}/images/a.png", f"{plain}/images/b.png",
    ]  # fmt: skip
    assert labelled.counts() == {"no picture": 1, "no answer": 1}
    assert labelled.samples[0].image is not None and labelled.samples[0].image.read() == b"a.png"
    tested = check_test_data(args, train=places["data"])
    assert len(tested.samples) == 2 and tested.counts() == labelled.counts() and tested.guesses == {"": "cat"}
    config = TrainConfig(stage="sft", model=model, output=str(tmp_path / "out"), batch_size=2, **places)
    with pytest.raises(MissingFeatures, match=r"lacks .* of the features"):
        check_data(config)
    for output, check in (("s3://bucket/out", lambda out: check_label_data(args, out)),
                          ("s3://bucket/out", lambda out: check_data(TrainConfig(stage="sft", model=model, output=out, **places)))):  # fmt: skip
        with pytest.raises(DataError, match=r"--output s3://bucket/out: .* local"):
            check(output)


def test_what_training_leaves_out_is_named(tmp_path, model, capsys):
    records = [record(routing=["sam"]), record("b.png", routing=[]), record(None), record(["a.png", "b.png"]), record()]
    places = place(str(tmp_path), records)
    settings: dict[str, Any] = {"stage": "router", "model": model, "output": str(tmp_path / "out"), **places}
    with pytest.raises(DataError, match=r"line 4: the record has 2 pictures.*--bad-rows skip"):
        check_data(TrainConfig(batch_size=2, **settings))
    data = check_data(TrainConfig(batch_size=2, bad_rows="skip", **settings))
    assert len(data.samples) == 2 and data.counts() == {"no picture": 1, "no routing label": 1}
    data.report()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "bad rows skipped: 1"
    assert f"1 record left out: no picture (the first: {places['data']}, record 3, line 3)" in lines
    with pytest.raises(DataError, match=r"holds 2 usable samples \(left out: no picture: 1, .*batch-size 3"):
        check_data(TrainConfig(batch_size=3, bad_rows="skip", **settings))
    with pytest.raises(DataError, match="is no MoVA model"):
        check_data(TrainConfig(**{**settings, "model": str(tmp_path)}))
    assert total_steps(TrainConfig(batch_size=4, epochs=2.5, **settings), 11) == 5


@pytest.mark.parametrize("module", ["pipelines.train.data", "pipelines.read_data", "pipelines.evaluate.data"])
def test_checks_import_neither_torch_nor_ray(module):
    script = f"import sys, {module}; assert not {{'torch', 'ray', 'transformers'}} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("grouped", [False, True])
def test_batches_resume_and_are_the_same_for_any_number_of_ranks(tmp_path, model, grouped):
    from pipelines.train.batches import StageSamples, open_batches

    class Positions(StageSamples):
        def __getitems__(self, positions):
            return [(self.epoch, self.samples[position].id) for position in positions]

    records = [record(id=f"r{n}", answer=" ".join("a" * (n % 5 + 1)), routing=[]) for n in range(11)]
    config = TrainConfig(stage="sft", model=model, output=str(tmp_path / "out"), batch_size=4, seed=3,
                         group_by_length=grouped, **place(str(tmp_path), records))  # fmt: skip
    data = check_data(config)

    def batches(rank: int = 0, world: int = 1):
        opened = open_batches(config, data.samples, None, None, POOL, rank, world)  # type: ignore[arg-type]
        opened.reader.__class__ = Positions
        return opened

    def take(source, count):
        return list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(source)), count))

    whole = take(batches(), 6)
    assert [batch[0][0] for batch in whole] == [0, 0, 1, 1, 2, 2] and whole[:2] != whole[2:4]
    for end in range(1, 6):
        broken = batches()
        first = take(broken, end)
        resumed = batches()
        resumed.load_state_dict(pickle.loads(pickle.dumps(broken.state_dict())))
        assert first + take(resumed, 6 - end) == whole, f"broken off after {end}"
    thirds = [take(batches(rank, 3), 6) for rank in range(3)]
    for batch, *shares in zip(whole, *thirds, strict=True):
        assert sorted(batch) == sorted(itertools.chain(*shares))

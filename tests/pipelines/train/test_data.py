"""Data, images and store at a URL or a path; what is refused before torch and Ray start; batches and their resumption."""

import dataclasses
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from mova_core.data import DataError
from mova_core.experts import EXPERTS
from mova_core.features import FeatureStore, MissingFeatures
from mova_core.records import read_records
from pipelines.data_args import DataArgs
from pipelines.evaluate.data import check_data as check_test_data
from pipelines.read_data import check_label_data, version_of
from pipelines.train import index
from pipelines.train.config import TrainConfig
from pipelines.train.data import TrainingData, _routing_rows, _usable, check_data, data_sources, total_steps

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
    config = TrainConfig(
        stage="sft", model=model, output=str(tmp_path / "out"), batch_size=2, unlabelled="random", **places
    )
    with pytest.raises(MissingFeatures, match=r"lacks .* of the features"):
        check_data(config)
    for output, check in (("s3://bucket/out", lambda out: check_label_data(args, out)),
                          ("s3://bucket/out", lambda out: check_data(TrainConfig(stage="sft", model=model, output=out, **places)))):  # fmt: skip
        with pytest.raises(DataError, match=r"--output s3://bucket/out: .* local"):
            check(output)


def test_what_training_leaves_out_is_named(tmp_path, model, capsys):
    records = [
        record(routing=["sam"]),
        record("b.png", routing=[]),
        record(None),
        record(["a.png", "b.png"]),
        record(),
        record(3),
    ]
    places = place(str(tmp_path), records)
    settings: dict[str, Any] = {"stage": "router", "model": model, "output": str(tmp_path / "out"), **places}
    with pytest.raises(DataError, match=r"line 6: `image` must be one path.*--bad-rows skip"):
        check_data(TrainConfig(batch_size=2, **settings))
    data = check_data(TrainConfig(batch_size=2, bad_rows="skip", **settings))
    assert len(data.samples) == 2 and data.counts() == {"no picture": 1, "several pictures": 1, "no routing label": 1}
    data.report()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "bad rows skipped: 1"
    assert f"1 record left out: no picture (the first: {places['data']}, record 3, line 3)" in lines
    with pytest.raises(DataError, match=r"holds 2 usable samples \(left out: no picture: 1, .*batch-size 3"):
        check_data(TrainConfig(batch_size=3, bad_rows="skip", **settings))
    with pytest.raises(DataError, match="is no MoVA model"):
        check_data(TrainConfig(**{**settings, "model": str(tmp_path)}))
    assert total_steps(TrainConfig(batch_size=4, epochs=2.5, **settings), 11) == 5


def test_samples_without_a_label_are_refused_unless_told(tmp_path, model):
    """A text-only record needs none."""
    places = place(str(tmp_path), [record(routing=["sam"]), record(None), record("b.png"), record(["a.png", "b.png"])])
    settings: dict[str, Any] = {
        "stage": "sft",
        "model": model,
        "output": str(tmp_path / "out"),
        "batch_size": 2,
        **places,
    }
    with pytest.raises(
        DataError, match=r"2 records have no routing label \(the first: .*record 3, line 3\): run `mova label`"
    ):
        check_data(TrainConfig(**settings))
    with pytest.raises(MissingFeatures):  # of record 1: the store is empty
        check_data(TrainConfig(unlabelled="none", **settings))


def test_each_file_is_passed_over_as_often_as_its_weight_says(tmp_path, model):
    places = place(str(tmp_path), [record(id=f"a{n}", routing=[]) for n in range(5)])
    (tmp_path / "more.jsonl").write_text(
        "\n".join(json.dumps(record("b.png", id=f"b{n}", routing=[])) for n in range(8))
    )
    config = TrainConfig(
        stage="sft", model=model, output=str(tmp_path / "out"), batch_size=2, mix={f"{tmp_path}/more.jsonl": 1.5},
        **places | {"images": str(tmp_path / "images")},
    )  # fmt: skip
    data = check_data(config)
    ids = [sample.id for sample in data.samples]
    assert ids[:5] == [f"a{n}" for n in range(5)] and ids[5:13] == [f"b{n}" for n in range(8)]
    assert len(set(ids[13:])) == 4 and set(ids[13:]) < set(ids[5:13]), "half of the file a second time"
    assert [source.name for source in data.sources] == ["data", "more"]
    assert set(data.rows["source"][5:]) == {1} and not data.rows["routing"].any()
    assert ids == [sample.id for sample in check_data(config).samples], "a run chooses the same half again"
    with pytest.raises(DataError, match=r"--mix .*data\.jsonl: the file is a source already"):
        check_data(dataclasses.replace(config, mix={places["data"]: 1.0}))


def test_routing_samples_are_labelled_records_with_one_picture(tmp_path, model):
    records = [record(id="x", routing=["sam"]), record(None, id="text"), record(["a.png", "b.png"], id="two", routing=[]),
               record(id="y", routing=[]), record(id="unlabelled")]  # fmt: skip
    config = TrainConfig(stage="sft", model=model, output=str(tmp_path / "out"), batch_size=1, workers=1,
                         unlabelled="none", **place(str(tmp_path), records))  # fmt: skip
    rows = _routing_rows(dataclasses.replace(config, routing_samples=2), [_usable(TrainingData(
        config=config, rows=np.empty(0), sources=data_sources(config), pool=EXPERTS), 0, lambda _: False)])  # fmt: skip
    assert sorted(rows["number"]) == [1, 4] and rows["routing"].all()
    for settings, problem in (({"routing_samples": 3}, "only 2 records have a routing label and one picture"),
                              ({"stage": "pretrain", "routing_samples": 1}, "the stage pretrain has none")):  # fmt: skip
        with pytest.raises(DataError, match=problem):
            check_data(dataclasses.replace(config, **settings))
    (Path(model) / "expert_routing_lora").mkdir()
    with pytest.raises(DataError, match="routes by its LoRA: start from a model"):
        check_data(dataclasses.replace(config, routing_samples=1))


def test_an_index_is_kept_for_one_version_of_a_file(tmp_path, monkeypatch):
    records = [record(id=f"{n}", routing=["sam"] if n % 2 else None) for n in range(5)]
    path = str(tmp_path / "data.jsonl")
    read: list[str] = []

    def counted(path, refuse):
        read.append(path)
        return read_records(path, refuse)

    monkeypatch.setattr(index, "read_records", counted)

    def ids() -> list[str]:
        source = index.DataSource(name="d", path=path, version=version_of(path))
        [batch] = index.SampleIndex(source, EXPERTS, lambda _: None).batches(100)
        rows = np.zeros(len(batch), index.ROW)
        for name in ("offset", "size", "number", "line"):
            rows[name] = batch[name]
        return [sample.id for sample in index.IndexedSamples(rows, [source], EXPERTS)]

    Path(path).write_text("\n".join(map(json.dumps, records)))
    assert ids() == ids() == list("01234") and len(read) == 1
    Path(path).write_text("\n".join(map(json.dumps, records[1:])))
    assert ids() == list("1234") and len(read) == 2
    Path(path).write_text("\n".join(map(json.dumps, [*records, 3])))
    assert ids() == ids() == list("01234") and len(read) == 4, "invalid records must be told by every run"


@pytest.mark.parametrize("module", ["pipelines.train.data", "pipelines.read_data", "pipelines.evaluate.data"])
def test_checks_import_neither_torch_nor_ray(module):
    script = f"import sys, {module}; assert not {{'torch', 'ray', 'transformers'}} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("grouped", [False, True])
def test_batches_resume_and_are_the_same_for_any_number_of_ranks(tmp_path, model, grouped):
    from pipelines.train.batches import StageSamples, open_batches

    class Positions(StageSamples):
        def __getitems__(self, positions):
            return [(self.epoch, self.samples[int(position)].id) for position in positions]

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

"""Labelling, evaluation and training over records that cannot all be used: the real stages, their workers in this process."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import pipelines.evaluate.run
import pipelines.label
from mova_core.config import MoVAConfig
from mova_core.data import DataError, Sample, read_samples
from mova_core.experts import BASE, EXPERTS
from mova_core.features import FeatureStore, LocalExperts, Tiered
from mova_core.images import ImageRef
from mova_core.isolate import isolate_failures
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor
from pipelines.evaluate.data import most_frequent, questions_of
from pipelines.evaluate.run import evaluate
from pipelines.label import label
from pipelines.train.batches import StageSamples
from pipelines.train.config import TrainConfig
from pipelines.train.data import check_data, open_run_store, read_chosen
from pipelines.train.features import open_features, stored_base
from pipelines.train.stages import LightRouting, choose_parameters
from tests.mova_core.conftest import local_experts, mini_folder, pictures  # noqa: F401  # fixtures


def record(picture: Any = "0.png", *turns: str, **fields: Any) -> dict[str, Any]:
    words = turns or ("<image>\nWhat?", "A cat")
    conversation = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(words)]
    return {"conversations": conversation, **({} if picture is None else {"image": picture}), **fields}


@pytest.fixture(scope="module")
def places(tmp_path_factory, mini_folder, local_experts, pictures):  # noqa: F811
    """A model, its store with the features of three pictures, and the pictures' folder."""
    store = tmp_path_factory.mktemp("stages") / "store"
    with Tiered(FeatureStore(store, create=True), local_experts) as source:
        images = [ImageRef(path=path) for path in pictures]
        source.fetch(images, [list(local_experts.fingerprints)] * len(images))
    return {"model": str(mini_folder), "store": str(store), "images": str(pictures[0].parent)}


@pytest.fixture
def in_this_process(monkeypatch):
    """The stages' own workers, called without Ray's actors."""

    def call(worker, rows, *, arguments, batch_size, **_):
        instance, table = worker(**arguments), pa.Table.from_pylist([dict(row) for row in rows])
        for start in range(0, len(table), batch_size):
            yield from instance(table.slice(start, batch_size)).to_pylist()

    monkeypatch.setattr(pipelines.label, "map_with_actors", call)
    monkeypatch.setattr(pipelines.evaluate.run, "map_with_actors", call)


def write(path: Path, records: list[Any], **options: Any) -> str:
    path.write_text(json.dumps(records, **options))
    return str(path)


ODD = [
    record("0.png", kind="x"),
    record("not-downloaded.png"),
    record(None, "Hello?", "Hi"),
    record("1.png", "<image>", "A cat"),
    record("1.png", "<image>\nWhat?", ""),
    record("1.png", "<image>\n" + "bar " * 3000, "A cat"),
    record("2.png", kind=None),
]
LEFT_OUT = {"no picture": 1, "picture cannot be read": 1, "empty question": 1, "no answer": 1}


def test_labels_of_one_line_are_those_of_many_lines(places, in_this_process, tmp_path, capsys):
    """Records were known by their line: all of a one-line file got the labels of the last."""
    labelled = {}
    for name, indent in (("one", None), ("many", 1)):
        data = write(tmp_path / f"{name}.json", ODD, indent=indent)
        done = label(data=data, output=str(tmp_path / f"{name}.out.json"), progress=False, **places)
        assert done.left_out == LEFT_OUT | {"cannot be labelled": 1} and (done.samples, done.unlabelled) == (2, 5)
        labelled[name] = json.loads((tmp_path / f"{name}.out.json").read_text())
    assert labelled["one"] == labelled["many"] and len(labelled["one"]) == len(ODD)
    assert [number for number, item in enumerate(labelled["one"]) if "routing" in item] == [0, 6]
    first, last = labelled["one"][0]["routing_losses"], labelled["one"][6]["routing_losses"]
    assert first["none"] != last["none"] and all(map(math.isfinite, [*first.values(), *last.values()]))
    lines = capsys.readouterr().err.splitlines()
    assert f"1 record left out: picture cannot be read (the first: {tmp_path}/many.json, record 2, line 16)" in lines
    assert any("cannot be labelled (the first:" in line and "many.json, record 6" in line for line in lines)


def test_labels_are_the_experts_whose_loss_the_model_itself_finds_lower(places, in_this_process, tmp_path):
    """Each question and expert by itself through the model's own loss; labels and counts follow from these numbers."""
    talks = [
        record("0.png"),
        record("1.png", "<image>\nWhat is in the picture?", "0123456789", "And left?", "none, D"),
        record("2.png", "<image>\nright or left?", "B, C"),
    ]
    data, output = write(tmp_path / "talks.json", talks), str(tmp_path / "labelled.json")
    done = label(data=data, output=output, batch_size=2, max_experts=2, progress=False, **places)
    model = MoVAForConditionalGeneration.from_pretrained(places["model"]).eval()
    processor, store = MoVAProcessor.from_pretrained(places["model"]), FeatureStore(places["store"])
    counts = dict.fromkeys(EXPERTS, 0)
    for sample in read_samples(output, places["images"]):
        [stored] = store.fetch(sample.images, [list(EXPERTS)])
        losses = {}
        for expert in ("none", *EXPERTS):
            batch = processor([list(sample.turns)], [list(sample.images)], labels=True)
            features = {} if expert == "none" else {expert: stored[expert]._replace(tokens=stored[expert].tokens[None])}
            routing = torch.tensor([[name == expert for name in EXPERTS]])
            with torch.no_grad():
                losses[expert] = model(**batch, experts=features, routing=routing).loss.item()
        assert sample.extra["routing_losses"] == pytest.approx(losses, abs=2e-5)
        written = sample.extra["routing_losses"]
        useful = sorted((written[name], name) for name in EXPERTS if written[name] < written["none"])
        assert sample.routing == tuple(name for _, name in useful[:2])
        for name in sample.routing:
            counts[name] += 1
    assert done.experts == counts and sum(counts.values()) > 0
    assert done.per_sample == pytest.approx(sum(counts.values()) / 3)
    assert (done.samples, done.unlabelled, done.output, done.left_out, done.skipped) == (3, 0, output, {}, [])


def test_a_question_that_cannot_be_answered_costs_no_other(places, in_this_process, tmp_path):
    data = write(tmp_path / "test.json", ODD)
    done = evaluate(data=data, train=data, max_new_tokens=2, progress=False, **places)
    assert {kind: row["questions"] for kind, row in done["kinds"].items()} == {"all": 1, "x": 1}
    assert done["left_out"] == LEFT_OUT | {"cannot be answered": 1} and done["unanswered"] == 5
    assert done["unreadable"] == sum(not answer["readable"] for answer in done["answers"])
    json.dumps(done, allow_nan=False)
    with pytest.raises(
        DataError,
        match=r"none of its 1 questions can be answered; the first: .*record 1, line 1: .*but the LLM reads 2048",
    ):
        evaluate(data=write(tmp_path / "long.json", [ODD[5]]), progress=False, **places)
    with pytest.raises(DataError, match=r"no usable record \(no picture: 1; the first: .*record 1, line 1\)"):
        evaluate(data=write(tmp_path / "text.json", [ODD[2]]), progress=False, **places)


def test_each_question_of_a_conversation_is_asked_with_its_history(places, in_this_process, tmp_path, monkeypatch):
    asked: list[Any] = []
    original = pipelines.evaluate.run.AnswerServer.answer

    def answer(self, questions):
        asked.extend(questions)
        return original(self, questions)

    monkeypatch.setattr(pipelines.evaluate.run.AnswerServer, "answer", answer)
    talk = record("0.png", "<image>\nWhich colour?", "Red", "Which shape?", "Round", form="colour")
    unanswered = record("1.png", "<image>\nWhat?", "A cat", "And now?")
    data = write(tmp_path / "talk.json", [talk, unanswered])
    done = evaluate(data=data, train=data, max_new_tokens=1, progress=False, **places)
    assert [(a["turn"], a["question"], a["truth"]) for a in done["answers"]] == [
        (1, "Which colour?", "Red"), (2, "Which shape?", "Round"), (1, "What?", "A cat"),
    ]  # fmt: skip
    assert [question.history for question in asked] == [[], [("user", "Which colour?"), ("assistant", "Red")], []]
    assert len(evaluate(data=data, limit=2, max_new_tokens=1, progress=False, **places)["answers"]) == 2


def test_a_missing_picture_is_found_before_training(places, tmp_path):
    records = [record(f"{n % 3}.png", routing=["sam"]) for n in range(200)]
    records[123]["image"] = "not-downloaded.jpg"
    data = write(tmp_path / "train.json", records)
    for seed in range(5):
        config = TrainConfig(stage="sft", data=data, output=str(tmp_path / "out"), batch_size=32, seed=seed, **places)
        checked = check_data(config)
        assert checked.counts() == {"picture cannot be read": 1} and len(checked.samples) == 199
    samples, _ = read_chosen(checked.config, checked.rows, checked.sources)
    assert [sample.number for sample in samples] == [n for n in range(1, 201) if n != 124]
    write(tmp_path / "train.json", records[1:])
    with pytest.raises(DataError, match=r"train\.json has changed since the command began"):
        read_chosen(checked.config, checked.rows, checked.sources)


def test_features_are_the_same_from_store_experts_and_both(places, pictures, tmp_path):  # noqa: F811
    settings: dict[str, Any] = {"stage": "sft", "data": "d", "output": "o", **places}
    images, wanted = [ImageRef(path=path) for path in pictures], [["sam"], [], ["vary", "sam"]]
    found, pinned = {}, {}
    stores = {"store": places["store"], "tiered": str(tmp_path / "store"), "online": ""}
    for kind, location in stores.items():
        model = MoVAConfig.from_pretrained(places["model"])
        config = TrainConfig(**settings | {"features": kind, "store": location})
        store, _ = open_run_store(config)
        assert (store is None) == (kind == "online")
        with open_features(config, store, model, torch.device("cpu")) as source:
            found[kind], pinned[kind] = source.fetch(images, wanted), model.pool
    assert pinned["store"] == pinned["tiered"] == pinned["online"] and all("fingerprint" in e for e in pinned["store"])
    for row, others in zip(found["store"], zip(found["tiered"], found["online"], strict=True), strict=True):
        for other in others:
            assert row.keys() == other.keys()
            for name in row:  # computed in batches of other sizes
                torch.testing.assert_close(row[name].tokens, other[name].tokens, atol=1e-4, rtol=1e-4)
    assert FeatureStore(tmp_path / "store").missing([images[0].key], "sam") == [], "what was computed is stored"
    for change, problem in (({"features": "online"}, "leave --store out"), ({"store": ""}, "reads a store: give --store"),
                            ({"features": "tiered", "loader_processes": 1}, "leave --loader-processes at 0"),
                            ({"features": "tiered", "stage": "router"}, "router reads no features")):  # fmt: skip
        with pytest.raises(DataError, match=problem):
            check_data(TrainConfig(**settings | change))


@pytest.mark.parametrize("stage", ["router", "light-router"])
def test_a_frozen_base_encoder_is_read_from_the_store(places, pictures, tmp_path, stage):  # noqa: F811
    data = write(
        tmp_path / "train.json",
        [record(f"{n % 3}.png", f"<image>\nWhat is {n}?", "x", routing=["sam"]) for n in range(4)],
    )
    config = TrainConfig(stage=stage, data=data, output=str(tmp_path / "out"), batch_size=4, workers=1, **places)
    samples = check_data(config).samples
    model = MoVAForConditionalGeneration.from_pretrained(places["model"], dtype=torch.float32)
    choose_parameters(model, config)
    if model.light_router is not None:
        torch.nn.init.normal_(model.light_router.out.weight, std=0.1)  # a fresh one says the same of every picture
    learner = (LightRouting(model) if stage == "light-router" else model).train(False)
    store = FeatureStore(tmp_path / "store", create=True)
    assert stored_base(store, model) is None, "the store has none"
    with Tiered(store, LocalExperts({BASE: model.base_encoder}), dtypes={BASE: "bfloat16"}) as source:
        source.fetch([ImageRef(path=path) for path in pictures], [[BASE]] * len(pictures))
    base = stored_base(store, model)
    assert base is not None and base.description["dtype"] == "bfloat16"
    losses = []
    for stored in (None, base):
        processor = MoVAProcessor.from_pretrained(places["model"])
        batch = StageSamples(config, samples, store, processor, model.config.pool, stored).__getitems__([0, 1, 2, 3])[0]
        assert ("base" in batch.inputs) == (stored is not None) and ("pixel_values" in batch.inputs) == (stored is None)
        losses.append(learner(**batch.inputs).loss.item())
    assert losses[1] == pytest.approx(losses[0], abs=5e-3) and losses[0] != losses[1], "rounded to bfloat16"
    model.base_encoder.requires_grad_(True)
    assert stored_base(store, model) is None, "it learns"
    model.base_encoder.requires_grad_(False)
    next(model.base_encoder.parameters()).mul_(2)
    assert stored_base(store, model) is None, "the features are of other weights"


def test_questions_and_the_baseline_count_every_turn():
    turns = (("user", "a"), ("user", "b"), ("assistant", "1"), ("user", "c"), ("assistant", ""), ("user", "d"))
    [question] = questions_of([Sample(id="x", images=(), turns=turns, extra={"kind": None, "form": 3})])
    assert (question.history, question.text, question.truth) == ((("user", "a"),), "b", "1")
    assert (question.kind, question.form) == ("all", "3")
    talks = [Sample(id="", images=(), turns=(("user", "a"), ("assistant", answer)) * 2) for answer in ("yes", "no")]
    assert most_frequent([*talks, *talks[:1]]) == {"": "yes"}


def test_failures_are_isolated_in_few_calls():
    calls = []

    def double(numbers):
        calls.append(len(numbers))
        if 13 in numbers:
            raise ValueError("unlucky")
        return [2 * number for number in numbers]

    results = isolate_failures(double, range(32))
    assert str(results.pop(13)) == "unlucky" and results == [2 * number for number in range(32) if number != 13]
    assert len(calls) == 11 and isolate_failures(double, []) == []
    with pytest.raises(KeyError):
        isolate_failures(lambda names: [double.__dict__[name] for name in names], ["nothing"])

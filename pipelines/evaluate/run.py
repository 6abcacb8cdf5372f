"""Evaluate: answers to a test set by a pool of answer servers, judged per kind of picture."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.answer_server import AnswerServer
from mova_core.config import MoVAConfig
from mova_core.data import Sample, usable_samples
from mova_core.features import FeatureStore
from mova_core.io.uris import absolute
from mova_core.metrics import exact_match, normalise
from pipelines.invalid_records import BadRows, read_rows, report_skipped
from pipelines.ray_data import map_with_actors

KIND, FORM = "kind", "form"  # fields a record may have: what is pictured, and which question template it is


def evaluate(
    model: str,
    data: str,
    store: str,
    *,
    images: str | None = None,
    train: str | None = None,
    limit: int | None = None,
    bad_rows: BadRows = "raise",
    actors: int = 1,
    gpu: float = 0.0,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Answers every record with a picture and compares with its truth. Needs an open Ray session.

    Args:
        train: training file; gives the chance level, which is the accuracy of always giving the answer most frequent there
            for the same `form` of question.
        bad_rows: whether a bad row of either file ends it or is left out.

    Returns:
        {"kinds": {kind: {"questions", "accuracy", "chance", "experts"}}, "answers": [one mapping per record]}; accuracy and
        chance from 0 to 1, `chance` None without `train`, `experts` how often each was routed; "unanswered", the number
        of records without a picture or with one in quarantine; and "skipped": what was wrong with each bad row.

    Raises:
        DataError, StoreError: bad data; no features of the weights this model was trained on.
    """
    opened = FeatureStore(store, fingerprints=MoVAConfig.from_pretrained(model).fingerprints)
    read, skipped = read_rows(data, images, bad_rows, check=lambda sample: sample.image)
    guesses = None
    if train:
        seen, bad = read_rows(train, bad_rows=bad_rows)
        guesses, skipped = most_frequent(seen), skipped + bad
    report_skipped(skipped)
    usable = usable_samples(read, opened.quarantined())
    samples = usable[:limit]
    rows = [
        {"id": str(n), "image": absolute(sample.image.path or ""), "question": sample.question}
        for n, sample in enumerate(samples)
        if sample.image is not None
    ]
    replies = map_with_actors(
        AnswerServer,
        rows,
        arguments={
            "model": model,
            "store": str(Path(store).resolve()),
            "max_new_tokens": max_new_tokens,
            "device": "cuda" if gpu else "cpu",
        },
        total=len(rows),
        what="evaluate",
        unit="questions",
        progress=progress,
        batch_size=batch_size,
        actors=actors,
        gpus=gpu,
    )
    answers = []
    for row in replies:
        number = int(row["id"])
        sample = samples[number]
        answers.append(
            {
                "id": sample.id,
                "image": rows[number]["image"],
                "kind": sample.extra.get(KIND, "all"),
                "form": sample.extra.get(FORM, ""),
                "question": sample.question,
                "truth": sample.answer,
                "answer": row["answer"],
                "correct": exact_match(row["answer"], sample.answer),
                "experts": list(row["experts"]),
                "router": row["router"],
                "readable": row["readable"],
                "gates": [dict(block) for block in row["gates"]],
                "seconds": dict(row["seconds"]),
            }
        )
    return {
        "kinds": by_kind(answers, guesses),
        "answers": answers,
        "unanswered": len(read) - len(usable),
        "skipped": skipped,
    }


def most_frequent(samples: Sequence[Sample]) -> dict[str, str]:
    """Form of question -> its most frequent answer."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        counts[sample.extra.get(FORM, "")][normalise(sample.answer)] += 1
    return {form: answers.most_common(1)[0][0] for form, answers in counts.items()}


def by_kind(answers: Sequence[dict[str, Any]], guesses: dict[str, str] | None) -> dict[str, dict[str, Any]]:
    """Questions, accuracy, chance and routed experts per kind of picture, kinds sorted by name."""
    kinds: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        kinds[answer["kind"]].append(answer)
    table = {}
    for kind, given in sorted(kinds.items()):
        routed = Counter(name for answer in given for name in answer["experts"])
        chance = None
        if guesses is not None:
            chance = sum(exact_match(guesses.get(answer["form"], ""), answer["truth"]) for answer in given) / len(given)
        table[kind] = {
            "questions": len(given),
            "accuracy": sum(answer["correct"] for answer in given) / len(given),
            "chance": chance,
            "experts": dict(routed.most_common()),
        }
    return table

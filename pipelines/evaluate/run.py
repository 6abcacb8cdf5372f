"""Evaluation: a pool of answer servers answers a test set; accuracy per kind of picture."""

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from actors.answer_server import AnswerServer
from mova_core.io.uris import absolute
from mova_core.metrics import exact_match
from pipelines.data_args import BadRows, DataArgs
from pipelines.evaluate.data import FORM, KIND, TestData, check_data
from pipelines.ray_data import map_with_actors


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
    read: TestData | None = None,
) -> dict[str, Any]:
    """Answers every record with a picture and compares the answer with the record's. Needs an open Ray session.

    The user turns of a conversation are joined to one question, and the last assistant turn is its truth; a line on stderr
    says for how many records.

    Args:
        model, data, store, images, bad_rows: as `DataArgs`.
        train: training file or URL; gives the baseline, which always answers with the most frequent training answer to
            the same `form` of question.
        limit: first questions only.
        actors, gpu: answer servers, and GPUs of each.
        batch_size: questions per batch.
        max_new_tokens: longest answer, in tokens.
        progress: show a progress bar.
        read: what `check_data` returned, if the caller has checked already.

    Returns:
        {"kinds": {kind: {"questions", "accuracy", "chance", "experts"}}, "answers": [one mapping per record]}; accuracy
        and chance (accuracy of the baseline, None without `train`) from 0 to 1, `experts` how often each was routed;
        "unanswered": number of records without a picture or with a quarantined one; "left_out": the same by reason;
        "unreadable": number of router replies that name no expert and are not "none"; "skipped": the error of each
        invalid record.

    Raises:
        DataError, StoreError: bad data; no features of the weights that this model was trained on.
    """
    args = DataArgs(model=model, data=data, store=store, images=images, bad_rows=bad_rows)
    read = read or check_data(args, train)
    read.report()
    samples = read.samples[:limit]
    if joined := sum(sum(role == "user" for role, _ in sample.turns) > 1 for sample in samples):
        tqdm.write(
            f"{joined} of {len(samples)} records have several questions: each was joined to one question, "
            "and the last answer is its truth",
            file=sys.stderr,
        )
    rows = [
        {"id": str(n), "image": absolute(sample.image.path or ""), "question": sample.question}
        for n, sample in enumerate(samples)
        if sample.image is not None
    ]
    replies = map_with_actors(
        AnswerServer,
        rows,
        arguments={
            "model": args.model,
            "store": args.store,
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
    unreadable = sum(not answer["readable"] for answer in answers)
    return {
        "kinds": by_kind(answers, read.guesses),
        "answers": answers,
        "unanswered": sum(read.counts().values()),
        "left_out": read.counts(),
        "unreadable": unreadable,
        "skipped": read.skipped,
    }


def by_kind(answers: Sequence[dict[str, Any]], guesses: dict[str, str] | None) -> dict[str, dict[str, Any]]:
    """Questions, accuracy, the baseline's accuracy ("chance") and routed experts per kind of picture, sorted by kind."""
    kinds: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        kinds[answer["kind"]].append(answer)
    table = {}
    for kind, members in sorted(kinds.items()):
        routed = Counter(name for answer in members for name in answer["experts"])
        chance = None
        if guesses is not None:
            chance = sum(exact_match(guesses.get(answer["form"], ""), answer["truth"]) for answer in members) / len(
                members
            )
        table[kind] = {
            "questions": len(members),
            "accuracy": sum(answer["correct"] for answer in members) / len(members),
            "chance": chance,
            "experts": dict(routed.most_common()),
        }
    return table

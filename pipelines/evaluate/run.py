"""Evaluation: a pool of answer servers answers a test set; accuracy per kind of picture."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from actors.answer_server import AnswerServer
from mova_core.data import IMAGE_MARK, DataError
from mova_core.io.uris import absolute
from mova_core.metrics import exact_match
from pipelines.data_args import BadRows, DataArgs
from pipelines.evaluate.data import TestData, TestQuestion, check_data, questions_of
from pipelines.invalid_records import report_failed
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
    """Answers every question of the records and compares the answers with the records'. Needs an open Ray session.

    Each user turn that an answer follows is a question of its own, asked with the true turns before it as history.

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
        {"kinds": {kind: {"questions", "accuracy", "chance", "experts"}}, "answers": [one mapping per question]}; accuracy
        and chance (accuracy of the baseline, None without `train`) from 0 to 1, `experts` how often each was routed;
        "unanswered": number of records left out, and of questions that the model cannot take; "left_out": the same by reason;
        "unreadable": number of router replies that name no expert and are not "none"; "skipped": the error of each
        invalid record.

    Raises:
        DataError, StoreError: bad data, no question that can be answered; no features of the weights that this model was
            trained on.
    """
    args = DataArgs(model=model, data=data, store=store, images=images, bad_rows=bad_rows)
    read = read or check_data(args, train)
    read.report()
    questions = questions_of(read.samples)[:limit]
    rows = [
        {
            "id": str(number),
            "image": absolute(question.sample.images[0].path or ""),
            "question": question.text,
            "history": json.dumps(question.history),
        }
        for number, question in enumerate(questions)
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
    answers: list[dict[str, Any]] = []
    failed: list[str] = []
    for row in replies:
        question = questions[int(row["id"])]
        if row["error"] is not None:
            failed.append(f"{question.sample.where}: {row['error']}")
        else:
            answers.append(_judged(question, rows[int(row["id"])]["image"], row))
    report_failed("question", "cannot be answered", failed)
    if not answers:
        raise DataError(f"{args.data}: none of its {len(questions)} questions can be answered; the first: {failed[0]}")
    return {
        "kinds": by_kind(answers, read.guesses),
        "answers": answers,
        "unanswered": sum(read.counts().values()) + len(failed),
        "left_out": read.counts() | ({"cannot be answered": len(failed)} if failed else {}),
        "unreadable": sum(not answer["readable"] for answer in answers),
        "skipped": read.skipped,
    }


def _judged(question: TestQuestion, image: str, reply: dict[str, Any]) -> dict[str, Any]:
    """One answer beside its truth."""
    return {
        "id": question.sample.id,
        "turn": question.turn,
        "image": image,
        "kind": question.kind,
        "form": question.form,
        "question": question.text.replace(IMAGE_MARK, "").strip(),
        "truth": question.truth,
        "answer": reply["answer"],
        "correct": exact_match(reply["answer"], question.truth),
        "experts": list(reply["experts"]),
        "router": reply["router"],
        "readable": reply["readable"],
        "gates": [dict(block) for block in reply["gates"]],
        "seconds": dict(reply["seconds"]),
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

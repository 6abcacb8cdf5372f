"""AnswerServer: base encoder, router, adapter and LLM on one device, as a plain class.

Ray Data runs the class as the callable of an actor pool (evaluation: `__call__`, rows in, rows out). A Serve replica or a
plain Ray actor calls `answer` with questions, which may have several images, a history and a budget.
"""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from mova_core.answering import Answer, Answerer, Question
from mova_core.features import FeatureStore
from mova_core.images import ImageRef
from mova_core.isolate import isolate_failures
from mova_core.model import MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor

ANSWERED = pa.schema(
    [
        ("id", pa.string()),
        ("answer", pa.string()),
        ("experts", pa.list_(pa.string())),
        ("router", pa.string()),
        ("readable", pa.bool_()),
        ("gates", pa.list_(pa.map_(pa.string(), pa.float64()))),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("error", pa.string()),
    ]
)


class AnswerServer:
    """Answers questions on images whose features are in a store.

    Args:
        model: folder of a trained model.
        store: folder of the feature store; it must hold features of the weights that the model was trained on.
        max_new_tokens: longest answer, in tokens.
        device: torch device; default the GPU this process was given, else the CPU.

    Raises:
        StoreError: no store is there, or it has no features of the model's fingerprints.
    """

    def __init__(self, model: str, store: str, *, max_new_tokens: int = 32, device: str | None = None):
        loaded = MoVAForConditionalGeneration.from_pretrained(model)
        torch.nn.Module.to(loaded, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source = FeatureStore(store, fingerprints=loaded.config.fingerprints)
        self.answerer = Answerer(loaded, MoVAProcessor.from_pretrained(model), source)
        self.max_new_tokens = max_new_tokens

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """One batch of questions; see `Answerer.answer`. Any number of threads may ask; the batches run one by one."""
        return self.answerer.answer(questions, self.max_new_tokens)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Answers one block of a Ray Dataset.

        Args:
            rows: columns `id`, `image` (a locator), `question`, and optionally `history` (JSON: the turns before it as
                [role, text]) and `experts` (forced routing, or null).

        Returns:
            Rows of schema `ANSWERED`, in the same order; `gates` has one map per adapter block. A question that cannot be
            answered has its `error` and null in the other columns.
        """
        records = rows.to_pylist()
        questions = [
            Question(
                image=ImageRef(path=record["image"]),
                text=record["question"],
                history=[(role, text) for role, text in json.loads(record.get("history") or "[]")],
                experts=None if record.get("experts") is None else tuple(record["experts"]),
            )
            for record in records
        ]
        answers = isolate_failures(self.answer, questions)
        return pa.Table.from_pylist(
            [self._row(record["id"], answer) for record, answer in zip(records, answers, strict=True)], schema=ANSWERED
        )

    @staticmethod
    def _row(key: str, answer: Answer | ValueError) -> dict[str, Any]:
        if isinstance(answer, ValueError):
            return {"id": key, "error": str(answer)}
        return {
            "id": key,
            "answer": answer.text,
            "experts": answer.experts,
            "router": answer.router,
            "readable": answer.readable,
            "gates": [list(block.items()) for block in answer.gates],
            "seconds": list(answer.seconds.items()),
        }

"""AnswerServer: router, adapter and LLM on one device, as a plain class that Ray Data (evaluation) and later Serve run."""

from typing import Any

import pyarrow as pa
import torch

from mova_core.answering import Answer, Answerer, Question
from mova_core.features import FeatureStore
from mova_core.images import ImageRef
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
    ]
)


class AnswerServer:
    """Answers questions on pictures whose features are in a store.

    Args:
        model: folder of a trained model.
        store: folder of the feature store; it must hold features of the weights the model was trained on.
        max_new_tokens: longest answer, in tokens.
        device: torch device; default the GPU this process was given, else the CPU.
    """

    def __init__(self, model: str, store: str, *, max_new_tokens: int = 32, device: str | None = None):
        loaded = MoVAForConditionalGeneration.from_pretrained(model)
        torch.nn.Module.to(loaded, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source = FeatureStore(store, fingerprints=loaded.config.fingerprints)
        self.answerer = Answerer(loaded, MoVAProcessor.from_pretrained(model), source)
        self.max_new_tokens = max_new_tokens

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Rows with id, image (path) and question, and optionally experts to force, to rows of `ANSWERED`."""
        asked = rows.to_pylist()
        questions = [
            Question(
                image=ImageRef(path=row["image"]),
                text=row["question"],
                experts=None if row.get("experts") is None else tuple(row["experts"]),
            )
            for row in asked
        ]
        answers = self.answerer.answer(questions, self.max_new_tokens)
        return pa.Table.from_pylist(
            [self._row(row["id"], answer) for row, answer in zip(asked, answers, strict=True)], schema=ANSWERED
        )

    @staticmethod
    def _row(key: str, answer: Answer) -> dict[str, Any]:
        return {
            "id": key,
            "answer": answer.text,
            "experts": answer.experts,
            "router": answer.router,
            "readable": answer.readable,
            "gates": [list(block.items()) for block in answer.gates],
            "seconds": list(answer.seconds.items()),
        }

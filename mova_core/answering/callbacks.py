"""Stopping criteria of transformers' `generate` that stop nothing: they watch the tokens as they come."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from mova_core.processing import MoVAProcessor


class RoutingReplyCallback(StoppingCriteria):
    """Calls back with each row's reply as soon as the row has ended, while `generate` works on the other rows.

    Args:
        processor: decodes the tokens.
        on_reply: called once per row with (index of the row, reply).
    """

    def __init__(self, processor: MoVAProcessor, on_reply: Callable[[int, str], None]):
        self.processor, self.on_reply = processor, on_reply
        self._ids_BL: Tensor | None = None
        self._reported: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self._ids_BL = input_ids
        ended = (input_ids[:, -1] == self.processor.tokenizer.eos_token_id).tolist()
        self._report(index for index, has_ended in enumerate(ended) if has_ended)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Reports the replies that reached the limit of tokens without an end mark. Call it after `generate`."""
        assert self._ids_BL is not None
        self._report(range(len(self._ids_BL)))

    def _report(self, rows: Iterable[int]) -> None:
        assert self._ids_BL is not None
        for index in rows:
            if index not in self._reported:
                self._reported.add(index)
                self.on_reply(index, self.processor.decode(self._ids_BL[index]))


class FirstTokenTimer(StoppingCriteria):
    """Measures the time from its construction to the first token, in seconds."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first_token = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if not self.first_token:
            input_ids[:, -1].tolist()  # waits for the device
            self.first_token = time.perf_counter() - self.started
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

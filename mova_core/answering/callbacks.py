"""Callbacks of transformers' `generate`."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from mova_core.processing import MoVAProcessor


class RoutingReplyCallback(StoppingCriteria):
    """Stops nothing; tells of each row's reply as soon as its end mark is there."""

    def __init__(self, processor: MoVAProcessor, heard: Callable[[int, str], None]):
        self.processor, self.heard = processor, heard
        self.ids: Tensor | None = None
        self.told: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.ids = input_ids
        ended = (input_ids[:, -1] == self.processor.tokenizer.eos_token_id).tolist()
        self._tell([index for index, end in enumerate(ended) if end])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def finish(self) -> None:
        """Tells of the replies that came to no end."""
        assert self.ids is not None
        self._tell(range(len(self.ids)))

    def _tell(self, rows: Sequence[int]) -> None:
        for index in rows:
            if index not in self.told:
                self.told.add(index)
                assert self.ids is not None
                self.heard(index, self.processor.decode(self.ids[index]))


class FirstTokenTimer(StoppingCriteria):
    """Stops nothing; knows when the first token was there, in seconds."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first_token = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if not self.first_token:
            input_ids[:, -1].tolist()  # waits for the device
            self.first_token = time.perf_counter() - self.started
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

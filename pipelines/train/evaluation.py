"""The loss of held-out samples while a run trains."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from pipelines.train.batches import MicroBatch
from pipelines.train.parallel import Parallel


class Samples(Protocol):
    """As `StageSamples` gives them: all positions asked for in one micro-batch."""

    def __len__(self) -> int: ...

    def __getitems__(self, positions: Sequence[int]) -> list[MicroBatch]: ...


class HeldOut:
    """Samples that are never learnt from. Each rank computes its share of them.

    Evaluation is deterministic: no dropout, and each sample's random choices are those of epoch 0. It draws no number from
    torch's, numpy's or Python's generators, and leaves gradients, moments and the mode of every module as they were.

    Args:
        samples: held-out samples; its processor must serve no other thread meanwhile.
        size: samples that a rank computes at once.
    """

    def __init__(self, samples: Samples, parallel: Parallel, *, size: int):
        self.samples, self.parallel, self.size = samples, parallel, size

    @torch.no_grad()
    def loss(self) -> float | None:
        """Mean over all answer tokens of all ranks' samples, the same number on every rank; None without any token.

        Every rank must call it.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        modes = {module: module.training for module in self.parallel.wrapped.modules()}
        self.parallel.wrapped.eval()
        for batch, counts in self._batches():
            inputs = batch.to(self.parallel.device).inputs
            if "labels" in inputs:
                inputs["answers_only"] = True  # in evaluation mode the model gives the logits of all positions
            loss = self.parallel.loss(inputs, items=1)
            if counts and batch.answers.any():
                sums += torch.stack([loss.double(), batch.answers.sum().to(sums)])
        for module, mode in modes.items():
            module.training = mode
        total, answers = self.parallel.sum(sums).tolist()
        return total / answers if answers else None

    def _batches(self) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's batches, read ahead by one, and whether each counts.

        All ranks need the same number of forward passes, so a rank without a sample in the last round computes one that does
        not count.
        """
        count, world, rank = len(self.samples), self.parallel.world, self.parallel.rank
        shares = [
            list(range(begin + rank, min(begin + self.size * world, count), world))
            for begin in range(0, count, self.size * world)
        ]
        with ThreadPoolExecutor(1, thread_name_prefix="mova-held-out") as thread:
            reading = thread.submit(self._read, shares[0])
            for share, following in zip(shares, [*shares[1:], None], strict=True):
                batch = reading.result()
                if following is not None:
                    reading = thread.submit(self._read, following)
                yield batch, bool(share)

    def _read(self, share: list[int]) -> MicroBatch:
        [batch] = self.samples.__getitems__(share or [0])
        return batch

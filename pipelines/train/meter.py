"""What a rank measures of each step, for a line of `metrics.jsonl`, and the guards against steps that would spoil the model."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mova_core.figures import number
from pipelines.train.batches import MicroBatch
from pipelines.train.flops import ModelFlops
from pipelines.train.metrics import STOP_AFTER
from pipelines.train.parallel import Parallel

LOSS_WINDOW = 50  # steps over which the reported loss is averaged
SPIKE = 10.0  # a norm over so many times the running median is named
SPIKE_WINDOW, SPIKE_LEAST = 200, 20  # norms of the running median, at most and at least


class StepMeter:
    """Measures the steps of one rank and joins them with those of the other ranks, which must call every method alike.

    Args:
        parallel: what trains `model`, or a part of the model.
        sources: names of what `MicroBatch.sources` counts.
        where: position of a sample -> file and record, for people.
        flops: counts the floating-point operations of a micro-batch.
        peak: floating-point operations per second of one device, see `peak_flops`; None: unknown, so the MFU is, too.

    Attributes:
        losses: of the last finite steps, at most `LOSS_WINDOW`.
        skipped: steps whose loss or gradient was no finite number.
        stopped: whether the run must end, because `STOP_AFTER` steps in a row were skipped.
    """

    def __init__(
        self,
        parallel: Parallel,
        model: Any,
        *,
        sources: Sequence[str],
        where: Callable[[int], str],
        flops: ModelFlops | None = None,
        peak: float | None = None,
    ):
        self.parallel, self.sources, self.where = parallel, list(sources), where
        self.experts: tuple[str, ...] = model.config.experts
        self.flops, self.peak = flops, peak
        self.losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self.norms: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.skipped = self.skipped_in_a_row = 0
        self._started = self._waited = 0.0
        nothing = torch.zeros(0, dtype=torch.int64)
        self._share = _Share(nothing, nothing, nothing, torch.zeros(2, device=parallel.device))
        parallel.learner.register_forward_hook(self._see_losses)
        model.adapter.register_forward_hook(self._see_gates)

    @property
    def stopped(self) -> bool:
        return self.skipped_in_a_row >= STOP_AFTER

    @property
    def loss(self) -> float | None:
        """Mean of `losses`."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    def note(self, row: dict[str, Any]) -> str:
        """What stands behind the progress bar."""
        skipped = f", {self.skipped} step{'s' if self.skipped > 1 else ''} skipped" if self.skipped else ""
        return f"loss: {number(self.loss)}, {number(row['tokens_per_second'])} tokens/s{skipped}"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with, as plain numbers for a checkpoint; the same on every rank."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields `batches`, and measures how long each was waited for. A step lasts from there to `end`."""
        iterator = iter(batches)
        while True:
            self._started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited = time.perf_counter() - self._started
            yield batch

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Counts a step's share of this rank, before the forward pass."""
        inputs = [batch.inputs for batch in micro_batches]
        self._share = share = _Share(
            positions=torch.cat([batch.positions for batch in micro_batches]),
            sources=torch.cat([batch.sources for batch in micro_batches]),
            answers=torch.cat([batch.answers for batch in micro_batches]),
            gates=torch.zeros(2, device=self.parallel.device),
        )
        routings = [part["routing"].sum(0) for part in inputs if "labels" in part and "routing" in part]
        masks = [part["attention_mask" if "attention_mask" in part else "text_attention_mask"] for part in inputs]
        self._counts = {
            "samples": torch.tensor([len(share.positions)]),
            "tokens": torch.stack([mask.sum() for mask in masks]).sum()[None],
            "flops": torch.tensor([sum(map(self.flops.of, inputs)) if self.flops else 0.0]),
            "experts": sum(routings, torch.zeros(len(self.experts))),
            "waits": self._of_this_rank(self._waited),
        }

    def end(self, step: int, loss: Tensor, norm: Tensor, learning_rate: float) -> dict[str, Any]:
        """The line of a step, the same on every rank but for its seconds.

        Args:
            loss, norm: of the step over all ranks, as `Parallel.backward` and `Parallel.step` return them.
            learning_rate: of this step.
        """
        step_loss, seconds = loss.item(), time.perf_counter() - self._started
        by_source = self._share.by_source(len(self.sources), step_loss)
        sums = self._summed(
            {**self._counts, "losses": by_source[0], "answers": by_source[1], "gates": self._share.gates}
        )
        [tokens], [flops], [entropy, gates] = sums["tokens"], sums["flops"], sums["gates"]
        losses = list(zip(self.sources, sums["losses"], sums["answers"], strict=True))
        learnt = any(sums["answers"])  # else no sample of the step has an answer within `max_length`
        row: dict[str, Any] = {
            "step": step,
            "loss": step_loss if learnt else None,
            "grad_norm": norm.item(),
            "lr": learning_rate,
            "tokens": int(tokens),
            "samples": int(sums["samples"][0]),
            "seconds": seconds,
            "data_wait": max(sums["waits"]),
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / self.parallel.world / self.peak if flops and self.peak else None,
            "sources": {name: total / answers for name, total, answers in losses if answers},
            "experts": {name: int(rows) for name, rows in zip(self.experts, sums["experts"], strict=True)},
            "gate_entropy": entropy / gates if gates else None,
        }
        if learnt and math.isfinite(step_loss):
            self.losses.append(step_loss)
        return row | self._judged(math.isfinite(step_loss), row["grad_norm"])

    def _judged(self, finite: bool, norm: float) -> dict[str, Any]:
        """What the guards say of a step; names its samples if it was skipped or its norm is too large."""
        if not (finite and math.isfinite(norm)):
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            return {"skipped": True, "suspects": self._suspects()}
        self.skipped_in_a_row = 0
        median = statistics.median(self.norms) if len(self.norms) >= SPIKE_LEAST else math.inf
        self.norms.append(norm)
        return {"spike": True, "suspects": self._suspects()} if norm > SPIKE * median else {}

    def _suspects(self) -> list[str]:
        """File and record of the samples of this step whose loss is no finite number, of all samples if there is none such."""
        names = [self.where(position) for position in self._share.positions.tolist()]
        flags = zip(names, self._share.not_finite(), strict=True)
        return self.parallel.gather([name for name, bad in flags if bad]) or self.parallel.gather(names)

    def _of_this_rank(self, value: float) -> Tensor:
        values = torch.zeros(self.parallel.world, dtype=torch.float64)
        values[self.parallel.rank] = value
        return values

    def _summed(self, values: dict[str, Tensor]) -> dict[str, list[float]]:
        """Sums vectors over the ranks, all in one reduction."""
        packed = torch.cat([value.double().to(self.parallel.device) for value in values.values()])
        parts = self.parallel.sum(packed).cpu().split([len(value) for value in values.values()])
        return {name: part.tolist() for name, part in zip(values, parts, strict=True)}

    def _see_losses(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if torch.is_grad_enabled() and getattr(output, "row_losses", None) is not None:
            self._share.row_losses.append(output.row_losses)

    def _see_gates(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Adds the entropies of the weights over routed experts, nats, of each picture and block, and their number."""
        if not torch.is_grad_enabled() or not isinstance(output, tuple):
            return
        for gate_BE in output[1]:
            total_B = gate_BE.sum(1)
            share_BE = gate_BE / total_B.clamp_min(torch.finfo(gate_BE.dtype).tiny)[:, None]
            entropy_B = -torch.special.xlogy(share_BE, share_BE).sum(1)
            self._share.gates += torch.stack([entropy_B.sum(), (total_B > 0).sum()])


@dataclass
class _Share:
    """The samples of a step that one rank computes, in the order of its micro-batches.

    Attributes:
        positions, sources, answers: as `MicroBatch` has them, of all micro-batches.
        row_losses: of each micro-batch that was computed, the summed loss of its samples.
        gates: entropies of the gates' weights, summed, and their number.
    """

    positions: Tensor
    sources: Tensor
    answers: Tensor
    gates: Tensor
    row_losses: list[Tensor] = field(default_factory=list)

    def _losses(self) -> Tensor | None:
        """The summed loss of each sample (B,), float64 on the CPU; None for the light router, which gives none."""
        if sum(map(len, self.row_losses)) != len(self.positions):
            return None
        return torch.cat(self.row_losses).double().cpu()

    def by_source(self, number: int, loss: float) -> tuple[Tensor, Tensor]:
        """Of each of `number` sources the summed loss and the answers of its samples, float64.

        Args:
            loss: mean of the step, which stands for every sample's where samples have none of their own.
        """
        losses, answers = torch.zeros(2, number, dtype=torch.float64)
        of_rows = self._losses()
        answers.index_add_(0, self.sources, self.answers.double())
        losses.index_add_(0, self.sources, self.answers.double() * loss if of_rows is None else of_rows)
        return losses, answers

    def not_finite(self) -> list[bool]:
        """Whether the loss of each sample is no finite number."""
        losses = self._losses()
        return [False] * len(self.positions) if losses is None else (~losses.isfinite()).tolist()

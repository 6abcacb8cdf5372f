"""A router without an LLM pass: one probability per expert from the question's feature and the image's mean base feature.

Legend: B questions, T text width, C base width, E experts of the pool.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from mova_core.routing.prompt import MAX_EXPERTS


class FrozenFeatureNorm(nn.BatchNorm1d):
    """Centres and scales each channel of (B, C) by the mean and variance of all batches seen in training.

    Frozen features have a large mean in common; without it the variation that the MLP needs is a small part of them.
    Unlike BatchNorm1d, training normalises by these running statistics, not by the batch's, so that training and
    inference see the same inputs.
    """

    def __init__(self, width: int):
        super().__init__(width, momentum=None, affine=False)  # momentum None: the plain mean over all batches

    def forward(self, input: Tensor) -> Tensor:
        """Features (B, C) to features (B, C) in their dtype; in training B must be over 1."""
        if self.training:
            with torch.no_grad():
                super().forward(input)  # only for its side effect: it updates the running statistics
        return F.batch_norm(input, self.running_mean, self.running_var, eps=self.eps)


class LightRouter(nn.Module):
    """An MLP on frozen features that the answer pass computes anyway, so that routing costs next to nothing.

    The MLP knows its pool by position, not by description. A classifier trained on 2K samples scores 0 % on experts that
    it never saw, the LLM router, which reads descriptions, 92.5 % (paper Table 10); trained on all 1.6M labels the
    classifier still routes worse than the LLM trained on 2K (Table 14). Use it where latency counts and the pool is fixed.

    Args:
        text_width, base_width: T and C.
        experts: E.
        hidden: width of the hidden layer.
    """

    def __init__(self, text_width: int, base_width: int, experts: int, hidden: int = 512):
        super().__init__()
        self.norms = nn.ModuleList(FrozenFeatureNorm(width) for width in (text_width, base_width))
        self.hidden = nn.Linear(text_width + base_width, hidden)
        self.out = nn.Linear(hidden, experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A fresh router gives every expert the probability 0.5."""
        init.zeros_(self.out.weight)
        init.zeros_(self.out.bias)

    def forward(self, text_BT: Tensor, base_BC: Tensor) -> Tensor:
        """Logits (B, E) in float32 from `MoVAdapter.encode_text` and the mean over base tokens; in training B is over 1."""
        dtype = self.out.weight.dtype
        parts = [norm(part.to(dtype)) for norm, part in zip(self.norms, (text_BT, base_BC), strict=True)]
        return self.out(F.gelu(self.hidden(torch.cat(parts, dim=1)))).float()

    def loss(self, text_BT: Tensor, base_BC: Tensor, routing_BE: Tensor) -> Tensor:
        """Mean binary cross entropy with the routing labels, bool (B, E) in pool order."""
        return F.binary_cross_entropy_with_logits(self(text_BT, base_BC), routing_BE.float())

    @staticmethod
    def choose(logits_E: Tensor, max_experts: int = MAX_EXPERTS) -> list[tuple[int, float]]:
        """(position in the pool, probability) of the experts with a probability over 0.5, highest first, at most `max_experts`."""
        ranked: Sequence[tuple[int, float]] = list(enumerate(logits_E.sigmoid().tolist()))
        useful = [(expert, probability) for expert, probability in ranked if probability > 0.5]
        return sorted(useful, key=lambda pair: -pair[1])[:max_experts]

"""A router without an LLM pass: the question's feature and the picture's mean base feature to one probability per expert.

Legend: B questions, T text width, C base width, E experts of the pool.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from mova_core.routing.prompt import MAX_EXPERTS


class Standardise(nn.BatchNorm1d):
    """Mean 0 and variance 1 per channel (B, C) by all that was seen in training, batches of over one.

    Frozen features are mostly what all of them share; what tells them apart shows against their mean. Unlike in a plain
    batch norm, training reads the same numbers that inference will.
    """

    def __init__(self, width: int):
        super().__init__(width, momentum=None, affine=False)  # momentum None: the mean over all batches

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                super().forward(input)  # takes note
        return F.batch_norm(input, self.running_mean, self.running_var, eps=self.eps)


class LightRouter(nn.Module):
    """An MLP on frozen features that the answer needs anyway, so that routing costs next to nothing.

    It knows the pool it was trained on by position, not by description: a classifier trained on 2K samples scores 0 % on
    experts it never saw, where the LLM router reads their descriptions and scores 92.5 % (paper Table 10), and trained on
    all 1.6M labels it still routes worse than the LLM on 2K (Table 14). Use it where latency counts and the pool is fixed.

    Args:
        text_width, base_width: T and C.
        experts: E.
        hidden: width of the layer between.
    """

    def __init__(self, text_width: int, base_width: int, experts: int, hidden: int = 512):
        super().__init__()
        self.norms = nn.ModuleList(Standardise(width) for width in (text_width, base_width))
        self.hidden = nn.Linear(text_width + base_width, hidden)
        self.out = nn.Linear(hidden, experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch does, but a fresh router says even odds for every expert."""
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
        """(expert, probability) of those more likely useful than not, likeliest first, at most `max_experts`."""
        ranked: Sequence[tuple[int, float]] = list(enumerate(logits_E.sigmoid().tolist()))
        return sorted((one for one in ranked if one[1] > 0.5), key=lambda one: -one[1])[:max_experts]

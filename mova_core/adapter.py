"""The MoV-Adapter (paper section 3.2): fuses features of routed experts into the base tokens, weighted by a gate.

Shapes: B images, R of them routed to one expert, L tokens of an expert on its native grid, N tokens of the base grid,
D width, C channels of an expert, E experts of the pool, T text width, H heads, K channels of a head.
Every parameter and buffer has its published name: a published adapter loads without its prefix `model.mm_projector.`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init  # like torch.nn.init, but skips weights that from_pretrained has loaded

from mova_core.experts.base import Features

BERT_LARGE = {  # bert-large-uncased, the published text encoder
    "vocab_size": 30522,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Sizes of a MoV-Adapter; the defaults are the published ones. `AdapterConfig(**config.to_dict())` equals `config`.

    Raises:
        ValueError: sizes do not fit each other; the message names them.
    """

    expert_channels: Mapping[str, int]  # expert -> channels in pool order; or (name, channels) pairs
    out_width: int  # hidden size of the LLM
    width: int = 1024  # channels of the base encoder
    grid: int = 48  # side of the base grid
    blocks: int = 3
    heads: int = 0  # of every attention; 0: one per 64 channels
    topk: int = 3  # most experts per image with a gate weight above zero
    text_encoder: Mapping[str, Any] = field(default_factory=lambda: dict(BERT_LARGE))  # fields of a BertConfig
    text_width: int = 1024  # hidden size of the text encoder
    freeze_text_encoder: bool = False
    added: int = 0  # number of experts at the end of the pool that `MoVAdapter.add_expert` added

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_channels", dict(self.expert_channels))
        object.__setattr__(self, "text_encoder", dict(self.text_encoder))
        object.__setattr__(self, "heads", self.heads or self.width // 64)
        if self.heads < 1 or self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"width {self.width} does not split into {self.heads} heads of a multiple of 4 channels")
        if self.text_encoder.get("hidden_size") != self.text_width:
            hidden = self.text_encoder.get("hidden_size")
            raise ValueError(f"text_width is {self.text_width} but the text encoder's hidden_size is {hidden}")
        if not 0 <= self.added < len(self.expert_channels):
            raise ValueError(f"{self.added} of {len(self.expert_channels)} experts added: the pool must start with one")
        for name in ("out_width", "grid", "blocks", "topk"):
            if getattr(self, name) < 1 + (name == "grid"):
                raise ValueError(f"{name} is {getattr(self, name)}, too small")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The pool is a list of pairs, because JSON with sorted keys loses the order of a mapping."""
        return dataclasses.asdict(self) | {"expert_channels": [list(pair) for pair in self.expert_channels.items()]}


def align(tokens_RLC: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Resizes tokens (R, H*W, C) of an (H, W) grid to (R, side*side, C): bilinear, no antialias, in float32 (Eq. 1).

    The result has the dtype of the tokens.
    """
    if grid == (side, side):
        return tokens_RLC
    plane_RCHW = tokens_RLC.float().unflatten(1, grid).permute(0, 3, 1, 2)
    plane_RCHW = F.interpolate(plane_RCHW, size=(side, side), mode="bilinear", align_corners=False)
    return plane_RCHW.permute(0, 2, 3, 1).flatten(1, 2).to(tokens_RLC.dtype)


class Rope2D(nn.Module):
    """Rotary positions on a square grid: the first half of a head rotates with the row, the second with the column.

    The tables are buffers of the checkpoint: a bf16 checkpoint was trained with tables rounded to bf16 and needs these.
    """

    freqs_cos: Tensor  # (N, K)
    freqs_sin: Tensor  # (N, K)

    def __init__(self, channels: int, grid: int):
        super().__init__()
        self.grid = grid
        self.register_buffer("freqs_cos", torch.empty(grid * grid, channels))
        self.register_buffer("freqs_sin", torch.empty(grid * grid, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        half = self.freqs_cos.shape[1] // 2
        place = torch.arange(self.grid, dtype=torch.float32)
        speed = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
        turn = torch.outer(place, speed).repeat_interleave(2, dim=1)  # two neighbouring channels form a pair
        angle_NK = torch.cat((turn.repeat_interleave(self.grid, dim=0), turn.repeat(self.grid, 1)), dim=1)
        init.copy_(self.freqs_cos, angle_NK.cos())
        init.copy_(self.freqs_sin, angle_NK.sin())

    def forward(self, x_RNHK: Tensor) -> Tensor:
        """Rotates queries or keys (R, N, H, K), N the whole grid; computes in float32 or wider, keeps the dtype."""
        dtype = torch.promote_types(x_RNHK.dtype, torch.float32)  # torch has no complex bf16
        turn_NK = torch.complex(self.freqs_cos[:, ::2].to(dtype), self.freqs_sin[:, ::2].to(dtype))
        pairs = torch.view_as_complex(x_RNHK.to(dtype).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn_NK[:, None]).flatten(-2).to(x_RNHK.dtype)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero, so that a residual branch starts with no effect, and the gate uniform."""

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class Attention(nn.Module):
    """Self-attention with rotary positions and a norm before the output projection (sub-LN)."""

    def __init__(self, width: int, source_width: int, heads: int, grid: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(source_width, width, bias=False)
        self.v_proj = nn.Linear(source_width, width, bias=False)
        self.rope = Rope2D(width // heads, grid)
        self.inner_attn_ln = nn.LayerNorm(width)
        self.proj = ZeroLinear(width, width)

    def attend(self, q_RND: Tensor, k_RND: Tensor, v_RND: Tensor) -> Tensor:
        """Attention over projected queries, keys and values (R, N, D), all on the base grid -> (R, N, D), same dtype."""
        q_RNHK, k_RNHK, v_RNHK = (t.unflatten(-1, (self.heads, -1)) for t in (q_RND, k_RND, v_RND))
        qkv_RHNK = (t.transpose(1, 2) for t in (self.rope(q_RNHK), self.rope(k_RNHK), v_RNHK))
        y_RHNK = F.scaled_dot_product_attention(*qkv_RHNK)
        return self.proj(self.inner_attn_ln(y_RHNK.transpose(1, 2).flatten(2)))

    def forward(self, x_RND: Tensor) -> Tensor:
        """Self-attention of the tokens of the base grid: (R, N, D) -> (R, N, D)."""
        return self.attend(self.q_proj(x_RND), self.k_proj(x_RND), self.v_proj(x_RND))


def normalize(x: Tensor) -> Tensor:
    """LayerNorm over the last axis without scale and shift, in float32 or wider."""
    return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[-1:])


def project(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """`linear(norm(.))` of a tensor that `normalize` returned.

    The norm's scale and shift are folded into the weight. So autograd keeps one normalised copy of the base tokens for all
    experts of a block, and one of an expert's tokens for all blocks. Frozen features need no gradient, which saves a third
    of the work for their keys and values.
    """
    dtype = linear.weight.dtype
    if torch.finfo(dtype).bits < 32:  # the scaled weight would be rounded a second time
        return linear(torch.addcmul(norm.bias, x, norm.weight).to(dtype))
    return F.linear(x, linear.weight * norm.weight, linear.weight @ norm.bias)


class ExpertKnowledgeExtractor(Attention):
    """Cross-attention of one block to one expert: base tokens are the queries, aligned tokens keys and values (Eq. 2)."""

    def forward(  # type: ignore[override]
        self, x_RND: Tensor, tokens_RNC: Tensor, norm_x: nn.LayerNorm, norm_tokens: nn.LayerNorm
    ) -> Tensor:
        """Attends from base tokens (R, N, D) to an expert's aligned tokens (R, N, C) -> (R, N, D).

        Both arguments are results of `normalize`; `project` applies the scale and shift of their norms.
        """
        q_RND = project(x_RND, norm_x, self.q_proj)
        return self.attend(q_RND, *(project(tokens_RNC, norm_tokens, proj) for proj in (self.k_proj, self.v_proj)))


class DynamicGatingNetwork(nn.Sequential):
    """The weight of each routed expert, from the question's feature and the mean of the image's tokens (Eq. 3).

    Weights are a softmax over the routed experts; the `topk` largest are kept and renormalised. The last `added` experts
    joined a trained pool: each has a sigmoid instead, so that it takes no weight from the others.
    """

    def __init__(self, width: int, text_width: int, experts: int, topk: int, added: int = 0):
        super().__init__(nn.Linear(text_width + width, width), nn.GELU(), ZeroLinear(width, experts))
        self.topk = topk
        self.added = added

    def add_expert(self) -> None:
        """Adds a row of zero logits; existing rows keep their values."""
        old = cast(ZeroLinear, self[2])
        new = ZeroLinear(old.in_features, old.out_features + 1).to(old.weight)
        with torch.no_grad():
            new.weight[:-1] = old.weight
            new.bias[:-1] = old.bias
        self[2] = new.requires_grad_(old.weight.requires_grad)
        self.added += 1

    def forward(self, x_BND: Tensor, text_BT: Tensor, routing_BE: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, D), text features (B, T) and bool routing (B, E) -> gate weights (B, E) in float32.

        The weight of an expert that is not routed is zero.
        """
        logit_BE = super().forward(torch.cat((text_BT, x_BND.mean(1)), dim=1)).float()
        first = logit_BE.shape[1] - self.added
        chosen = routing_BE[:, :first]
        weight = logit_BE[:, :first].masked_fill(~chosen, torch.finfo(torch.float32).min).softmax(1)
        kept = torch.zeros_like(chosen).scatter_(1, weight.topk(min(self.topk, first), dim=1).indices, True)
        weight = weight * (kept & chosen)
        weight = weight / weight.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)  # none routed: all 0
        return torch.cat((weight, logit_BE[:, first:].sigmoid() * routing_BE[:, first:]), dim=1)


class SwiGLU(nn.Module):
    """Gated MLP with a norm before the output projection (sub-LN)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(width * 8 / 3)
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden)
        self.w3 = ZeroLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP over the base tokens."""

    def __init__(self, width: int, heads: int, grid: int):
        super().__init__()
        self.norm3 = nn.LayerNorm(width)
        self.self_attn = Attention(width, width, heads, grid)
        self.norm4 = nn.LayerNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), same dtype."""
        x_BND = x_BND + self.self_attn(self.norm3(x_BND))
        return x_BND + self.mlp(self.norm4(x_BND))


class Routed(NamedTuple):
    """The aligned and normalised tokens of one expert, for the images that are routed to this expert."""

    expert: int  # index in the pool
    rows_R: Tensor  # positions of these images in the batch
    tokens_RNC: Tensor


class MoVAdapterBlock(TransformerBlock):
    """Expert knowledge extractors weighted by the gate, then the transformer block."""

    def __init__(self, config: AdapterConfig):
        super().__init__(config.width, config.heads, config.grid)
        self.cross_attn = nn.ModuleList()
        self.norm1 = nn.ModuleList()
        self.norm2 = nn.ModuleList()
        for channels in config.expert_channels.values():
            self._append(channels)
        experts = len(config.expert_channels)
        self.gate = DynamicGatingNetwork(config.width, config.text_width, experts, config.topk, config.added)

    def _append(self, channels: int) -> None:
        attention, like = self.self_attn, self.norm3.weight
        extractor = ExpertKnowledgeExtractor(len(like), channels, attention.heads, attention.rope.grid)
        self.cross_attn.append(extractor.to(like))
        self.norm1.append(nn.LayerNorm(len(like)).to(like))
        self.norm2.append(nn.LayerNorm(channels).to(like))

    def add_expert(self, channels: int) -> None:
        self._append(channels)
        self.gate.add_expert()

    def forward(  # type: ignore[override]
        self, x_BND: Tensor, text_BT: Tensor, routing_BE: Tensor, routed: Sequence[Routed]
    ) -> tuple[Tensor, Tensor]:
        """Returns the next tokens (B, N, D) and the gate weights (B, E) in float32."""
        gate_BE = self.gate(x_BND, text_BT, routing_BE)
        normed_BND, learned_BND = normalize(x_BND), torch.zeros_like(x_BND)
        for expert, rows_R, tokens_RNC in routed:
            x_RND = normed_BND if len(rows_R) == len(x_BND) else normed_BND.index_select(0, rows_R)
            y_RND = self.cross_attn[expert](x_RND, tokens_RNC, self.norm1[expert], self.norm2[expert])
            y_RND = y_RND * gate_BE[rows_R, expert, None, None].to(x_BND.dtype)
            learned_BND.index_add_(0, rows_R, y_RND)
        return super().forward(x_BND + learned_BND), gate_BE


class TextEncoder(nn.Module):
    """BERT; the question's feature is the [CLS] token of the last layer."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        from transformers import BertConfig, BertModel  # takes 3 s to import, so only when built

        self.bert = BertModel(BertConfig.from_dict(dict(config)), add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids and mask (B, length) int64 -> [CLS] feature (B, T).

        Raises:
            ValueError: there are more tokens than the encoder has positions.
        """
        limit = self.bert.config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise ValueError(f"the gate's text has {input_ids.shape[1]} tokens, its encoder reads {limit}: truncate it")
        return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]


class MoVAdapter(nn.Module):
    """Fuses base tokens and features of the routed experts into visual tokens for the LLM.

    Alignment and cross-attention of an expert run only for the images routed to it. In training an expert without a routed
    image runs on zero images, so that each of its parameters, the gate's and the text encoder's has a gradient (of zeros) on
    every rank. FSDP2 and ZeRO-2 reduce gradients by their order, not by name: where two ranks lack the gradients of different
    experts of equal width, they would add one expert's to the other's without an error
    (https://github.com/pytorch/pytorch/issues/158719).

    Attributes:
        gradient_checkpointing: recompute the blocks in the backward pass; transformers' `gradient_checkpointing_enable`
            sets it.
    """

    def __init__(self, config: AdapterConfig):
        super().__init__()
        from timm.layers import LayerNormAct2d  # takes 0.5 s to import, so only when built
        from timm.models.regnet import RegStage

        self.config = config
        self.gradient_checkpointing = False
        self.text_encoder = TextEncoder(config.text_encoder)
        self.text_encoder.requires_grad_(not config.freeze_text_encoder)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, config.width))
        self.blocks = nn.ModuleList(MoVAdapterBlock(config) for _ in range(config.blocks))
        stage = partial(RegStage, stride=1, dilation=1, linear_out=True, act_layer=nn.SiLU, norm_layer=LayerNormAct2d)
        before, after = (stage(1, config.width, config.width) for _ in range(2))
        self.downsample = nn.Sequential(before, nn.AdaptiveAvgPool2d(config.grid // 2), after)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.out_width), nn.GELU(), nn.Linear(config.out_width, config.out_width)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.zeros_(self.pos_embed)
        for name, parameter in self.downsample.named_parameters():
            if name.endswith("conv3.bn.weight"):  # a residual block starts as the identity
                init.zeros_(parameter)

    def train(self, mode: bool = True) -> "MoVAdapter":
        super().train(mode)
        if self.config.freeze_text_encoder:
            self.text_encoder.eval()  # frozen, so dropout would only add noise
        return self

    def add_expert(self, name: str, channels: int) -> None:
        """Adds an expert to the pool, last in routing order. Call this before the optimizer is created.

        The new cross-attentions start with zero output, and the new gate takes no weight from the other experts. So until
        the new parameters are trained, outputs do not change, whether or not an image is routed to the new expert.

        Raises:
            ValueError: the pool has an expert of this name.
        """
        pool = self.config.expert_channels
        if name in pool:
            raise ValueError(f"the pool has an expert {name} already")
        self.config = dataclasses.replace(
            self.config, expert_channels={**pool, name: channels}, added=self.config.added + 1
        )
        for block in self.blocks:
            cast(MoVAdapterBlock, block).add_expert(channels)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The question's feature (B, T) for the gate, from BERT token ids and mask (B, length) int64.

        Raises:
            ValueError: there are more tokens than the text encoder has positions.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_text_encoder):
            return self.text_encoder(input_ids, attention_mask)

    def forward(
        self,
        base: Tensor,
        experts: Mapping[str, Features],
        routing: Tensor,
        text: Mapping[str, Tensor] | Tensor,
        return_gates: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Fuses the routed experts into the base tokens.

        Args:
            base: (B, N, D) tokens of the base encoder, row-major on the base grid.
            experts: features by expert on their native grids, of any dtype and device. Tokens are (B, L, C), or
                (R, L, C) of only the images routed to the expert, in batch order. An expert to which no image is routed
                may be left out.
            routing: bool (B, E) in pool order.
            text: `input_ids` and `attention_mask` for the text encoder, or features (B, T) from `encode_text`. A single
                row stands for the whole batch.
            return_gates: also return the gate weights (B, E) of every block, float32 and detached.

        Returns:
            visual tokens (B, N/4, out_width) in the adapter's dtype.

        Raises:
            ValueError: a shape does not fit, or features of a routed expert are missing; the message names them.
        """
        config = self.config
        if base.shape[1:] != (config.grid**2, config.width):
            raise ValueError(f"base is {tuple(base.shape)}, the adapter takes (B, {config.grid**2}, {config.width})")
        base_BND = base.to(self.pos_embed.dtype)
        routed = self._route(experts, routing, base_BND)
        text_BT = self.encode_text(text["input_ids"], text.get("attention_mask")) if isinstance(text, Mapping) else text
        if text_BT.ndim != 2 or text_BT.shape[0] not in (1, len(base)) or text_BT.shape[1] != config.text_width:
            raise ValueError(f"text is {tuple(text_BT.shape)}, the gate takes ({len(base)} or 1, {config.text_width})")
        text_BT = text_BT.to(base_BND.dtype).expand(len(base), -1)

        x_BND = base_BND + self.pos_embed
        gates = []
        for block in self.blocks:
            inputs = (x_BND, text_BT, routing, routed)
            recompute = self.gradient_checkpointing and self.training
            x_BND, gate_BE = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            gates.append(gate_BE.detach())
        x_BND = (x_BND + base_BND) / 2
        plane_BDHW = x_BND.unflatten(1, (config.grid, config.grid)).permute(0, 3, 1, 2)
        out = self.mlp(self.downsample(plane_BDHW).flatten(2).transpose(1, 2))
        return (out, gates) if return_gates else out

    def _route(self, experts: Mapping[str, Features], routing: Tensor, base_BND: Tensor) -> list[Routed]:
        """Validates features and routing; aligns and normalises the features of each routed expert.

        In training the list has every expert of the pool, those without a routed image with zero rows.
        """
        batch, pool, side = len(base_BND), self.config.expert_channels, self.config.grid
        if routing.shape != (batch, len(pool)) or routing.dtype != torch.bool:
            takes = f"torch.bool ({batch}, {len(pool)}): pictures x {', '.join(pool)}"
            raise ValueError(f"routing is {routing.dtype} {tuple(routing.shape)}, the adapter takes {takes}")
        if unknown := sorted(set(experts) - set(pool)):
            raise ValueError(f"features of {', '.join(unknown)}, which the pool ({', '.join(pool)}) does not have")
        routed = []
        for index, (mask_B, (name, channels)) in enumerate(zip(routing.cpu().unbind(1), pool.items(), strict=True)):
            rows_R = mask_B.nonzero().squeeze(1)
            if not len(rows_R) and self.training:
                no_tokens = base_BND.new_zeros(0, side**2, channels)
                routed.append(Routed(index, rows_R.to(base_BND.device), no_tokens))
            if name not in experts:
                if len(rows_R):
                    raise ValueError(f"pictures {rows_R.tolist()} are routed to {name}, but its features are missing")
                continue
            tokens, grid = experts[name]
            shape = (len(tokens), grid[0] * grid[1], channels)
            if tokens.shape != shape:
                asked = f"a {grid[0]}x{grid[1]} grid of {channels} channels is {shape}"
                raise ValueError(f"{name}: tokens are {tuple(tokens.shape)}, but {asked}")
            if len(tokens) not in (len(rows_R), batch):
                asked = f"{len(rows_R)} of {batch} pictures are routed to it"
                raise ValueError(f"{name}: {len(tokens)} rows of features, but {asked}")
            if len(rows_R):
                if len(tokens) != len(rows_R):
                    tokens = tokens.index_select(0, rows_R.to(tokens.device))
                tokens_RNC = normalize(align(tokens.to(base_BND), grid, side))
                routed.append(Routed(index, rows_R.to(base_BND.device), tokens_RNC))
        return routed

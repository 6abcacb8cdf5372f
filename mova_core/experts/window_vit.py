"""The windowed vision transformer: the parts that SAM, Vary and Co-DETR share, and the image encoder of SAM and Vary.

Most blocks attend inside square windows, a few over the whole map. SAM adds two learned terms to each attention score:
one for the distance in rows, one for the distance in columns (decomposed relative positions). Sources: Li et al. 2022, "Exploring Plain Vision Transformer
Backbones for Object Detection" (arXiv 2203.16527); Kirillov et al. 2023, "Segment Anything" (arXiv 2304.02643).

Shapes: B images, H x W patches, S side of an attended square (a window, or the whole map), T = S*S its tokens,
G squares in all, D width, A heads, K = D/A head width, R = 2*S terms of rows and columns, C channels. Maps are
channels-last up to the convolutions of the neck.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mova_core.experts.base import Features, VisionExpert
from mova_core.experts.weight_shapes import WeightShapes
from mova_core.images import ImageSource, PreprocessingMode, clip_pixels

NORM_EPS = 1e-6


def check_arch(arch: Mapping[str, Any]) -> None:
    """Checks that an image is a whole number of patches.

    Raises:
        ValueError: image_size is not a multiple of patch_size.
    """
    if arch["image_size"] % arch["patch_size"]:
        raise ValueError(f"image_size {arch['image_size']} is not a multiple of patch_size {arch['patch_size']}")


class PatchEmbed(nn.Module):
    """Square patches to vectors: (B, 3, h, w) -> (B, H, W, D)."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels_B3hw: Tensor) -> Tensor:
        return self.proj(pixels_B3hw).permute(0, 2, 3, 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W). No copy where the memory format is channels-last, as in a neck."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def neck(width: int, channels: int, activation: bool = False) -> nn.Sequential:
    """ViTDet's neck, (B, D, H, W) -> (B, C, H, W): a 1x1 and a 3x3 convolution, each with a norm."""
    return nn.Sequential(
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        ChannelNorm(channels, eps=NORM_EPS),
        *([nn.GELU()] if activation else []),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        ChannelNorm(channels, eps=NORM_EPS),
    )


def to_windows(x_BHWC: Tensor, side: int, padding_C: Tensor | None) -> Tensor:
    """(B, H, W, C) -> (G, S*S, C). A map that windows do not divide is padded on the right and below with `padding_C`.

    Attention sees padding as it sees any token, as in the published code, which pads with zero tokens before the
    projection. A zero token's projection is the bias, so padding the projected map with the bias (None: zero) gives the
    same numbers without projecting padding.
    """
    B, H, W, C = x_BHWC.shape
    rows, columns = -(-H // side), -(-W // side)
    if (rows * side, columns * side) != (H, W):
        if padding_C is None:
            x_BHWC = F.pad(x_BHWC, (0, 0, 0, columns * side - W, 0, rows * side - H))
        else:
            padded = padding_C.expand(B, rows * side, columns * side, C).clone()
            padded[:, :H, :W] = x_BHWC
            x_BHWC = padded
    return x_BHWC.view(B, rows, side, columns, side, C).transpose(2, 3).reshape(-1, side * side, C)


def from_windows(x_GATK: Tensor, side: int, H: int, W: int) -> Tensor:
    """Joins the outputs of all heads and windows, (G, A, S*S, K) -> (B, H, W, A*K), in one copy; removes padding."""
    rows, columns = -(-H // side), -(-W // side)
    _, A, _, K = x_GATK.shape
    x = x_GATK.view(-1, rows, columns, A, side, side, K).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(-1, rows * side, columns * side, A * K)[:, :H, :W]


class RelativeAttention(nn.Module):
    """Attention with decomposed relative positions over the S x S windows of a map, or over a whole S x S map.

    Two exact ways add the terms of rows and columns to the scores: `biased_attention` and `folded_attention`. Folding
    needs less memory traffic and more arithmetic, so it is the default on a GPU, where memory limits attention.
    """

    folded: bool | None = None  # None: only on a GPU

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x_BHWD: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        _, H, W, D = x_BHWD.shape
        S, A = self.side, self.heads
        qkv = to_windows(self.qkv(x_BHWD), S, self.qkv.bias)
        q_GATK, k_GATK, v_GATK = qkv.view(-1, S * S, 3, A, D // A).permute(2, 0, 3, 1, 4)
        # Entry y - y' + S - 1 of the table is the term of row y for row y': a sliding view of the table, mirrored.
        rows_SKS, columns_SKS = (table.unfold(0, S, 1).flip(-1) for table in (self.rel_pos_h, self.rel_pos_w))
        q_GASSK = q_GATK.unflatten(2, (S, S))
        rows_GASSS = torch.einsum("gayxk,ykz->gayxz", q_GASSK, rows_SKS)  # q is not scaled, as published
        columns_GASSS = torch.einsum("gayxk,xkz->gayxz", q_GASSK, columns_SKS)
        fold = x_BHWD.is_cuda if self.folded is None else self.folded
        attend = folded_attention if fold else biased_attention
        x_GATK = attend(q_GATK, k_GATK, v_GATK, rows_GASSS, columns_GASSS)
        return self.proj(from_windows(x_GATK, S, H, W))


def biased_attention(q_GATK: Tensor, k_GATK: Tensor, v_GATK: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Attention with the terms of rows and columns (G, A, S, S, S) summed to a bias: T*T numbers per head."""
    # Contiguous summands make the large sum contiguous: otherwise attention copies the T*T numbers.
    bias = rows.contiguous().unsqueeze(-1) + columns.contiguous().unsqueeze(-2)
    return F.scaled_dot_product_attention(q_GATK, k_GATK, v_GATK, attn_mask=bias.flatten(4).flatten(2, 3))


def folded_attention(q_GATK: Tensor, k_GATK: Tensor, v_GATK: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same scores without a bias: R terms are appended to each query, and one-hot row and column to each key.

    Flash kernels, which accept no bias, can then run: (K + R) / K of the arithmetic, and no T*T numbers in memory.
    """
    S, K = rows.shape[-1], q_GATK.shape[-1]
    scale = K**-0.5  # applies to all scores, so the terms are divided by it beforehand
    q = torch.cat((q_GATK, (rows / scale).flatten(2, 3), (columns / scale).flatten(2, 3)), dim=-1)
    one_SS = torch.eye(S, dtype=k_GATK.dtype, device=k_GATK.device)
    picks_SSR = torch.cat((one_SS[:, None].expand(S, S, S), one_SS.expand(S, S, S)), dim=-1)
    k = torch.cat((k_GATK, picks_SSR.flatten(0, 1).expand(*k_GATK.shape[:2], -1, -1)), dim=-1)
    v = F.pad(v_GATK, (0, 2 * S))  # flash kernels need queries, keys and values of one width
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :K]


class Block(nn.Module):
    """A pre-norm transformer block on a map (B, H, W, D)."""

    def __init__(self, width: int, heads: int, mlp_hidden: int, side: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = RelativeAttention(width, heads, side)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            OrderedDict(lin1=nn.Linear(width, mlp_hidden), act=nn.GELU(), lin2=nn.Linear(mlp_hidden, width))
        )

    def forward(self, x_BHWD: Tensor) -> Tensor:
        x_BHWD = x_BHWD + self.attn(self.norm1(x_BHWD))
        return x_BHWD + self.mlp(self.norm2(x_BHWD))


class WindowViT(VisionExpert):
    """SAM's image encoder as an expert, with the parameter names of segment-anything. Vary derives from it.

    The position table fixes the size of images to `image_size`. MoVA normalises them as for CLIP, not as for SAM.
    """

    preprocessing = "square-clip-bicubic-1"
    last_layer = "neck.0.weight"  # the first axis of this tensor is the number of channels

    def __init__(self, arch: Mapping[str, Any], neck_channels: int):
        super().__init__(arch)
        check_arch(arch)
        width = arch["width"]
        self.side = side = arch["image_size"] // arch["patch_size"]
        self.patch_embed = PatchEmbed(arch["patch_size"], width)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, width))
        self.blocks = nn.ModuleList()
        for index in range(arch["depth"]):
            reach = side if index in arch["global_blocks"] else arch["window_size"]
            self.blocks.append(Block(width, arch["heads"], arch["mlp_hidden"], reach))
        self.neck = neck(width, neck_channels)

    @property
    def grid(self) -> tuple[int, int]:
        return self.side, self.side

    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        """`pixel_values` (B, 3, image_size, image_size) float32: padded to a square, bicubic, normalised as CLIP's."""
        return {"pixel_values": clip_pixels(images, self.arch["image_size"], compat)}

    def encode(self, pixels_B3hw: Tensor) -> Tensor:
        """Pixels (B, 3, image_size, image_size) to the neck's map (B, C, H, W).

        Raises:
            ValueError: images of another size.
        """
        if pixels_B3hw.shape[-2:] != (self.arch["image_size"],) * 2:
            size = tuple(pixels_B3hw.shape[-2:])
            raise ValueError(f"{self.card.name} reads {self.arch['image_size']}-pixel squares, not {size}")
        x_BHWD = self.patch_embed(pixels_B3hw.to(self.pos_embed.dtype)) + self.pos_embed
        for block in self.blocks:
            x_BHWD = block(x_BHWD)
        return self.neck(x_BHWD.permute(0, 3, 1, 2))

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """`pixel_values` (B, 3, image_size, image_size) -> tokens (B, H*W, C)."""
        return Features(self.encode(batch["pixel_values"]).flatten(2).transpose(1, 2), self.grid)

    @classmethod
    def arch_from_weights(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        shapes = WeightShapes(state_dict)
        # A table of relative positions over S rows has 2*S - 1 entries.
        tables = {block: f"blocks.{block}.attn.rel_pos_h" for block in shapes.blocks("blocks")}

        def is_global(block: int) -> bool:
            return shapes.size(tables[block]) == 2 * shapes.size("pos_embed", 1) - 1

        return shapes.arch(
            cls.card,
            width=lambda _: shapes.size("pos_embed", 3),
            depth=lambda _: shapes.depth("blocks"),
            heads=lambda arch: arch["width"] // shapes.size("blocks.0.attn.rel_pos_h", 1),
            mlp_hidden=lambda _: shapes.size("blocks.0.mlp.lin1.weight"),
            patch_size=lambda _: shapes.size("patch_embed.proj.weight", 2),
            image_size=lambda arch: shapes.size("pos_embed", 1) * arch["patch_size"],
            window_size=lambda _: (min(map(shapes.size, tables.values())) + 1) // 2,
            global_blocks=lambda _: tuple(filter(is_global, tables)),
            channels=lambda _: shapes.size(cls.last_layer),
        )

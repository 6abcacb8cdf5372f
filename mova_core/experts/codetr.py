"""Co-DETR's backbone (ViT-L, EVA-02 style) with one level of its feature pyramid: objects and where they are; expert C.

Zong et al. 2023, "DETRs with Collaborative Hybrid Assignments Training" (arXiv 2211.12860). MoVA gives this network the
image at Vary's size, normalised as for CLIP and enlarged 1024 -> 1280 by repeating pixels, and shrinks its 80x80 map to
37x37.

Shapes: B images, H x W patches, S side of an attended square, T = S*S its tokens, G squares in all, D width, A heads,
K = D/A head width, P = K/2 pairs in it, C channels.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mova_core.experts.base import ExpertCard, Features, VisionExpert
from mova_core.experts.registry import register
from mova_core.experts.weight_shapes import WeightShapes, resize_positions
from mova_core.experts.window_vit import NORM_EPS, PatchEmbed, check_arch, from_windows, neck, to_windows
from mova_core.images import ImageSource, PreprocessingMode, clip_pixels

ROTARY_SPAN = 16  # positions that a square of any side spans: the side of the grid in EVA-02's pretraining
DETECTOR = ("neck.", "query_head.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")


class Rotary(nn.Module):
    """Rotary position embeddings on a square: half of the channel pairs rotate with the row, half with the column."""

    freqs_cos: Tensor  # (T, K); every angle stands twice, as in published checkpoints
    freqs_sin: Tensor

    def __init__(self, head_width: int, side: int):
        super().__init__()
        half = head_width // 2
        speed = 1.0 / (10000 ** (torch.arange(0, half, 2).float() / half))
        turn = (torch.arange(side) / side * ROTARY_SPAN)[:, None] * speed
        angle = torch.cat((turn[:, None].expand(side, side, -1), turn[None].expand(side, side, -1)), dim=-1)
        angle_TK = angle.flatten(0, 1).repeat_interleave(2, dim=-1)
        self.register_buffer("freqs_cos", angle_TK.cos())
        self.register_buffer("freqs_sin", angle_TK.sin())

    def turns(self) -> Tensor:
        """(T, 1, P) complex64: the rotation of each channel pair at each position."""
        return torch.complex(self.freqs_cos[:, ::2].float(), self.freqs_sin[:, ::2].float()).unsqueeze(1)


def turned(x_GTAK: Tensor, turns_T1P: Tensor) -> Tensor:
    """Rotates neighbouring channels (0, 1), (2, 3), ... of queries or keys; computes in float32, keeps the dtype."""
    pairs = x_GTAK.float().view(*x_GTAK.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():  # torch.compile fuses real arithmetic only
        (even, odd), cos, sin = pairs.unbind(-1), turns_T1P.real, turns_T1P.imag
        pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * turns_T1P)
    return pairs.flatten(-2).to(x_GTAK.dtype)


class RotaryAttention(nn.Module):
    """Attention with rotary positions over the S x S windows of a map, or over the whole map (`window` None)."""

    def __init__(self, width: int, heads: int, window: int | None):
        super().__init__()
        self.heads, self.window = heads, window
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BHWD: Tensor, turns_T1P: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        _, H, W, _ = x_BHWD.shape
        side = self.window or H
        x_GTD = to_windows(x_BHWD, side, None)
        heads = (*x_GTD.shape[:2], self.heads, -1)
        q, k, v = (linear(x_GTD).view(heads) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = turned(q, turns_T1P).transpose(1, 2), turned(k, turns_T1P).transpose(1, 2), v.transpose(1, 2)
        return self.proj(from_windows(F.scaled_dot_product_attention(q, k, v), side, H, W))


class SwiGLU(nn.Module):
    """EVA-02's gated feed-forward on (..., D), with a norm before the output projection."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Block(nn.Module):
    """A pre-norm transformer block on a map (B, H, W, D)."""

    def __init__(self, width: int, heads: int, mlp_hidden: int, window: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = RotaryAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = SwiGLU(width, mlp_hidden)

    def forward(self, x_BHWD: Tensor, turns_T1P: Tensor) -> Tensor:
        x_BHWD = x_BHWD + self.attn(self.norm1(x_BHWD), turns_T1P)
        return x_BHWD + self.mlp(self.norm2(x_BHWD))


@register
class CoDETR(VisionExpert):
    """1280 px -> 80x80 patches -> 37x37 tokens of 256 channels.

    `pos_grid` in its arch is the side of the trained position table.
    """

    preprocessing = "square-clip-bicubic-1"
    card = ExpertCard(
        name="codetr",
        title="Co-DETR ViT-L",
        description="This model is a state-of-the-art object detector that can identify objects in images.",
        weights="zongzhuofan/co-detr-vit-large-coco",
        full=dict(
            width=1024,
            depth=24,
            heads=16,
            mlp_hidden=2730,
            patch_size=16,
            image_size=1280,
            window_size=16,
            global_blocks=(5, 11, 17, 23),
            channels=256,
            pos_grid=80,
        ),
        mini=dict(
            width=64,
            depth=2,
            heads=2,
            mlp_hidden=170,
            patch_size=16,
            image_size=160,
            window_size=4,
            global_blocks=(1,),
            channels=32,
            pos_grid=10,
        ),
    )

    def __init__(self, arch: Mapping[str, Any]):
        super().__init__(arch)
        check_arch(arch)
        width, heads = arch["width"], arch["heads"]
        if width // heads % 4:
            raise ValueError(
                f"width {width} over heads {heads} must be a multiple of 4: channel pairs rotate with row or column"
            )
        self.side = arch["image_size"] // arch["patch_size"]
        self.patch_embed = PatchEmbed(arch["patch_size"], width)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, 1 + arch["pos_grid"] ** 2, width)
        )  # the first row is an unused class token's
        self.rope_win = Rotary(width // heads, arch["window_size"])
        self.rope_glb = Rotary(width // heads, self.side)
        self.blocks = nn.ModuleList(
            Block(width, heads, arch["mlp_hidden"], None if index in arch["global_blocks"] else arch["window_size"])
            for index in range(arch["depth"])
        )
        self.out_norm = nn.LayerNorm(width, eps=1e-5)
        self.neck = neck(width, arch["channels"], activation=True)

    @property
    def grid(self) -> tuple[int, int]:
        side = round(self.side * 37 / 80)
        return side, side

    def preprocess(self, images: Sequence[ImageSource], compat: PreprocessingMode = "fixed") -> dict[str, Tensor]:
        """`pixel_values` (B, 3, h, h) float32 with h = 4/5 image_size: padded to a square, bicubic, CLIP's normalisation."""
        return {"pixel_values": clip_pixels(images, self.arch["image_size"] * 4 // 5, compat)}

    def forward(self, batch: Mapping[str, Tensor]) -> Features:
        """`pixel_values` (B, 3, h, w) -> tokens (B, H*W, C). Images of any size are scaled to image_size first."""
        dtype = self.pos_embed.dtype
        pixels = F.interpolate(batch["pixel_values"].to(dtype), size=(self.arch["image_size"],) * 2, mode="nearest")
        x_BHWD = self.patch_embed(pixels) + self._positions()
        window_turns, global_turns = self.rope_win.turns(), self.rope_glb.turns()
        for index, block in enumerate(self.blocks):
            x_BHWD = block(x_BHWD, global_turns if index in self.arch["global_blocks"] else window_turns)
        map_BCHW = self.neck(self.out_norm(x_BHWD).permute(0, 3, 1, 2))
        small = F.interpolate(map_BCHW.float(), size=self.grid, mode="bilinear", align_corners=False)
        return Features(small.to(dtype).flatten(2).transpose(1, 2), self.grid)

    def _positions(self) -> Tensor:
        size = (self.side, self.side)
        return resize_positions(self.pos_embed[:, 1:], size).unflatten(1, size)

    @classmethod
    def arch_from_weights(cls, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        shapes = WeightShapes(state_dict)
        blocks = shapes.blocks("blocks")

        def is_global(block: int) -> bool:
            return shapes.size(f"blocks.{block}.attn.rope.freqs_cos") == shapes.size("rope_glb.freqs_cos")

        return shapes.arch(
            cls.card,
            width=lambda _: shapes.size("pos_embed", 2),
            depth=lambda _: shapes.depth("blocks"),
            heads=lambda arch: arch["width"] // shapes.size("rope_win.freqs_cos", 1),
            mlp_hidden=lambda _: shapes.size("blocks.0.mlp.w1.weight"),
            patch_size=lambda _: shapes.size("patch_embed.proj.weight", 2),
            pos_grid=lambda _: shapes.side("pos_embed", 1),
            image_size=lambda arch: shapes.side("rope_glb.freqs_cos", others=0) * arch["patch_size"],
            window_size=lambda _: shapes.side("rope_win.freqs_cos", others=0),
            global_blocks=lambda _: tuple(filter(is_global, blocks)),
            channels=lambda _: shapes.size("neck.0.weight"),
        )

    @classmethod
    def from_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """From a Co-DETR ViT-L detector (.pth) or a published MoVA tower.

        A detector's position table and patch kernels are resized to this arch (bicubic, as its authors load them). The
        level of the feature pyramid at the scale of the patches (neck.p4) becomes the neck; the detector's heads are
        left out. Rotary tables are computed from the arch where they are missing; the blocks' copies are left out.
        """
        detector = any(name.startswith("backbone.") for name in state_dict)
        ours = {}
        for name, tensor in state_dict.items():
            if detector:
                if name.startswith("backbone.rope") or (name.startswith(DETECTOR) and not name.startswith("neck.p4.")):
                    continue
                name = name.removeprefix("backbone.").replace("neck.p4.", "neck.")
            if re.fullmatch(r"blocks\.\d+\.attn\.rope\.freqs_(cos|sin)", name):
                continue
            ours[re.sub(r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias", name)] = tensor
        if detector and (positions := ours.get("pos_embed")) is not None:
            ours["pos_embed"] = resize_positions(positions, (arch["pos_grid"],) * 2, others=1)
        if detector and (patches := ours.get("patch_embed.proj.weight")) is not None:
            size = (arch["patch_size"], arch["patch_size"])
            if patches.shape[-2:] != size:
                resized = F.interpolate(patches.float(), size=size, mode="bicubic", align_corners=False)
                ours["patch_embed.proj.weight"] = resized.to(patches.dtype)
        sides = {"rope_win": arch["window_size"], "rope_glb": arch["image_size"] // arch["patch_size"]}
        for name, side in sides.items():
            for key, table in Rotary(arch["width"] // arch["heads"], side).state_dict().items():
                ours.setdefault(f"{name}.{key}", table)
        return ours

    @classmethod
    def to_public(cls, state_dict: Mapping[str, Tensor], arch: Mapping[str, Any]) -> dict[str, Tensor]:
        """To the published tower's names, which hold a copy of the rotary tables in every block."""
        bias = re.compile(r"\.attn\.([qv])_proj\.bias$")
        public = {bias.sub(r".attn.\1_bias", name): tensor for name, tensor in state_dict.items()}
        for index in range(arch["depth"]):
            tables = "rope_glb" if index in arch["global_blocks"] else "rope_win"
            for key in ("freqs_cos", "freqs_sin"):
                if f"{tables}.{key}" in public:
                    public[f"blocks.{index}.attn.rope.{key}"] = public[f"{tables}.{key}"]
        return public

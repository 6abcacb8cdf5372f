"""Every vision expert beside the plain module that transformers or timm ship, on the same weights, in the same run.

The two and a large square matrix product take turns, so that a busy machine slows all three: ratios and shares are
medians over the rounds. With --threads 1 on a CPU it is CPU time that counts, else wall time. FLOPs are those of matrix products, attention and convolutions, two per multiply-add, as torch's
counter gives them for our module at batch 1 (norms, activations and softmax are not counted). The plain CLIP and DINOv2
are spared the last layer that MoVA does not read, as ours are; Co-DETR, which nobody ships, is written out here.

With --preprocess: pictures per second and core (CPU time, one thread) of each expert's pixels, beside the published path
(padded square, then the processors' arithmetic), with and without decoding the JPEG.
With --decoding: what of that is decoding, what experts that eat the same pixels would save by decoding once for all, and
both beside the forward pass: at size mini as measured here; at full by FLOPs, on an H100 at --tflops and here at the rate
of a matrix product on one thread.
"""

import argparse
import importlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.parts import parse_arguments
from mova_core.experts import BASE, EXPERTS, VisionExpert, expert_card, expert_class, load_expert
from mova_core.experts.cost import count_flops, example, shapes_of
from mova_core.experts.dinov2 import MEAN, STD
from mova_core.experts.window_vit import RelativeAttention
from mova_core.images import CLIP_MEAN, CLIP_STD, DecodedImage, ImageSource, load_image, mean_colour, pad_to_square

_GPU = ("--size", "full", "--dtype", "bfloat16")
PARTS = {  # of benchmarks/gpu.py; each takes a few minutes on one H100, most of them for drawing and copying weights
    "natural": (*_GPU, "--batch", "1", "8", "32", "--attention", "eager", "--experts", "clip", "dinov2", "biomedclip"),
    "windowed": (*_GPU, "--batch", "1", "8", "--attention", "eager", "--experts", "vary", "codetr", "sam"),
    "patches": (*_GPU, "--batch", "1", "8", "32", "--attention", "eager", "--experts", "pix2struct", "deplot"),
    "sdpa": (*_GPU, "--batch", "8", "--no-memory"),
    "compiled": (*_GPU, "--batch", "8", "--compile", "default", "--no-memory"),
    "cuda-graphs": (*_GPU, "--batch", "1", "--compile", "reduce-overhead", "--experts", "biomedclip", "deplot"),
    "positions": (*_GPU, "--batch", "8", "--experts", "sam", "vary", "--positions", "bias"),
}
QUICK = ("--size", "mini", "--batch", "1", "--dtype", "float32", "--repeat", "1", "--no-memory", "--compile", "no")

Batch = Mapping[str, Tensor]
POOL = (BASE, *EXPERTS)
PICTURES = ((640, 480), (1920, 1080), (1080, 1920))
ROPE = {True: "rope_win", False: "rope_glb"}


def plain(expert: VisionExpert, attention: str = "sdpa") -> Callable[[Batch], Tensor]:
    """The same network from transformers or timm with this expert's weights; tokens (B, N, C) of a batch."""
    parameter = next(expert.parameters())
    return _PLAIN[expert.card.name](expert, attention, lambda module: module.to(parameter).eval().requires_grad_(False))


def _plain_clip(expert: VisionExpert, attention: str, ready: Callable[[nn.Module], nn.Module]) -> Callable:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    module = ready(
        CLIPVisionModel(CLIPVisionConfig(**_config(expert, attention), intermediate_size=expert.arch["mlp_hidden"]))
    )
    module.load_state_dict(expert.state_dict(), strict=False)
    return lambda batch: module(batch["pixel_values"], output_hidden_states=True).hidden_states[-1][:, 1:]


def _plain_dinov2(expert: VisionExpert, attention: str, ready: Callable[[nn.Module], nn.Module]) -> Callable:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(**_config(expert, attention), use_swiglu_ffn=True)
    module, size = ready(Dinov2Model(config)), (expert.arch["image_size"],) * 2
    module.load_state_dict(expert.state_dict(), strict=False)

    def run(batch: Batch) -> Tensor:
        pixels = F.interpolate(batch["pixel_values"].float(), size=size, mode="bilinear", align_corners=False)
        return module(pixels.to(batch["pixel_values"].dtype), output_hidden_states=True).hidden_states[-1][:, 1:]

    return run


def _plain_pix2struct(expert: VisionExpert, attention: str, ready: Callable[[nn.Module], nn.Module]) -> Callable:
    from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

    arch = expert.arch
    config = Pix2StructVisionConfig(
        hidden_size=arch["width"],
        d_ff=arch["mlp_hidden"],
        d_kv=arch["width"] // arch["heads"],
        num_hidden_layers=arch["depth"],
        num_attention_heads=arch["heads"],
        patch_embed_hidden_size=3 * arch["patch_size"] ** 2,
        seq_len=len(expert.state_dict()["embeddings.row_embedder.weight"]),
        **dict[str, Any](attn_implementation=attention),
    )
    module = ready(Pix2StructVisionModel(config))
    module.load_state_dict(expert.state_dict())
    return lambda batch: module(batch["flattened_patches"]).last_hidden_state


def _plain_biomedclip(expert: VisionExpert, attention: str, ready: Callable[[nn.Module], nn.Module]) -> Callable:
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer

    arch = expert.arch
    set_fused_attn(attention == "sdpa")
    module = VisionTransformer(
        img_size=arch["image_size"],
        patch_size=arch["patch_size"],
        embed_dim=arch["width"],
        depth=arch["depth"],
        num_heads=arch["heads"],
        mlp_ratio=arch["mlp_hidden"] / arch["width"],
        num_classes=0,
        global_pool="",
    )
    set_fused_attn(True)
    trunk: Any = ready(module)
    trunk.load_state_dict(expert.get_submodule("trunk").state_dict())
    return lambda batch: trunk.forward_features(batch["pixel_values"])[:, 1:]


def _plain_sam(expert: VisionExpert, attention: str, ready: Callable[[nn.Module], nn.Module]) -> Callable:
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    from mova_core.experts.sam import SAM

    arch, ours = expert.arch, expert.state_dict()
    config = SamVisionConfig(
        hidden_size=arch["width"],
        num_hidden_layers=arch["depth"],
        num_attention_heads=arch["heads"],
        mlp_dim=arch["mlp_hidden"],
        image_size=arch["image_size"],
        patch_size=arch["patch_size"],
        window_size=arch["window_size"],
        global_attn_indexes=list(arch["global_blocks"]),
        output_channels=ours["neck.0.weight"].shape[0],
        **dict[str, Any](attn_implementation=attention),
    )
    module = ready(SamVisionEncoder(config))
    theirs: dict[str, Any] = {name: name for name in module.state_dict()}  # names in place of tensors: a renaming
    module.load_state_dict({str(name): ours[our] for our, name in SAM.from_public(theirs, arch).items()})

    def run(batch: Batch) -> Tensor:
        features_BCHW = module(batch["pixel_values"]).last_hidden_state
        if "net_2.weight" in ours:
            features_BCHW = F.conv2d(features_BCHW, ours["net_2.weight"], stride=2, padding=1)
        return features_BCHW.flatten(2).transpose(1, 2)

    return run


def _plain_codetr(expert: VisionExpert, attention: str, ready: Callable[[nn.Module], nn.Module]) -> Callable:
    weights, arch, grid = expert.state_dict(), expert.arch, expert.grid
    positions = expert._positions()  # type: ignore[operator]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def turned(x: Tensor, rope: str) -> Tensor:
        half_turn = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * weights[f"{rope}.freqs_cos"] + half_turn * weights[f"{rope}.freqs_sin"]

    def attend(x_GHWD: Tensor, name: str, rope: str) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.flatten(1, 2).unflatten(-1, (arch["heads"], -1)).transpose(1, 2)

        q, k, v = (heads(linear(x_GHWD, f"{name}.{one}_proj")) for one in "qkv")
        q, k = turned(q, rope), turned(k, rope)
        if attention == "sdpa":
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return linear(x.transpose(1, 2).reshape(x_GHWD.shape), f"{name}.proj")

    def windows(x_BHWD: Tensor, side: int) -> Tensor:
        B, H, W, D = x_BHWD.shape
        x = F.pad(x_BHWD, (0, 0, 0, -W % side, 0, -H % side))
        x = x.reshape(B, x.shape[1] // side, side, x.shape[2] // side, side, D)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, D)

    def joined(x_GSSD: Tensor, H: int, W: int) -> Tensor:
        side = x_GSSD.shape[1]
        rows, columns = -(-H // side), -(-W // side)
        x = x_GSSD.reshape(-1, rows, columns, side, side, x_GSSD.shape[-1]).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, rows * side, columns * side, x.shape[-1])[:, :H, :W]

    def run(batch: Batch) -> Tensor:
        pixels = F.interpolate(batch["pixel_values"], size=(arch["image_size"],) * 2, mode="nearest")
        projection, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
        x = F.conv2d(pixels, projection, bias, stride=arch["patch_size"]).permute(0, 2, 3, 1) + positions
        for index in range(arch["depth"]):
            block, windowed = f"blocks.{index}", index not in arch["global_blocks"]
            y, (_, H, W, _) = norm(x, f"{block}.norm1"), x.shape
            y = windows(y, arch["window_size"]) if windowed else y
            y = attend(y, f"{block}.attn", ROPE[windowed])
            x = x + (joined(y, H, W) if windowed else y)
            y = norm(x, f"{block}.norm2")
            y = F.silu(linear(y, f"{block}.mlp.w1")) * linear(y, f"{block}.mlp.w2")
            x = x + linear(norm(y, f"{block}.mlp.ffn_ln"), f"{block}.mlp.w3")
        x = F.conv2d(norm(x, "out_norm", 1e-5).permute(0, 3, 1, 2), weights["neck.0.weight"])
        x = F.gelu(norm(x.permute(0, 2, 3, 1), "neck.1")).permute(0, 3, 1, 2)
        x = F.conv2d(x, weights["neck.3.weight"], padding=1)
        x = norm(x.permute(0, 2, 3, 1), "neck.4").permute(0, 3, 1, 2)
        x = F.interpolate(x.float(), size=grid, mode="bilinear", align_corners=False).to(x.dtype)
        return x.flatten(2).transpose(1, 2)

    return run


_PLAIN: dict[str, Callable] = {
    "clip": _plain_clip,
    "dinov2": _plain_dinov2,
    "vary": _plain_sam,
    "codetr": _plain_codetr,
    "pix2struct": _plain_pix2struct,
    "deplot": _plain_pix2struct,
    "biomedclip": _plain_biomedclip,
    "sam": _plain_sam,
}


def _config(expert: VisionExpert, attention: str) -> dict[str, Any]:
    """What the configurations of CLIP and DINOv2 share; their last layer is spared."""
    return {
        "hidden_size": expert.arch["width"],
        "num_hidden_layers": expert.arch["depth"] - 1,
        "num_attention_heads": expert.arch["heads"],
        "image_size": expert.arch["image_size"],
        "patch_size": expert.arch["patch_size"],
        "attn_implementation": attention,
    }


def build(name: str, args: argparse.Namespace, dtype: str) -> VisionExpert:
    """The expert with random weights; with --depth its first layers, of windowed networks the last of them global."""
    card = expert_card(name)
    arch = {"depth": getattr(card, args.size)["depth"]}
    if args.depth:
        arch["depth"] = args.depth + (name in ("clip", "dinov2"))  # of which the last is not computed
        if "global_blocks" in getattr(card, args.size):
            arch["global_blocks"] = (args.depth - 1,)
    RelativeAttention.folded = {"auto": None, "bias": False, "folded": True}[args.positions]
    expert = load_expert(name, size=args.size, arch=arch, device=args.device, dtype=getattr(torch, dtype))
    if args.compile != "no":
        expert.compile(dynamic=False, mode=None if args.compile == "default" else args.compile)
    return expert


def inputs(expert: VisionExpert, batch: int) -> dict[str, Tensor]:
    """A batch of one noisy picture as the expert reads it, in its device and dtype."""
    parameter = next(expert.parameters())
    made = expert.preprocess([photograph(320, 240)])
    return {key: value.to(parameter).repeat(batch, *[1] * (value.ndim - 1)) for key, value in made.items()}


@torch.inference_mode()
def flops(expert: VisionExpert) -> int:
    """Of one picture; attention counted by its two matrix products, whichever kernel runs them."""
    positions = patch.object(RelativeAttention, "folded", False)  # folding is no work that was asked for
    with positions, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        expert.forward(inputs(expert, 1))
    return counter.get_total_flops()


def seconds(run: Callable[[], Any], device: str) -> float:
    """Of one call: the mean over as many calls as fill 0.03 s, on a GPU 0.2 s, so that none starts on a cold cache."""
    calls = 1
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    while True:
        start = clock()
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed = clock() - start
        if elapsed > (0.2 if device == "cuda" else 0.03):  # a GPU's clock rises and falls within tens of milliseconds
            return elapsed / calls
        calls *= 4


@torch.inference_mode()
def measure(name: str, dtype: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Per batch size: rates, ratio, share and the largest difference between the two modules."""
    expert = build(name, args, dtype)
    other = plain(expert, args.attention)
    per_image = flops(expert)
    # Smaller where a CPU has no units for half precision and takes many times as long.
    side = args.matrix or (8192 if args.device == "cuda" else 1024 if dtype == "float32" else 256)
    square = torch.randn(side, side, device=args.device).to(getattr(torch, dtype))
    for batch in args.batch:
        pixels = inputs(expert, batch)
        runs = {
            "ours": partial(expert, pixels),
            "plain": partial(other, pixels),
            "matrix": partial(F.linear, square, square),
        }
        ours, theirs = expert(pixels).tokens.float(), other(pixels).float()
        runs["matrix"]()
        rounds = []
        for turn in range(args.repeat):  # back and forth, as each leaves caches and clocks to the next
            order = list(runs) if turn % 2 == 0 else list(reversed(runs))
            rounds.append({case: seconds(runs[case], args.device) for case in order})
        ceiling = 2 * side**3
        yield {
            "expert": name,
            "dtype": dtype,
            "batch": batch,
            "gflop_per_image": per_image / 1e9,
            "images_per_s": statistics.median(batch / one["ours"] for one in rounds),
            "plain_images_per_s": statistics.median(batch / one["plain"] for one in rounds),
            "times_plain": statistics.median(one["plain"] / one["ours"] for one in rounds),
            "tflop_per_s": statistics.median(batch * per_image / one["ours"] for one in rounds) / 1e12,
            "matrix_tflop_per_s": statistics.median(ceiling / one["matrix"] for one in rounds) / 1e12,
            "share": statistics.median(batch * per_image / one["ours"] / (ceiling / one["matrix"]) for one in rounds),
            "difference": float((ours - theirs).abs().max()),
        }


@torch.inference_mode()
def peaks(jobs: Sequence[tuple[str, str]], args: argparse.Namespace) -> list[dict[str, float]]:
    """Peak bytes of a forward pass beyond weights and inputs, per job and batch size; empty where it is not known."""
    return [
        {
            key: _peak(partial(run, pixels), args.device)
            for key, run in (("peak_bytes", expert), ("plain_peak_bytes", other))
        }
        for name, dtype in jobs
        for expert in [build(name, args, dtype)]
        for other in [plain(expert, args.attention)]
        for batch in args.batch
        for pixels in [inputs(expert, batch)]
    ]


def _peak(run: Callable[[], Any], device: str) -> float:
    run()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():  # Linux only
        return float("nan")
    reset.write_text("5")  # the high-water mark falls to what is resident now

    def resident(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def photograph(width: int, height: int) -> Image.Image:
    """Noise with the spectrum of photographs (amplitude falls with frequency), mostly in brightness."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1

    def layer() -> np.ndarray:
        noise = np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) / frequency, (height, width))
        return (noise - noise.mean()) / noise.std()

    brightness = layer()
    channels = [128 + 45 * brightness + 12 * layer() for _ in range(3)]
    return Image.fromarray(np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8))


def published_square(picture: Image.Image, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What transformers 4.37's CLIPImageProcessor does after expand2square, step by step in its dtypes."""
    array = np.array(pad_to_square(picture, mean_colour(mean)))
    array = np.array(Image.fromarray(array).resize((side, side), Image.Resampling.BICUBIC))
    array = (array * (1 / 255)).astype(np.float32)
    array = (array - np.array(mean, dtype=array.dtype)) / np.array(std, dtype=array.dtype)
    return torch.tensor(np.array([array.transpose(2, 0, 1)]))[0]


def published_preprocessing() -> dict[str, Callable[[Image.Image], Tensor]]:
    """Per expert at full size: a decoded picture to what its tower reads."""
    try:
        module = importlib.import_module("transformers.models.pix2struct.image_processing_pil_pix2struct")
        processor = module.Pix2StructImageProcessorPil(max_patches=2025)
    except ImportError:  # versions without a second one, by torchvision
        processor = importlib.import_module("transformers").Pix2StructImageProcessor(max_patches=2025)

    def high(picture: Image.Image) -> Tensor:
        return published_square(picture, 1024, CLIP_MEAN, CLIP_STD)

    def clip(picture: Image.Image) -> Tensor:
        return published_square(picture, 672, CLIP_MEAN, CLIP_STD)

    def biomedclip(picture: Image.Image) -> Tensor:
        return F.interpolate(clip(picture)[None], size=(224, 224), mode="bilinear", align_corners=False)[0]

    def patches(picture: Image.Image) -> Tensor:
        square = pad_to_square(picture, mean_colour(CLIP_MEAN))
        return processor(square, return_tensors="pt")["flattened_patches"][0]

    return {
        "clip": clip,
        "dinov2": lambda picture: published_square(picture, 672, MEAN, STD),
        "vary": high,
        "codetr": high,
        "pix2struct": patches,
        "deplot": patches,
        "biomedclip": biomedclip,
        "sam": high,
    }


def preprocessing(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Per picture and expert, and for all eight together: pictures per second and core, both ways."""
    torch.set_num_threads(1)
    published = published_preprocessing()
    experts = {}
    for name in args.experts:
        arch = dict(expert_card(name).full, depth=1 + (name in ("clip", "dinov2")))
        with torch.device("meta"):  # preprocessing needs no network
            experts[name] = expert_class(name)(arch)
    for width, height in args.pictures:
        buffer = io.BytesIO()
        photograph(width, height).save(buffer, "JPEG", quality=85)
        encoded = buffer.getvalue()
        picture = Image.open(io.BytesIO(encoded)).convert("RGB")

        for name, expert in experts.items():
            make = published[name]
            found = rates(
                {
                    "ours": partial(expert.preprocess, [encoded]),
                    "published": partial(_decoded_first, make, encoded),
                    "ours_decoded": partial(expert.preprocess, [picture]),
                    "published_decoded": partial(make, picture),
                },
                args.repeat,
            )
            [ours] = next(iter(expert.preprocess([picture]).values()))
            difference = float((ours - make(picture)).abs().max())
            yield {"expert": name, "picture": f"{width}x{height}", **found, "difference": difference}
        if len(experts) == len(POOL):
            found = rates(
                {
                    "ours": partial(_all_of_ours, list(experts.values()), encoded),
                    "published": partial(_decoded_first, partial(_all_published, published), encoded),
                    "ours_decoded": partial(_all_of_ours, list(experts.values()), picture),
                    "published_decoded": partial(_all_published, published, picture),
                },
                args.repeat,
            )
            yield {"expert": "all eight", "picture": f"{width}x{height}", **found}


SHARING = (("pix2struct", "deplot"), ("sam", "vary", "codetr"), EXPERTS)  # groups that could run in one process


def decoding(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Per picture, CPU milliseconds on one thread: of each expert, and of groups apart and together."""
    torch.set_num_threads(1)
    experts = {name: shapes_of(name, args.size) for name in EXPERTS}  # preprocessing needs no network
    gflop = {name: (count_flops(expert) or 0) / 1e9 for name, expert in experts.items()}
    matrix = torch.rand(1024, 1024)
    here = 2 * 1.024**3 / cpu_ms({"product": lambda: matrix @ matrix}, 20)["product"]  # TFLOP/s
    for width, height in args.pictures:
        buffer = io.BytesIO()
        photograph(width, height).save(buffer, "JPEG", quality=85)
        encoded = buffer.getvalue()
        for names in [*((name,) for name in EXPERTS), *SHARING]:
            chosen = [experts[name] for name in names]
            runs: dict[str, Callable[[], Any]] = {
                "decode": partial(load_image, encoded),
                "apart": partial(_each_its_own, chosen, encoded),
                "together": partial(_all_of_ours, chosen, encoded),
            }
            if args.size == "mini":
                runs["here"] = partial(_forward, [load_expert(name, size="mini") for name in names])
            ms = cpu_ms(runs, args.repeat)
            flops = sum(gflop[name] for name in names)
            forward = ms.get("here", flops / here)
            row = {
                "experts": " + ".join(names) if len(names) < len(EXPERTS) else "all seven",
                "picture": f"{width}x{height}",
                **{f"{case}_ms": ms[case] for case in ("decode", "apart", "together")},
                "decode_share": len(names) * ms["decode"] / ms["apart"],
                "saved": 1 - ms["together"] / ms["apart"],
                "here_ms": forward,
                "here_gain": 1 - (ms["together"] + forward) / (ms["apart"] + forward),
            }
            if args.size == "full":
                h100 = flops / args.tflops
                row |= {
                    "h100_ms": h100,
                    "h100_cores_apart": ms["apart"] / h100,
                    "h100_cores_together": ms["together"] / h100,
                }
            yield row


def cpu_ms(runs: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median CPU milliseconds of each, taking turns; the first round warms up."""
    taken: dict[str, list[float]] = {case: [] for case in runs}
    for _ in range(repeat + 1):
        for case, run in runs.items():
            start = time.process_time()
            run()
            taken[case].append(1000 * (time.process_time() - start))
    return {case: statistics.median(times[1:]) for case, times in taken.items()}


@torch.inference_mode()
def _forward(experts: Sequence[VisionExpert]) -> None:
    for expert in experts:
        expert(example(expert))


def _each_its_own(experts: Sequence[VisionExpert], encoded: bytes) -> None:
    for expert in experts:
        expert.preprocess([encoded])


def _decoded_first(make: Callable[[Image.Image], Any], encoded: bytes) -> Any:
    return make(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _all_of_ours(experts: Sequence[VisionExpert], source: ImageSource) -> None:
    shared = DecodedImage(source)
    for expert in experts:
        expert.preprocess([shared])


def _all_published(published: Mapping[str, Callable[[Image.Image], Tensor]], picture: Image.Image) -> None:
    for name in ("clip", "dinov2", "sam", "pix2struct"):  # the four tensors that the published path makes of a picture
        published[name](picture)


def rates(runs: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Per second of CPU time, taking turns, and the medians of ours over the published one's."""
    rounds: list[dict[str, float]] = []
    for _ in range(repeat + 1):
        one = {}
        for case, run in runs.items():
            start = time.process_time()
            run()
            one[case] = 1 / (time.process_time() - start)
        rounds.append(one)
    rounds = rounds[1:]  # the first warms up
    found = {f"{case}_per_s": statistics.median(one[case] for one in rounds) for case in runs}
    for kind in ("", "_decoded"):
        found[f"times_published{kind}"] = statistics.median(
            one[f"ours{kind}"] / one[f"published{kind}"] for one in rounds
        )
    return found


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> None:
    print("  ".join(f"{title:>{max(len(title), 10)}}" for title, _ in columns.values()))
    for row in rows:
        cells = (format(row[key], form) if key in row else "" for key, (_, form) in columns.items())
        print(
            "  ".join(
                f"{cell:>{max(len(title), 10)}}" for cell, (title, _) in zip(cells, columns.values(), strict=True)
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", nargs="+", choices=POOL, default=list(POOL), help="which; default: all")
    parser.add_argument(
        "--size", choices=("mini", "full"), default="mini", help="full: the published widths; default: mini"
    )
    parser.add_argument("--depth", type=int, default=0, help="layers to compute; 0: all of the size's (default)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="pictures per batch; default: 1 4")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"], help="default: float32"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice (default)")
    parser.add_argument("--repeat", type=int, default=6, help="rounds; medians count; default: 6")
    parser.add_argument(
        "--matrix",
        type=int,
        default=0,
        help="side of the matrix product; 0: 8192 on a GPU, 1024 on a CPU, 256 there in half precision (default)",
    )
    parser.add_argument(
        "--attention", choices=("sdpa", "eager"), default="sdpa", help="of the plain module; default: sdpa"
    )
    parser.add_argument(
        "--compile",
        choices=("no", "default", "reduce-overhead", "max-autotune"),
        default="no",
        help="torch.compile of ours with static shapes; reduce-overhead uses CUDA graphs; default: no",
    )
    parser.add_argument(
        "--positions",
        choices=("auto", "bias", "folded"),
        default="auto",
        help="how SAM and Vary add relative positions; auto: folded on a GPU; default: auto",
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out peak memory, measured in a process of its own"
    )
    parser.add_argument("--preprocess", action="store_true", help="measure preprocessing instead of the networks")
    parser.add_argument(
        "--decoding", action="store_true", help="measure what of preprocessing is decoding, and what sharing it saves"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=300.0,
        help="TFLOP/s that an expert reaches on the GPU, for --decoding; default: 300, a third of an H100's in bfloat16",
    )
    parser.add_argument(
        "--pictures",
        nargs="+",
        type=lambda text: tuple(map(int, text.split("x"))),
        default=list(PICTURES),
        help="sizes in pixels for --preprocess and --decoding; default: 640x480 1920x1080 1080x1920",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parse_arguments(parser, PARTS, QUICK)
    if args.threads:
        torch.set_num_threads(args.threads)

    if args.decoding:
        total = len(args.pictures) * (len(EXPERTS) + len(SHARING))
        rows = list(tqdm(decoding(args), total=total, desc="decoding", disable=None))
        columns = {
            "picture": ("picture", ""),
            "decode_ms": ("decode ms", ".1f"),
            "apart_ms": ("apart ms", ".1f"),
            "decode_share": ("decoding", ".0%"),
            "together_ms": ("together", ".1f"),
            "saved": ("saved", ".0%"),
            "h100_ms": ("H100 ms", ".2f"),
            "h100_cores_apart": ("cores", ".1f"),
            "h100_cores_together": ("together", ".1f"),
            "here_ms": ("here ms", ".1f"),
            "here_gain": ("gain here", ".0%"),
            "experts": ("experts", ""),
        }
        title = f"decoding a JPEG and preprocessing at size {args.size}, per core; cores: to keep one H100 busy"
    elif args.preprocess:
        total = len(args.pictures) * (len(args.experts) + (len(args.experts) == len(POOL)))
        rows = list(tqdm(preprocessing(args), total=total, desc="preprocessing", disable=None))
        columns = {
            "expert": ("expert", ""),
            "picture": ("picture", ""),
            "ours_per_s": ("images/s", ".1f"),
            "published_per_s": ("published", ".1f"),
            "times_published": ("ratio", ".2f"),
            "ours_decoded_per_s": ("decoded: images/s", ".1f"),
            "published_decoded_per_s": ("published", ".1f"),
            "times_published_decoded": ("ratio", ".2f"),
            "difference": ("difference", ".1e"),
        }
        title = "preprocessing at full size, per core; with and without decoding a JPEG"
    else:
        jobs = [(name, dtype) for name in args.experts for dtype in args.dtype]
        rows = [row for name, dtype in tqdm(jobs, desc="experts", disable=None) for row in measure(name, dtype, args)]
        if not args.no_memory:
            print("peak memory, in a process of its own", file=sys.stderr)
            with (
                patch.dict(
                    os.environ, MALLOC_MMAP_THRESHOLD_="1000000"
                ),  # glibc: freed blocks leave the process at once
                ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
            ):
                for row, found in zip(rows, pool.submit(peaks, jobs, args).result(), strict=True):
                    row |= {key: value / 2**20 for key, value in found.items()}
        columns = {
            "expert": ("expert", ""),
            "dtype": ("dtype", ""),
            "batch": ("batch", ""),
            "gflop_per_image": ("GFLOP/image", ".4g"),
            "images_per_s": ("images/s", ".2f"),
            "plain_images_per_s": ("plain", ".2f"),
            "times_plain": ("ratio", ".2f"),
            "tflop_per_s": ("TFLOP/s", ".3f"),
            "share": ("of matmul", ".0%"),
            "peak_bytes": ("peak MB", ".1f"),
            "plain_peak_bytes": ("plain MB", ".1f"),
            "difference": ("difference", ".1e"),
        }
        where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
        depth = f", {args.depth} layers" if args.depth else ""
        title = (
            f"experts of size {args.size}{depth} on {where}, plain attention {args.attention}, compile {args.compile}"
        )
    if args.json:
        print(json.dumps({"settings": vars(args), "rows": rows}))
        return
    print(title)
    table(rows, columns)


if __name__ == "__main__":
    main()

"""Published MoVA checkpoints <-> ours, name by name.

A conversion renames and never computes: bytes go from file to file in pieces, so a model of any size needs no more memory
than a small one, and what goes there and back is the same to the bit. Experts stay in their published names, which every
`load_expert` reads; what no module of ours holds lies beside the model in the folder `published`.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoTokenizer, BertConfig, PreTrainedTokenizerBase

from mova_core.adapter import AdapterConfig
from mova_core.config import MoVAConfig
from mova_core.data import IMAGE_MARK
from mova_core.experts import BASE, EXPERTS, expert_card, expert_class
from mova_core.experts.weights import SAFE, TORCH, WeightsError, unfitting, weight_files
from mova_core.model import ROUTING_LORA, MoVAForConditionalGeneration
from mova_core.processing import MoVAProcessor, prepare_tokenizer

LLM, ADAPTER = "language_model", "adapter"
TOWERS = {name: f"model.vision_tower.vision_tower_{index}." for index, name in enumerate((BASE, *EXPERTS))}
PREFIXES = TOWERS | {ADAPTER: "model.mm_projector."}  # everything else is the LLM's
OURS = {BASE: "base_encoder.", ADAPTER: "adapter.", LLM: "language_model."}  # in `MoVAForConditionalGeneration`

# Tensors that some checkpoints hold and MoVA never reads: heads of the text encoder, tables that follow from the config.
UNUSED = re.compile(r".*\.text_encoder\.(cls\.|bert\.pooler\.)|.*\.position_ids$|.*\.rotary_emb\.inv_freq$")
# Co-DETR's rotary tables: shared by its blocks, so that a file may hold each only once; they follow from the arch.
SHARED = re.compile(re.escape(TOWERS["codetr"]) + r"(rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.freqs_(cos|sin)")

PUBLISHED = "published"  # folder beside our model: the published files, and tensors that no module of ours holds
REST = "rest.safetensors"
REPORT = "conversion.json"
PIECE = 1 << 24  # bytes held at once
WINDOW = 1 << 26  # bytes of a .bin file that stay mapped

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64},
    **{"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


class Parts(dict[str, dict[str, Tensor]]):
    """State dicts of our modules by part: "language_model", "adapter", "clip" and each expert.

    Beside them, for the way back: `archs` by tower, `rest`, the published tensors by full name that no module of ours
    holds, and `derived`, the names of those that our modules give but the published state dict had not.
    """

    def __init__(self) -> None:
        self.archs: dict[str, dict[str, Any]] = {}
        self.rest: dict[str, Tensor] = {}
        self.derived: set[str] = set()


def from_published(state_dict: Mapping[str, Tensor], archs: Mapping[str, Mapping[str, Any]] | None = None) -> Parts:
    """A published state dict, or some of it, to the state dicts of our modules; on the meta device as well.

    Args:
        state_dict: tensors by published name.
        archs: by expert, on top of what the shapes tell (they do not tell the heads of most networks, for which one per 64
            channels is taken, nor the size of the pictures that Pix2Struct and DePlot read).

    Raises:
        WeightsError: a name of a vision tower that MoVA does not have.
    """
    parts = Parts()
    given: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        part = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), LLM)
        if part == LLM and name.startswith("model.vision_tower."):
            raise WeightsError(
                f"{name}: there is no such tower; MoVA has vision_tower_0 to vision_tower_{len(EXPERTS)}"
            )
        if UNUSED.match(name):
            parts.rest[name] = tensor
        else:
            given.setdefault(part, {})[name.removeprefix(PREFIXES.get(part, ""))] = tensor
    for part in sorted(given, key=[LLM, ADAPTER, *TOWERS].index):
        parts[part] = given[part]
        if prefix := TOWERS.get(part):
            arch = _arch(part, given[part], parts.archs) | dict((archs or {}).get(part, {}))
            parts.archs[part] = arch
            parts[part] = expert_class(part).from_public(given[part], arch)
            back = expert_class(part).to_public(parts[part], arch)
            lost = {name: it for name, it in given[part].items() if name not in back or not _same(back[name], it)}
            parts.rest |= {prefix + name: tensor for name, tensor in lost.items()}
            parts.derived |= {prefix + name for name in back.keys() - given[part].keys()}
    return parts


def to_published(
    parts: Mapping[str, Mapping[str, Tensor]], archs: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Tensor]:
    """The inverse of `from_published`: one state dict in published names.

    Args:
        parts: from `from_published`, or state dicts of our modules by the same names.
        archs: by expert; default those that came with `parts`, else the published ones.

    Raises:
        ValueError: a part that a published checkpoint does not have.
    """
    if archs is None:
        archs = parts.archs if isinstance(parts, Parts) else {}
    published: dict[str, Tensor] = {}
    for part, state in parts.items():
        if part not in PREFIXES and part != LLM:
            raise ValueError(f"no part {part!r} in a published checkpoint: there are {', '.join([LLM, *PREFIXES])}")
        if part in TOWERS:
            state = expert_class(part).to_public(state, archs.get(part) or expert_card(part).full)
        published |= {PREFIXES.get(part, "") + name: tensor for name, tensor in state.items()}
    if isinstance(parts, Parts):
        published = {name: it for name, it in published.items() if name not in parts.derived} | parts.rest
    return published


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return alike and (one.is_meta or other.is_meta or torch.equal(one, other))


def _arch(name: str, state: Mapping[str, Tensor], towers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A tower's arch as its published shapes tell it; a word that they do not tell is the published tower's."""

    def size(tensor: str, axis: int = 0) -> int:
        return state[tensor].shape[axis]

    def blocks(prefix: str) -> list[int]:
        found = {re.match(re.escape(prefix) + r"\.(\d+)\.", key) for key in state}
        return sorted({int(match[1]) for match in found if match})

    def depth(prefix: str) -> int:
        return blocks(prefix)[-1] + 1

    def side(tensor: str, axis: int, extra: int = 1) -> int:
        return isqrt(size(tensor, axis) - extra)

    words: dict[str, Callable[[], Any]]
    if name == BASE:
        words = {
            "width": lambda: size("vision_model.embeddings.class_embedding"),
            "depth": lambda: depth("vision_model.encoder.layers"),
            "mlp_hidden": lambda: size("vision_model.encoder.layers.0.mlp.fc1.weight"),
            "patch_size": lambda: size("vision_model.embeddings.patch_embedding.weight", 2),
            "image_size": lambda: side("vision_model.embeddings.position_embedding.weight", 0) * arch["patch_size"],
        }
    elif name == "dinov2":
        words = {
            "width": lambda: size("embeddings.cls_token", 2),
            "depth": lambda: depth("encoder.layer"),
            "mlp_hidden": lambda: size("encoder.layer.0.mlp.weights_out.weight", 1),
            "patch_size": lambda: size("embeddings.patch_embeddings.projection.weight", 2),
            "image_size": lambda: side("embeddings.position_embeddings", 1) * arch["patch_size"],
        }
    elif name in ("vary", "sam"):
        words = {
            "width": lambda: size("pos_embed", 3),
            "depth": lambda: depth("blocks"),
            "heads": lambda: arch["width"] // size("blocks.0.attn.rel_pos_h", 1),
            "mlp_hidden": lambda: size("blocks.0.mlp.lin1.weight"),
            "patch_size": lambda: size("patch_embed.proj.weight", 2),
            "image_size": lambda: size("pos_embed", 1) * arch["patch_size"],
            "window_size": lambda: (min(size(f"blocks.{b}.attn.rel_pos_h") for b in blocks("blocks")) + 1) // 2,
            "global_blocks": lambda: tuple(
                b for b in blocks("blocks") if size(f"blocks.{b}.attn.rel_pos_h") == 2 * size("pos_embed", 1) - 1
            ),
            "channels": lambda: size("net_2.weight" if name == "vary" else "neck.0.weight"),
        }
    elif name == "codetr":
        words = {
            "width": lambda: size("pos_embed", 2),
            "depth": lambda: depth("blocks"),
            "heads": lambda: arch["width"] // size("rope_win.freqs_cos", 1),
            "mlp_hidden": lambda: size("blocks.0.mlp.w1.weight"),
            "patch_size": lambda: size("patch_embed.proj.weight", 2),
            "pos_grid": lambda: side("pos_embed", 1),
            "image_size": lambda: side("rope_glb.freqs_cos", 0, extra=0) * arch["patch_size"],
            "window_size": lambda: side("rope_win.freqs_cos", 0, extra=0),
            "global_blocks": lambda: tuple(
                b for b in blocks("blocks") if size(f"blocks.{b}.attn.rope.freqs_cos") == size("rope_glb.freqs_cos")
            ),
            "channels": lambda: size("neck.0.weight"),
        }
    elif name in ("pix2struct", "deplot"):
        words = {
            "width": lambda: size("embeddings.patch_projection.weight"),
            "depth": lambda: depth("encoder.layer"),
            "mlp_hidden": lambda: size("encoder.layer.0.mlp.wi_0.weight"),
            "patch_size": lambda: isqrt(size("embeddings.patch_projection.weight", 1) // 3),
            "pos_grid": lambda: size("embeddings.row_embedder.weight"),
        }
    else:
        words = {
            "width": lambda: size("trunk.cls_token", 2),
            "depth": lambda: depth("trunk.blocks"),
            "mlp_hidden": lambda: size("trunk.blocks.0.mlp.fc1.weight"),
            "patch_size": lambda: size("trunk.patch_embed.proj.weight", 2),
            "image_size": lambda: side("trunk.pos_embed", 1) * arch["patch_size"],
        }
    arch = dict(expert_card(name).full)
    for word, tell in words.items():
        try:
            arch[word] = tell()
        except (KeyError, IndexError):  # its tensor is missing: the strict comparison names it
            continue
    if "heads" not in words:
        arch["heads"] = max(1, arch["width"] // 64)
    if "channels" not in words:
        arch["channels"] = arch["width"]
    if "picture_size" in arch and BASE in towers:
        arch["picture_size"] = towers[BASE]["image_size"]
    return arch


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a weights file."""

    file: Path
    name: str  # in the file
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    size: int  # bytes
    start: int  # where in the file they begin; of a .bin, how much its tensors before this one hold

    def meta(self) -> Tensor:
        """Its shape and dtype without its numbers."""
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Its bytes. Read, not mapped: pages of a mapping would count as memory until the whole file is done."""
        if self.file.suffix in TORCH:
            tensor = _mapped(self.file, self.start // WINDOW)[self.name]
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            yield from (data[at : at + PIECE] for at in range(0, self.size, PIECE))
            return
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            for at in range(0, self.size, PIECE):
                piece = opened.read(min(PIECE, self.size - at))
                if len(piece) < min(PIECE, self.size - at):
                    raise WeightsError(f"{self.file}: ends inside {self.name}; download it again")
                yield piece


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """Every tensor of a folder's weights by name; nothing but headers is read.

    Raises:
        WeightsError: no weights, a shard that is missing or torn, or two that hold the same name.
    """
    stored: dict[str, Stored] = {}
    for file in weight_files(Path(folder)):
        tensors = _safe_header(file) if file.suffix in SAFE else _pickle_header(file)
        if twice := sorted(stored.keys() & tensors.keys()):
            raise WeightsError(f"{file}: holds {twice[0]}, which {stored[twice[0]].file.name} holds too")
        stored |= tensors
    return stored


def _safe_header(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt"):  # it checks that header and length fit each other
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except Exception as error:  # safetensors raises whatever it stumbles on
        raise WeightsError(
            f"{file}: torn or no safetensors ({' '.join(str(error).split())[:160]}); download it again"
        ) from error
    stored = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise WeightsError(f"{file}: {name} is of type {entry['dtype']}; there are {', '.join(DTYPES)}")
        begin, end = entry["data_offsets"]
        word, shape, start = entry["dtype"], tuple(entry["shape"]), 8 + length + begin
        stored[name] = Stored(file=file, name=name, dtype=word, shape=shape, size=end - begin, start=start)
    return stored


def _pickled(file: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise WeightsError(
            f"{file}: torn, older than torch 1.6, or more than tensors, which is never read "
            f"({' '.join(str(error).split())[:120]}). Fix: save its state dict as safetensors"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise WeightsError(f"{file}: holds more than a state dict. Fix: save its state dict alone")
    return state


@lru_cache(maxsize=1)
def _mapped(file: Path, window: int) -> Mapping[str, Tensor]:
    """A .bin file, mapped anew for every window of it, so that pages already read are let go."""
    return _pickled(file)


def _pickle_header(file: Path) -> dict[str, Stored]:
    words = {dtype: word for word, dtype in DTYPES.items()}
    stored, at = {}, 0
    for name, tensor in _pickled(file).items():
        size = tensor.numel() * tensor.element_size()
        word, shape = words[tensor.dtype], tuple(tensor.shape)
        stored[name] = Stored(file=file, name=name, dtype=word, shape=shape, size=size, start=at)
        at += size
    return stored


def write_tensors(path: Path, tensors: Mapping[str, Stored], progress: Callable[[int], Any]) -> None:
    """One safetensors file of tensors that lie in others; `progress` takes the bytes of every piece written."""
    # The widest first, so that all are aligned; else as they lie in their files, so that these are read from end to end.
    order = sorted(tensors, key=lambda name: (-DTYPES[(it := tensors[name]).dtype].itemsize, str(it.file), it.start))
    ordered = {name: tensors[name] for name in order}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, stored in ordered.items():
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [at, at := at + stored.size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for stored in ordered.values():
            for piece in stored.pieces():
                opened.write(piece)
                progress(len(piece))
    _mapped.cache_clear()  # of the last .bin


def convert(
    source: str | Path,
    target: str | Path,
    *,
    experts: str | Sequence[str] = "keep",
    text_encoder: str | None = None,
    chat_format: str | None = None,
    shard_gb: float = 4.0,
    dry_run: bool = False,
    progress: Callable[[int], Any] = lambda _: None,
    begin: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """A published MoVA folder to ours.

    `target` becomes a folder for `MoVAForConditionalGeneration.from_pretrained` and `MoVAProcessor.from_pretrained`. In it
    are `experts/NAME`, which `load_expert(NAME, weights=...)` and the feature servers read; `published` with what only
    the way back needs; and `conversion.json`, the report.

    Args:
        source: config.json, tokenizer and weights, as safetensors or .bin, sharded or not. Archs of towers that their
            shapes do not tell may stand in config.json as `expert_archs`.
        experts: "keep", "drop", or the names to keep.
        text_encoder: folder or hub id of the adapter's text encoder, for its tokenizer and, where a config.json is there,
            its config; default what the published config names.
        chat_format: one of `CHAT_FORMATS`; default the one that the tokenizer's marks tell.
        shard_gb: largest weights file, GB.
        dry_run: check everything, write nothing.
        progress, begin: called with the bytes of every piece written, and before the first with their sum.

    Returns:
        The report: every tensor by published name, where it went and why.

    Raises:
        WeightsError: missing, unexpected or misshapen tensors (all are named), a missing shard, no config or tokenizer.
        FileExistsError: `target` is there already.
        OSError: the disk is too small.
    """
    source, target = Path(source), Path(target)
    kept = chosen_experts(experts)
    config = _read_config(source)
    stored = stored_tensors(source)
    metas = {name: tensor.meta() for name, tensor in stored.items()}
    parts = from_published(metas, config.get("expert_archs"))
    tokenizer = _llm_tokenizer(source)
    chat_format = chat_format or _chat_format(tokenizer)
    prepare_tokenizer(tokenizer, chat_format)
    text_tokenizer, bert = _text_encoder(text_encoder or config.get("mm_projector_text_encoder"), parts)
    ours = _our_config(config, parts, bert, tokenizer.get_vocab()[IMAGE_MARK])
    rederived = _check(source, parts, metas, ours)

    at = {id(tensor): name for name, tensor in metas.items()}
    files = _shards(
        {OURS[part] + name: stored[at[id(it)]] for part in OURS for name, it in parts.get(part, {}).items()}, shard_gb
    )
    for name in kept:
        its = {
            full.removeprefix(TOWERS[name]): tensor for full, tensor in stored.items() if full.startswith(TOWERS[name])
        }
        files[f"experts/{name}/model.safetensors"] = its
    of_experts = tuple(TOWERS[name] for name in EXPERTS)
    if rest := {name: stored[name] for name in parts.rest if not name.startswith(of_experts)}:
        files[f"{PUBLISHED}/{REST}"] = rest
    notes = {name: "left out with its expert" for name in stored if name.startswith(of_experts)}
    notes |= {name: "not read by MoVA, kept for the way back" for name in parts.rest if name not in notes}
    notes |= {name: "not in the source: follows from the arch" for name in rederived}

    def finish(folder: Path) -> None:
        ours.save_pretrained(folder)
        MoVAProcessor.for_model(ours, tokenizer, text_tokenizer, chat_format=chat_format).save_pretrained(folder)
        for name in kept:
            about = {"expert": name, "arch": parts.archs[name]}
            (folder / "experts" / name / "config.json").write_text(json.dumps(about, indent=2))
        _copy_files(source, folder / PUBLISHED)

    return _carry_out(source, target, stored, files, notes, finish, dry_run, progress, begin)


def convert_back(
    source: str | Path,
    target: str | Path,
    *,
    shard_gb: float = 4.0,
    dry_run: bool = False,
    progress: Callable[[int], Any] = lambda _: None,
    begin: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Our folder, as `convert` made it (its weights may have learnt since), to a published one; arguments as there.

    The report's `left_out` names what has no published form: the expert-routing LoRA.

    Raises:
        WeightsError: as `convert`; also where the folder `published` or one of `experts` is not there.
        FileExistsError, OSError: as `convert`.
    """
    source, target = Path(source), Path(target)
    config = _read_config(source / PUBLISHED)
    if absent := [name for name in EXPERTS if not (source / "experts" / name).is_dir()]:
        folders = ", ".join(f"experts/{name}" for name in absent)
        raise WeightsError(f"{source}: no {folders}, which a published checkpoint holds: copy them there")
    ours = MoVAConfig.from_pretrained(source)
    model = stored_tensors(source)
    if foreign := [name for name in model if not name.startswith(tuple(OURS.values()))]:
        raise WeightsError(f"{source}: a published checkpoint has no place for {unfitting((), foreign, ())}")
    state = {
        part: {name.removeprefix(prefix): it.meta() for name, it in model.items() if name.startswith(prefix)}
        for part, prefix in OURS.items()
    }
    at = {id(tensor): OURS[part] + name for part, tensors in state.items() for name, tensor in tensors.items()}
    stored = {name: model[at[id(tensor)]] for name, tensor in to_published(state).items()}
    for name in EXPERTS:
        its = stored_tensors(source / "experts" / name)
        stored |= {TOWERS[name] + key: tensor for key, tensor in its.items()}
    rest = source / PUBLISHED / REST
    if rest.is_file():
        stored |= _safe_header(rest)
    metas = {name: tensor.meta() for name, tensor in stored.items()}
    parts = from_published(metas, config.get("expert_archs"))
    rederived = _check(source, parts, metas, ours)
    notes = {name: "not read by MoVA" for name in parts.rest}
    notes |= {name: "not in the source: follows from the arch" for name in rederived}

    def finish(folder: Path) -> None:
        _copy_files(source / PUBLISHED, folder)

    files = _shards(stored, shard_gb)
    report = _carry_out(source, target, stored, files, notes, finish, dry_run, progress, begin)
    return report | {"left_out": [ROUTING_LORA] if (source / ROUTING_LORA).is_dir() else []}


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: its config.json cannot be read ({error}); pass the published folder") from None
    needed = ("mm_hidden_size", "image_feat_size", "expert_channels", "num_projector_layers", "hidden_size")
    if absent := [key for key in needed if key not in config]:
        raise WeightsError(f"{folder}: config.json has no {', '.join(absent)}, so this is no published MoVA")
    if len(config["expert_channels"]) != len(EXPERTS):
        raise WeightsError(
            f"{folder}: expert_channels has {len(config['expert_channels'])} numbers, not {len(EXPERTS)}"
        )
    return config


def _our_config(
    published: Mapping[str, Any], parts: Parts, text_encoder: Mapping[str, Any], image_token_id: int
) -> MoVAConfig:
    own = {"architectures", "auto_map", "model_type", "transformers_version", "_name_or_path", "expert_archs"}
    own |= {"expert_channels", "image_feat_size", "topk_experts", "topk", "image_aspect_ratio", "use_mm_proj"}
    own |= {"num_projector_layers", "num_routing_tokens"}
    text = {key: value for key, value in published.items() if key not in own and not key.startswith("mm_")}
    kind = re.sub(r"^(mova|llava)_", "", published.get("model_type", "llama"))
    if kind not in CONFIG_MAPPING:
        raise WeightsError(f"config.json: model_type {published['model_type']!r} names no LLM that transformers has")
    grid, width = published["image_feat_size"], published["mm_hidden_size"]
    base = parts.archs.get(BASE, dict(expert_card(BASE).full))
    adapter = AdapterConfig(
        expert_channels=dict(zip(EXPERTS, published["expert_channels"], strict=True)),
        out_width=published["hidden_size"],
        width=width,
        grid=grid,
        blocks=published["num_projector_layers"],
        topk=published.get("topk_experts", published.get("topk", 3)),
        text_encoder=text_encoder,
        text_width=text_encoder["hidden_size"],
        freeze_text_encoder=published.get("mm_projector_freeze_text_encoder", False),
    )
    dtype = next((tensor.dtype for tensor in parts.get(LLM, {}).values()), torch.float32)
    return MoVAConfig(
        text_config=CONFIG_MAPPING[kind](**text),
        base_arch=base | {"image_size": grid * base["patch_size"]},
        pool=[
            {"name": name, "channels": channels, "description": expert_card(name).description}
            for name, channels in adapter.expert_channels.items()
        ],
        adapter=adapter.to_dict(),
        image_token_id=image_token_id,
        routing_grid=isqrt(published.get("num_routing_tokens", 144)),
        architectures=[MoVAForConditionalGeneration.__name__],
        dtype=str(dtype).removeprefix("torch."),
    )


def _check(source: Path, parts: Parts, metas: Mapping[str, Tensor], ours: MoVAConfig) -> list[str]:
    """Compares names and shapes with those of the modules; gives the names that may be absent and are.

    Raises:
        WeightsError: they differ; it names every tensor that does.
    """
    archs = {name: parts.archs.get(name) or dict(expert_card(name).full) for name in TOWERS}
    archs[BASE] = ours.base_arch
    with torch.device("meta"):
        whole = MoVAForConditionalGeneration(ours).state_dict()
        modules = {name: expert_class(name)(archs[name]).state_dict() for name in EXPERTS}
    for part, prefix in OURS.items():
        modules[part] = {name.removeprefix(prefix): it for name, it in whole.items() if name.startswith(prefix)}
    wanted = to_published(modules, archs)
    absent = [name for name in wanted if name not in metas]
    optional = [name for name in absent if SHARED.match(name)]
    if ours.text_config.tie_word_embeddings:
        optional += ["lm_head.weight"] if "lm_head.weight" in absent else []
    problem = unfitting(
        missing=set(absent) - set(optional),
        unexpected=metas.keys() - wanted.keys() - parts.rest.keys(),
        shapes=(
            f"{name} {tuple(metas[name].shape)} instead of {tuple(it.shape)}"
            for name, it in wanted.items()
            if name in metas and metas[name].shape != it.shape
        ),
    )
    if problem:
        raise WeightsError(f"{source} is no whole MoVA of its config.json: {problem}")
    return optional


def _llm_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises whatever the tokenizer's library does
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{source}: its tokenizer cannot be read ({reason}); copy the LLM's there") from error
    return tokenizer


def _text_encoder(name: str | None, parts: Parts) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """The tokenizer of the adapter's text encoder, and its config, told by the shapes where `name` has none."""
    if not name:
        raise WeightsError("config.json names no text encoder: pass --text-encoder FOLDER with its tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"the text encoder's tokenizer {name} cannot be read ({reason}): pass --text-encoder FOLDER that holds it"
        ) from error
    try:
        told, _ = BertConfig.get_config_dict(name)
    except OSError:
        told = {}
    if "hidden_size" in told:
        config = BertConfig.from_dict(told)
    else:
        shapes = {key: tensor.shape for key, tensor in parts.get(ADAPTER, {}).items()}
        bert = "text_encoder.bert."
        words, width = shapes.get(f"{bert}embeddings.word_embeddings.weight", (30522, 1024))
        layers = {key.split(".")[4] for key in shapes if key.startswith(f"{bert}encoder.layer.")}
        config = BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=len(layers) or 24,
            num_attention_heads=max(1, width // 64),
            intermediate_size=shapes.get(f"{bert}encoder.layer.0.intermediate.dense.weight", (4 * width,))[0],
            max_position_embeddings=shapes.get(f"{bert}embeddings.position_embeddings.weight", (512,))[0],
        )
    return tokenizer, config.to_diff_dict() | {"hidden_size": config.hidden_size}


def _chat_format(tokenizer: PreTrainedTokenizerBase) -> str:
    """The published format of the LLM whose marks the tokenizer has."""
    words = tokenizer.get_vocab()
    return "mova_llama3" if "<|start_header_id|>" in words else "chatml" if "<|im_start|>" in words else "vicuna_v1"


def chosen_experts(experts: str | Sequence[str]) -> tuple[str, ...]:
    """ "keep", "drop" or names, as a list or with commas, to names in routing order; an unknown one is a ValueError."""
    if isinstance(experts, str):
        if experts in ("keep", "drop"):
            return EXPERTS if experts == "keep" else ()
        experts = [name.strip() for name in experts.split(",")]
    if unknown := sorted(set(experts) - set(EXPERTS)):
        raise ValueError(f"no expert {', '.join(unknown)}: give keep, drop, or some of {', '.join(EXPERTS)}")
    return tuple(name for name in EXPERTS if name in experts)


def _shards(tensors: Mapping[str, Stored], shard_gb: float) -> dict[str, dict[str, Stored]]:
    """Weights files of at most so many GB, in the order of `tensors`, under the names that transformers looks for."""
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda stored: stored.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(shard_gb * 1e9),
    )
    return {file: {name: tensors[name] for name in names} for file, names in split.filename_to_tensors.items()}


def _copy_files(source: Path, target: Path) -> None:
    """Everything of a published folder but its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        weights = file.suffix in SAFE + TORCH or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != REPORT:
            shutil.copyfile(file, target / file.name)


def _carry_out(
    source: Path,
    target: Path,
    stored: Mapping[str, Stored],
    files: Mapping[str, Mapping[str, Stored]],
    notes: Mapping[str, str],
    finish: Callable[[Path], None],
    dry_run: bool,
    progress: Callable[[int], Any],
    begin: Callable[[int], Any],
) -> dict[str, Any]:
    """Writes the files beside `target`, which takes their place once all are whole; gives the report."""
    report = _report(source, target, stored, files, notes)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there already: name a folder that is not, or empty it")
    if dry_run:
        return report
    parent = next(folder for folder in target.absolute().parents if folder.is_dir())
    total, free = report["bytes"], shutil.disk_usage(parent).free
    if total > free:
        raise OSError(f"{target}: {total / 1e9:.1f} GB to write, but {parent} has {free / 1e9:.1f} GB free")
    draft = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(draft, ignore_errors=True)  # of a conversion that was killed
    draft.mkdir(parents=True)
    try:
        begin(total)
        for name, tensors in files.items():
            write_tensors(draft / name, tensors, progress)
        sharded = {name: file for file, tensors in files.items() if file.startswith("model-") for name in tensors}
        if sharded:
            sizes = sum(
                it.size for file, tensors in files.items() if file.startswith("model-") for it in tensors.values()
            )
            index = {"metadata": {"total_size": sizes}, "weight_map": sharded}
            (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
        finish(draft)
        (draft / REPORT).write_text(json.dumps(report, indent=1))
        if target.exists():
            target.rmdir()
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return report


def _report(
    source: Path,
    target: Path,
    stored: Mapping[str, Stored],
    files: Mapping[str, Mapping[str, Stored]],
    notes: Mapping[str, str],
) -> dict[str, Any]:
    placed = {id(it): (file, name) for file, tensors in files.items() for name, it in tensors.items()}
    rows: list[dict[str, Any]] = []
    parts: dict[str, dict[str, int]] = {}
    for published in (*stored, *(name for name in notes if name not in stored)):
        part = next((part for part, prefix in PREFIXES.items() if published.startswith(prefix)), LLM)
        about = parts.setdefault(part, {"tensors": 0, "parameters": 0, "bytes": 0, "written": 0})
        row: dict[str, Any] = {"published": published, "part": part, "name": None, "file": None}
        if (it := stored.get(published)) is not None:
            row |= {"dtype": it.dtype, "shape": list(it.shape), "bytes": it.size}
            about["tensors"] += 1
            about["parameters"] += prod(it.shape)
            about["bytes"] += it.size
            if id(it) in placed:
                row["file"], row["name"] = placed[id(it)]
                about["written"] += it.size
        if published in notes and (row["file"] is None or row["file"].endswith(REST) or it is None):
            row["note"] = notes[published]
        rows.append(row)
    written = sum(about["written"] for about in parts.values())
    return {"source": str(source), "target": str(target), "bytes": written, "parts": parts, "tensors": rows}

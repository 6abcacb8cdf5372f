"""The contract that every expert of the pool keeps, and how weights come in."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from mova_core.experts import (
    BASE,
    EXPERTS,
    ExpertCard,
    Features,
    VisionExpert,
    WeightsError,
    expert_card,
    expert_class,
    expert_module,
    expert_names,
    fingerprint,
    load_expert,
    register,
)
from mova_core.experts.weights import hub_problem
from mova_core.images import DecodedImage

POOL = (BASE, *EXPERTS)
EXTREMES = {size: DecodedImage(Image.new("RGB", size, (255, 0, 0))) for size in ((1, 1), (1, 20_000), (20_000, 1))}


def pictures() -> list[Image.Image]:
    random = np.random.RandomState(0)
    return [
        Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((60, 90), (90, 40), (64, 64))
    ]


@pytest.fixture(scope="module", params=POOL)
def expert(request) -> VisionExpert:
    return load_expert(request.param, size="mini")


@torch.no_grad()
def features(expert: VisionExpert, images=None) -> Features:
    dtype = next(expert.parameters()).dtype
    batch = expert.preprocess(pictures() if images is None else images)
    return expert({name: tensor.to(dtype) for name, tensor in batch.items()})


class TestContract:
    def test_card(self, expert):
        card = expert.card
        assert expert_card(card.name) is card and isinstance(expert, expert_class(card.name))
        assert card.full.keys() == card.mini.keys()
        for name in ("CLIP", "DINO", "Vary", "DETR", "Pix2Struct", "DePlot", "SAM"):
            assert name not in card.description

    def test_preprocess(self, expert):
        batch = expert.preprocess(pictures())
        assert all(tensor.dtype == torch.float32 and len(tensor) == 3 for tensor in batch.values())
        assert all(bool(torch.isfinite(tensor).all()) for tensor in batch.values())

    def test_shape_and_dtype(self, expert):
        tokens, grid = features(expert)
        assert grid == expert.grid and tokens.shape == (3, grid[0] * grid[1], expert.channels)
        assert tokens.dtype == torch.float32 and bool(torch.isfinite(tokens).all())

    def test_features_differ_between_pictures_and_places(self, expert):
        tokens = features(expert).tokens
        assert 0.1 < tokens.std() < 10
        assert (tokens[0] - tokens[1]).abs().mean() > 0.05  # pictures differ
        assert (tokens[:, 0] - tokens[:, 1]).abs().mean() > 0.05  # places differ

    def test_a_batch_equals_its_pictures_one_by_one(self, expert):
        one_by_one = torch.cat([features(expert, [picture]).tokens for picture in pictures()])
        torch.testing.assert_close(features(expert).tokens, one_by_one, atol=1e-5, rtol=0)

    def test_two_loads_are_equal(self, expert):
        again = load_expert(expert.card.name, size="mini")
        assert torch.equal(features(again).tokens, features(expert).tokens)
        assert fingerprint(again.describe()) == fingerprint(expert.describe())

    def test_frozen_and_in_eval_mode(self, expert):
        assert not any(parameter.requires_grad for parameter in expert.parameters())
        assert not any(module.training for module in expert.modules())

    def test_describe_is_json(self, expert):
        described = expert.describe()
        assert json.loads(json.dumps(described)) == described
        assert described["expert"] == expert.card.name and described["dtype"] == "float32"
        assert described["grid"] == list(expert.grid) and described["channels"] == expert.channels

    def test_fingerprint_tells_weights_pixels_and_dtype_apart(self, expert):
        seen = {fingerprint(expert.describe())}
        seen.add(fingerprint(expert.describe(dtype=torch.float16)))
        seen.add(fingerprint(expert.describe(compat="published")))
        seen.add(fingerprint(load_expert(expert.card.name, size="mini", dtype=torch.bfloat16).describe()))
        state = {name: tensor.clone() for name, tensor in expert.state_dict().items()}
        name = next(iter(dict(expert.named_parameters())))
        state[name].view(-1)[0] += 1e-3
        seen.add(fingerprint(load_expert(expert.card.name, weights=state, size="mini").describe()))
        assert len(seen) == 5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, expert, dtype):
        half = load_expert(expert.card.name, size="mini", dtype=dtype)
        tokens = features(half).tokens
        assert tokens.dtype == dtype
        exact = features(expert).tokens
        assert (tokens.float() - exact).abs().mean() < 0.1 * exact.std()

    def test_our_own_and_public_names_load(self, expert):
        own = dict(expert.state_dict())
        public = expert.to_public(own, expert.arch)
        for state in (own, public):
            loaded = load_expert(expert.card.name, weights=state, size="mini")
            assert torch.equal(features(loaded).tokens, features(expert).tokens)

    def test_one_part_of_a_published_checkpoint_loads(self, expert):
        tower = f"model.vision_tower.vision_tower_{POOL.index(expert.card.name)}."
        published = {
            tower + name: tensor for name, tensor in expert.to_public(expert.state_dict(), expert.arch).items()
        }
        published |= {
            "model.embed_tokens.weight": torch.zeros(3, 3),
            "model.vision_tower.vision_tower_9.x": torch.zeros(1),
        }
        loaded = load_expert(expert.card.name, weights=published, size="mini")
        assert torch.equal(features(loaded).tokens, features(expert).tokens)

    def test_missing_unexpected_and_misshapen_names_are_listed(self, expert):
        state = dict(expert.state_dict())
        lost, bent = list(dict(expert.named_parameters()))[-3:-1]
        del state[lost]
        state |= {"stray.weight": torch.zeros(1), bent: torch.zeros(1, 2, 3)}
        with pytest.raises(WeightsError) as caught:
            load_expert(expert.card.name, weights=state, size="mini")
        message = str(caught.value)
        assert "\n" not in message and expert.card.name in message
        for part in (
            f"1 missing: {lost}",
            "1 unexpected: stray.weight",
            f"1 of another shape: {bent} (1, 2, 3) instead of",
        ):
            assert part in message

    @pytest.mark.parametrize("size", EXTREMES, ids=lambda size: "{}x{}".format(*size))
    def test_extreme_pictures(self, expert, size):
        tokens = features(expert, [EXTREMES[size]]).tokens
        assert bool(torch.isfinite(tokens).all())

    def test_weights_of_another_arch(self, expert):
        word = {"width": expert.arch["width"] * 2}
        with pytest.raises(WeightsError, match="of another shape") as caught:
            load_expert(expert.card.name, weights=expert.state_dict(), size="mini", arch=word)
        assert "\n" not in str(caught.value)
        with pytest.raises(WeightsError, match="missing"):
            deeper = {"depth": expert.arch["depth"] + 1}
            load_expert(expert.card.name, weights=expert.state_dict(), size="mini", arch=deeper)

    def test_a_picture_shared_between_experts(self, expert):
        """Another expert's reading of the same decoded pictures changes nothing."""
        shared = [DecodedImage(image) for image in pictures()]
        for other in ("clip", "vary", "deplot"):
            load_expert(other, size="mini").preprocess(shared)
        for compat in ("fixed", "published"):
            alone, together = expert.preprocess(pictures(), compat), expert.preprocess(shared, compat)
            assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())

    def test_full_size_on_the_meta_device(self, expert):
        with torch.device("meta"):
            full = expert_class(expert.card.name)(expert.card.full)
        published = {"clip": (48, 1024), "dinov2": (37, 1536), "vary": (32, 512), "codetr": (37, 256)}
        published |= {"pix2struct": (45, 1536), "deplot": (45, 768), "biomedclip": (14, 768), "sam": (64, 256)}
        side, channels = published[expert.card.name]
        assert full.grid == (side, side) and full.channels == channels


@pytest.mark.usefixtures("own_registry")
class TestRegistry:
    def test_unknown_name_lists_the_names(self):
        for use in (expert_card, load_expert):
            with pytest.raises(ValueError, match="unknown expert 'nope'") as caught:
                use("nope")
            assert all(name in str(caught.value) for name in POOL)

    def test_an_expert_from_anybody(self):
        card = ExpertCard(name="from-anybody", title="", description="", weights="", full={}, mini={})
        expert = register(type("FromAnybody", (VisionExpert,), {"card": card}))
        assert expert_class("from-anybody") is expert
        with pytest.raises(ValueError, match="'from-anybody' is taken by FromAnybody"):
            register(type("Another", (VisionExpert,), {"card": card}))
        with pytest.raises(ValueError, match="'dinov2' is taken"):
            register(type("Usurper", (VisionExpert,), {"card": ExpertCard(**{**vars(card), "name": "dinov2"})}))
        with pytest.raises(ValueError, match="from-anybody"):
            expert_card("nope")

    def test_an_expert_defined_again(self):
        """A notebook cell that is run twice."""
        for version in ("1", "2"):
            card = ExpertCard(name="again", title=version, description="", weights="", full={}, mini={})
            register(type("Again", (VisionExpert,), {"card": card, "__module__": __name__}))
        assert expert_card("again").title == "2" and expert_names().count("again") == 1
        assert expert_module("again") == __name__
        expert_class("again").__module__ = "__main__"
        with pytest.raises(ValueError, match="other processes cannot import"):
            expert_module("again")

    def test_buffers_made_where_the_parameters_are(self):
        """As timm's Swin makes its masks: they are not saved, and must not stay without numbers."""

        def masked(self, arch):
            VisionExpert.__init__(self, arch)
            self.scale = nn.Parameter(torch.ones(2))
            self.register_buffer("mask", torch.arange(2, device=self.scale.device), persistent=False)

        card = ExpertCard(name="masked", title="", description="", weights="", full={}, mini={})
        unused = dict.fromkeys(("grid", "preprocess", "forward"))
        register(type("Masked", (VisionExpert,), {"card": card, "__init__": masked, **unused}))
        assert [buffer.tolist() for buffer in load_expert("masked", size="mini").buffers()] == [[0, 1]]
        with pytest.raises(WeightsError, match="masked: its card names no public weights"):
            load_expert("masked")

    def test_unknown_size_and_arch_word(self):
        with pytest.raises(ValueError, match="unknown size 'huge'"):
            load_expert("clip", size="huge")
        with pytest.raises(ValueError, match="unknown arch word widht"):
            load_expert("clip", size="mini", arch={"widht": 3})

    @pytest.mark.parametrize("name", POOL)
    @pytest.mark.parametrize(
        "arch, problem",
        [
            ({"patch_size": 0}, "patch_size must be a whole number from 1, not 0"),
            ({"width": -64}, "width must be a whole number from 1, not -64"),
            ({"heads": "2"}, "heads must be a whole number from 1, not '2'"),
            ({"depth": 1.5}, "depth must be a whole number from 1, not 1.5"),
            ({"width": 100, "heads": 3}, "width 100 is not a multiple of heads 3"),
            ({"image_size": 3}, "image_size 3 is less than a patch of"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_an_arch_that_no_network_can_have(self, name, arch, problem):
        with pytest.raises(ValueError, match=f"{name}: {problem}"):
            load_expert(name, size="mini", arch=arch)

    def test_channels_follow_the_width_where_nothing_lies_between(self):
        for name in ("clip", "dinov2", "pix2struct", "deplot", "biomedclip"):
            with pytest.raises(ValueError, match=f"{name}: its features are as wide as its network: channels must be"):
                load_expert(name, size="mini", arch={"channels": 5})

    def test_position_tables_of_another_length(self):
        """Pix2Struct's numbers of rows and columns: only what the grid reads must be there."""
        long = load_expert("deplot", size="mini", arch={"pos_grid": 100})
        short = load_expert("deplot", weights=long.state_dict(), size="mini", arch={"pos_grid": 10})
        again = load_expert("deplot", weights=short.state_dict(), size="mini")
        assert torch.equal(features(short).tokens, features(long).tokens)
        assert torch.equal(features(again).tokens, features(long).tokens)
        with pytest.raises(WeightsError, match=r"of another shape: embeddings\.column_embedder"):
            load_expert("deplot", weights=short.state_dict(), size="mini", arch={"image_size": 160})

    def test_arch_overrides(self):
        expert = load_expert("dinov2", size="mini", arch={"width": 48, "image_size": 70})
        assert (expert.grid, expert.channels) == ((5, 5), 48)
        assert features(expert).tokens.shape == (3, 25, 48)


class TestWeightFiles:
    """Each form in which people have weights, on the smallest expert."""

    @pytest.fixture
    def small(self) -> VisionExpert:
        return load_expert("deplot", size="mini")

    @staticmethod
    def check(small, weights):
        assert torch.equal(features(load_expert("deplot", weights=weights, size="mini")).tokens, features(small).tokens)

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "checkpoint.pth"])
    @pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
    def test_one_file(self, tmp_path, small, name, folder):
        state, file = small.state_dict(), tmp_path / name
        if file.suffix == ".safetensors":
            save_file(state, file)
        else:
            torch.save({"state_dict": state} if file.suffix == ".pth" else state, file)
        (tmp_path / "config.json").write_text("{}")
        self.check(small, tmp_path if folder else str(file))

    def test_safetensors_win_over_a_pickle(self, tmp_path, small):
        save_file(small.state_dict(), tmp_path / "model.safetensors")
        (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
        self.check(small, tmp_path)

    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_shards(self, tmp_path, small, suffix):
        names = sorted(small.state_dict())
        where = {name: f"part-{index % 3}.{suffix}" for index, name in enumerate(names)}
        for file in set(where.values()):
            part = {name: small.state_dict()[name].clone() for name in names if where[name] == file}
            save_file(part, tmp_path / file) if suffix == "safetensors" else torch.save(part, tmp_path / file)
        (tmp_path / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
        self.check(small, tmp_path)
        (tmp_path / f"part-1.{suffix}").unlink()
        with pytest.raises(WeightsError, match=f"not there: part-1.{suffix}"):
            load_expert("deplot", weights=tmp_path, size="mini")

    def test_the_old_format_of_torch(self, tmp_path, small):
        torch.save(dict(small.state_dict()), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        self.check(small, tmp_path / "a.pth")

    def test_a_full_transformers_folder(self, tmp_path):
        from transformers import CLIPConfig, CLIPModel

        card = expert_card("clip")
        vision = dict(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=256,
            image_size=84,
            patch_size=14,
        )
        text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=32)
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()
        model.save_pretrained(tmp_path)
        expert = load_expert("clip", weights=tmp_path, size="mini", arch={"image_size": 84})
        pixels = torch.randn(2, 3, 84, 84)
        wanted = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(expert({"pixel_values": pixels}).tokens, wanted, atol=5e-5, rtol=0)
        assert load_expert("clip", weights=tmp_path, size="mini").grid == (12, 12)  # positions resized
        assert card.mini["image_size"] == 168

    @pytest.mark.parametrize("name", ["model.safetensors", "model.bin", "model.pth"])
    def test_torn(self, tmp_path, small, name):
        file = tmp_path / name
        save_file(small.state_dict(), file) if name.endswith("safetensors") else torch.save(small.state_dict(), file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(WeightsError, match="torn") as caught:
            load_expert("deplot", weights=file, size="mini")
        assert name in str(caught.value) and "\n" not in str(caught.value)

    def test_a_pickle_with_more_than_tensors_is_refused(self, tmp_path):
        torch.save({"a": torch.zeros(1), "b": subprocess.Popen}, tmp_path / "evil.bin")
        with pytest.raises(WeightsError, match="more than tensors"):
            load_expert("deplot", weights=tmp_path / "evil.bin", size="mini")

    def test_not_there(self, tmp_path):
        with pytest.raises(WeightsError, match="no such file or folder"):
            load_expert("deplot", weights=tmp_path / "gone", size="mini")
        with pytest.raises(WeightsError, match=r"no .* file in this folder"):
            load_expert("deplot", weights=tmp_path, size="mini")

    def test_more_than_one_candidate(self, tmp_path, small):
        for name in ("a.pth", "b.pth"):
            torch.save(small.state_dict(), tmp_path / name)
        with pytest.raises(WeightsError, match=r"more than one weights file \(a\.pth, b\.pth\)"):
            load_expert("deplot", weights=tmp_path, size="mini")

    @pytest.fixture
    def hub_cache(self, monkeypatch, tmp_path):
        """An empty cache of the hub's client, and no connection."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        return tmp_path

    def test_an_unreachable_hub_id(self, hub_cache):
        with pytest.raises(
            WeightsError, match="google/deplot: no file or folder here, and this machine does not reach the hub"
        ) as caught:
            load_expert("deplot")
        assert "pass its folder" in str(caught.value) and "\n" not in str(caught.value)

    def test_a_wrong_hub_id_is_told_from_a_missing_connection(self):
        from huggingface_hub.errors import RepositoryNotFoundError

        wrong_id = OSError("nothing is not a local folder")
        wrong_id.__cause__ = RepositoryNotFoundError("404", response=MagicMock())
        assert "check the id, or log in" in hub_problem(wrong_id)
        no_route = OSError("We couldn't connect")
        no_route.__context__ = ConnectionError("no route to host")
        assert "does not reach the hub" in hub_problem(no_route)
        assert hub_problem(OSError("disk\nfull")).startswith("it cannot be loaded (disk full)")

    @pytest.mark.parametrize("suffix", ["safetensors", "bin"])
    def test_a_cached_hub_id(self, hub_cache, small, suffix):
        snapshot = hub_cache / "models--someone--deplot" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (save_file if suffix == "safetensors" else torch.save)(small.state_dict(), snapshot / f"model.{suffix}")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        self.check(small, "someone/deplot")

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
    def test_peak_memory_is_the_mapped_file_and_the_result(self, tmp_path):
        """Of one file and of shards, in a process of its own: a whole copy in between would come to 100 MB more."""
        arch = {"width": 768, "depth": 4, "mlp_hidden": 2048, "heads": 8}
        state = load_expert("deplot", size="mini", arch=arch).state_dict()
        for shards in (1, 2):
            folder = tmp_path / str(shards)
            folder.mkdir()
            where = {name: f"part-{index % shards}.safetensors" for index, name in enumerate(sorted(state))}
            for file in set(where.values()):
                save_file({name: state[name] for name in state if where[name] == file}, folder / file)
            if shards > 1:
                (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        code = f"""
import torch
from pathlib import Path
from mova_core.experts import load_expert

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])

load_expert("deplot", size="mini")  # what a first load imports
for shards in (1, 2):
    for dtype in (torch.float32, torch.bfloat16):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        before, anonymous = kilobytes("VmRSS"), kilobytes("RssAnon")
        expert = load_expert("deplot", f"{tmp_path}/{{shards}}", size="mini", arch={arch!r}, dtype=dtype)
        print(kilobytes("VmHWM") - before, kilobytes("RssAnon") - anonymous)
        del expert
"""
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        size = sum(tensor.nbytes for tensor in state.values()) / 1024
        slack = max(tensor.nbytes for tensor in state.values()) / 1024 + 16_000
        assert size > 3 * slack
        for index, line in enumerate(out.splitlines()):
            peak, kept = map(int, line.split())
            half = index % 2
            # In the file's own dtype nothing is read yet; in half of it, the result comes beside the mapped file.
            assert peak < half * (size + size / 2) + slack and kept < half * size / 2 + slack

    def test_the_callers_tensors_stay_the_callers(self, small):
        state = dict(small.state_dict())
        loaded: Any = load_expert("deplot", weights=state, size="mini")
        loaded.layernorm.weight.add_(1)
        assert bool((state["layernorm.weight"] == 1).all())

    def test_the_file_stays_as_it_is(self, tmp_path, small):
        """Parameters on the CPU are the mapped file's own pages, until they are written to."""
        save_file(small.state_dict(), tmp_path / "model.safetensors")
        loaded: Any = load_expert("deplot", weights=tmp_path, size="mini")
        loaded.layernorm.weight.add_(1)
        self.check(small, tmp_path)


class TestBaseEncoderTrains:
    def test_every_parameter_gets_a_gradient(self):
        base = load_expert(BASE, size="mini").train().requires_grad_(True)
        base(base.preprocess(pictures())).tokens.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in base.named_parameters()}
        assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]

    def test_other_pictures_than_squares_of_its_size_are_refused(self):
        base = load_expert(BASE, size="mini")
        with pytest.raises(ValueError, match="clip reads 168-pixel squares"):
            base({"pixel_values": torch.zeros(1, 3, 84, 84)})


class TestBesideThePlainModules:
    """What transformers and timm ship, with the same weights, gives the same features; Co-DETR is written out."""

    @pytest.fixture(scope="class")
    def benchmark(self) -> Any:
        path = Path(__file__).resolve().parents[3] / "benchmarks" / "experts.py"
        spec = importlib.util.spec_from_file_location("experts_benchmark", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_same_features(self, benchmark, expert, attention):
        batch = expert.preprocess(pictures())
        with torch.no_grad():
            plain = benchmark.plain(expert, attention)(batch)
        torch.testing.assert_close(features(expert).tokens, plain, atol=5e-5, rtol=0)

    def test_same_pixels(self, benchmark):
        image = benchmark.photograph(96, 64)
        for name, published in benchmark.published_preprocessing().items():
            card = expert_card(name)
            with torch.device("meta"):  # preprocessing needs no network
                full = expert_class(name)({**card.full, "depth": 2})
            [made] = next(iter(full.preprocess([image]).values()))
            torch.testing.assert_close(made, published(image), atol=5e-5, rtol=0)

    @pytest.mark.parametrize("name", ["sam", "codetr"])
    def test_compiled_in_one_graph(self, name, monkeypatch):
        """As on a GPU: traced without a break at static shapes, and the traced arithmetic gives the same."""
        monkeypatch.setattr("mova_core.experts.window_vit.RelativeAttention.folded", True)
        expert = load_expert(name, size="mini")
        batch = expert.preprocess(pictures())
        exact = features(expert).tokens
        expert.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        with torch.no_grad():
            torch.testing.assert_close(expert(batch).tokens, exact, atol=5e-5, rtol=0)

import dataclasses
import json
import math
import re
import sys
import time

import pytest
import torch

from mova_core.experts import BASE, EXPERTS, expert_class, load_expert
from mova_core.experts.cost import (
    Measured,
    Profile,
    ProfileError,
    count_flops,
    device_kind,
    measure,
    read_profiles,
    write_profiles,
)

CPU = torch.device("cpu")


def on_meta(name: str):
    with torch.device("meta"):
        return expert_class(name)(expert_class(name).card.full).eval()


def test_flops_of_a_vit_are_those_of_its_formula():
    tokens, width, hidden, depth = 14 * 14 + 1, 768, 3072, 12
    patches = 2 * 14 * 14 * (3 * 16 * 16) * width
    linear = 2 * tokens * (4 * width * width + 2 * width * hidden)
    attention = 2 * 2 * tokens * tokens * width
    assert count_flops(on_meta("biomedclip")) == patches + depth * (linear + attention)


@pytest.mark.parametrize("name", (BASE, *EXPERTS))
def test_flops_of_the_published_experts(name):
    """Within 5 % of twice the parameters times the tokens, and attention, per layer (GFLOP; windows where they are)."""

    def vit(tokens, width, hidden, depth, span=None, gated=False):
        linear = 2 * tokens * (4 * width * width + (3 if gated else 2) * width * hidden)
        return depth * (linear + 4 * tokens * (span or tokens) * width)

    estimate = {
        "clip": vit(2305, 1024, 4096, 23),  # published: the last but one layer's output
        "dinov2": vit(1370, 1536, 4096, 39, gated=True),
        "vary": vit(4096, 768, 3072, 8, 196) + vit(4096, 768, 3072, 4),
        "codetr": vit(6400, 1024, 2730, 20, 256, gated=True) + vit(6400, 1024, 2730, 4, gated=True),
        "pix2struct": vit(2025, 1536, 3968, 18, gated=True),
        "deplot": vit(2025, 768, 2048, 12, gated=True),
        "biomedclip": vit(197, 768, 3072, 12),
        "sam": vit(4096, 1280, 5120, 28, 196) + vit(4096, 1280, 5120, 4),
    }[name]
    counted = count_flops(on_meta(name))
    assert counted is not None and 0.95 < counted / estimate < 1.05


def test_flops_that_depend_on_numbers_are_not_guessed():
    expert = on_meta("biomedclip")
    expert.register_forward_pre_hook(lambda module, args: torch.nonzero(args[0]["pixel_values"]))
    assert count_flops(expert) is None


class TestMeasure:
    """On passes of known cost: a tenth of a second and a hundredth per picture, as of a device that is half idle."""

    @pytest.fixture(scope="class")
    def expert(self):
        return load_expert("biomedclip", size="mini")

    def test_measuring_stops_where_speed_stops_growing(self, expert):
        done = []

        def run(batch):
            done.append(batch)
            time.sleep(0.1 if batch <= 4 else 0.025 * batch)

        profile = measure(expert, run, CPU, seconds=60)
        assert [measured.batch for measured in profile.batches] == [1, 2, 4, 8, 16] and max(done) == 16
        assert profile.best().batch == 4
        assert 25 < profile.best().images_per_second <= 40
        assert all(measured.peak_bytes is None or measured.peak_bytes > 1 << 20 for measured in profile.batches)

    def test_measuring_stops_where_memory_ends(self, expert):
        profile = measure(expert, lambda batch: torch.empty(1 if batch <= 4 else 1 << 60), CPU, seconds=60, largest=8)
        assert profile.batches[-1].batch <= 4
        with pytest.raises(RuntimeError, match="allocate memory"):
            measure(expert, lambda batch: torch.empty(1 << 60), CPU, seconds=60)

    def test_measuring_stops_where_time_ends(self, expert):
        started = time.monotonic()
        profile = measure(expert, lambda batch: time.sleep(0.3), CPU, seconds=2)  # endless growth
        assert profile.batches[-1].batch <= 2
        assert time.monotonic() - started < 4

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak within a time")
    def test_memory_of_a_pass_is_seen(self, expert):
        held = measure(expert, lambda batch: torch.ones(batch * (32 << 20)), CPU, seconds=60, largest=2).batches
        small, large = (measured.peak_bytes for measured in held)
        assert small is not None and large is not None
        assert large - small > 100 << 20  # 32 Mi floats more


ROW = {
    "expert": "sam",
    "device": "T4",
    "batches": [{"batch": 2, "images_per_second": 6.0}],
}  # by hand, the least of a profile


class TestFile:
    PROFILE = Profile(
        expert="sam",
        arch={"depth": 2, "global_blocks": [1]},
        dtype="float32",
        device="NVIDIA H100",
        threads=4,
        batches=tuple(
            Measured(batch=batch, images_per_second=speed, peak_bytes=peak << 30)
            for batch, speed, peak in ((1, 10.0, 2), (2, 19.0, 3), (4, 36.0, 5), (8, 37.0, 9))
        ),
    )

    def test_best(self):
        assert self.PROFILE.best().batch == 4, "8 is hardly faster"
        assert self.PROFILE.best(memory=4 << 30).batch == 2
        assert self.PROFILE.best(memory=1).batch == 1, "the least there is"
        assert [self.PROFILE.at(batch).batch for batch in (1, 3, 8, 100)] == [1, 4, 8, 8]

    def test_a_profile_fits_only_its_expert_dtype_and_device(self):
        expert = load_expert("sam", size="mini")
        mine = dataclasses.replace(self.PROFILE, arch=json.loads(json.dumps(expert.arch)), device=device_kind(CPU))
        assert mine.fits(expert, CPU) and mine.is_of(expert.card, "mini", "float32")
        assert not mine.is_of(expert.card, "full", "float32")
        assert not dataclasses.replace(mine, dtype="bfloat16").fits(expert, CPU)
        assert not dataclasses.replace(mine, device="NVIDIA H100").fits(expert, CPU)
        assert not dataclasses.replace(mine, expert="vary").fits(expert, CPU)

    def test_what_is_written_is_read_and_others_stay(self, tmp_path):
        slower = dataclasses.replace(self.PROFILE, batches=self.PROFILE.batches[:1])
        other = dataclasses.replace(self.PROFILE, device="NVIDIA L4")
        write_profiles(tmp_path / "p.json", [slower, other])
        write_profiles(tmp_path / "p.json", [self.PROFILE])
        assert read_profiles(tmp_path / "p.json") == [self.PROFILE, other]

    def test_a_person_may_leave_out_what_has_a_usual_value(self, tmp_path):
        (tmp_path / "p.json").write_text(json.dumps({"version": 1, "profiles": [ROW, ROW | {"size": "mini"}]}))
        full, mini = read_profiles(tmp_path / "p.json")
        card = expert_class("sam").card
        assert full.is_of(card, "full", "float32") and mini.is_of(card, "mini", "float32") and full.threads == 1
        assert full.best(memory=1) == Measured(batch=2, images_per_second=6.0, peak_bytes=None)

    @pytest.mark.parametrize(
        "content, message",
        [
            ("", "p.json is no JSON"),
            ([], "p.json is no profile"),
            ({"version": 1}, "p.json is no profile"),
            ({"version": 2, "profiles": []}, "p.json has version 2, this is 1: run `mova profile` anew"),
            ([7], "p.json, profile 2 is no object"),
            ([{}], "p.json, profile 2: `batches`, `device`, `expert` is missing"),
            ([ROW | {"batches": []}], "p.json, profile 2: `batches` must be a list"),
            ([ROW | {"batches": [{"batch": 1}]}], "p.json, profile 2, batch 1: `images_per_second` is missing"),
            ([ROW | {"batches": [{"batch": 0.5, "images_per_second": 1}]}], "batch 1: `batch` is 0.5"),
            ([ROW | {"batches": [{"batch": 1, "images_per_second": math.nan}]}], "`images_per_second` is nan"),
            ([ROW | {"batches": [{"batch": 1, "images_per_second": "9"}]}], "`images_per_second` is '9'"),
            ([ROW | {"speed": 1}], "profile 2: no such key as `speed`"),
            ([ROW | {"size": "tiny"}], "profile 2: `size` is 'tiny'"),
            ([ROW | {"expert": "eagle"}], "profile 2: "),
        ],
    )
    def test_another_file_is_refused(self, tmp_path, content, message):
        if isinstance(content, list) and content:
            content = {"version": 1, "profiles": [ROW, *content]}
        (tmp_path / "p.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ProfileError, match=re.escape(message)) as error:
            read_profiles(tmp_path / "p.json")
        assert "p.json" in str(error.value) and "\n" not in str(error.value)

    def test_no_file(self, tmp_path):
        with pytest.raises(ProfileError, match=r"p\.json: No such file or directory; `mova profile` writes one"):
            read_profiles(tmp_path / "p.json")

"""What a picture costs per expert: counted, measured or stated; and the bytes of its features."""

import pytest
import torch

from mova_core.experts import EXPERTS, expert_card
from mova_core.experts.cost import (
    Measured,
    Profile,
    count_flops,
    device_kind,
    expert_costs,
    feature_bytes,
    shapes_of,
    write_profiles,
)


def test_costs_are_gflops_by_default():
    flops = {name: count_flops(shapes_of(name, "mini")) for name in EXPERTS}
    assert {name: round(1e9 * cost) for name, cost in expert_costs(EXPERTS, "mini", {}).items()} == flops


def test_stated_costs_must_cover_every_expert():
    stated = dict.fromkeys(EXPERTS, 2.5)
    assert expert_costs(EXPERTS, "mini", {}, stated) == stated
    with pytest.raises(ValueError, match=r"no cost of dinov2, vary.*give a --cost for each"):
        expert_costs(EXPERTS, "mini", {}, {"sam": 1.0})
    with pytest.raises(ValueError, match="give one of them"):
        expert_costs(EXPERTS, "mini", {}, stated, "profile.json")


def test_measured_costs_are_milliseconds_on_this_cpu_at_batch_1(tmp_path):
    here = device_kind(torch.device("cpu"))
    images_per_second = {name: 10.0 * place for place, name in enumerate(EXPERTS, 1)}

    def profile(name: str, device: str) -> Profile:
        speeds = ((1, images_per_second[name]), (2, 9 * images_per_second[name]))
        batches = tuple(Measured(batch=batch, images_per_second=speed, peak_bytes=None) for batch, speed in speeds)
        arch = expert_card(name).mini
        return Profile(expert=name, arch=arch, dtype="float32", device=device, threads=1, batches=batches)

    path = tmp_path / "profile.json"
    write_profiles(path, [profile(name, "another") for name in EXPERTS])
    write_profiles(path, [profile(name, here) for name in EXPERTS if name != "sam"])
    with pytest.raises(ValueError, match=r"no cost of sam; .* run `mova profile` here"):
        expert_costs(EXPERTS, "mini", {}, None, path)
    write_profiles(path, [profile("sam", here)])
    costs = expert_costs(EXPERTS, "mini", {}, None, path)
    assert costs == {name: pytest.approx(1000 / speed) for name, speed in images_per_second.items()}
    for size, dtypes in (("full", {}), ("mini", dict.fromkeys(EXPERTS, "bfloat16"))):
        with pytest.raises(ValueError, match="no cost of dinov2"):
            expert_costs(EXPERTS, size, dtypes, None, path)


def test_feature_bytes_are_grid_times_channels_times_the_dtype():
    expert = shapes_of("sam", "mini")
    assert feature_bytes("sam", "mini", "bfloat16") == 2 * expert.grid[0] * expert.grid[1] * expert.channels

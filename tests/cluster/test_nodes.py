from typing import Any

import pytest

from cluster.nodes import GIB, NodeType, PlanError, group_identical, profiles_on, read_cluster
from mova_core.experts.cost import Profile

# What NVIDIA's driver calls a GPU, and the accelerator-type label that Ray gives its node.
LABELS = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA A10G": "A10G",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100",
    "Tesla P100-PCIE-16GB": "P100",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX-PRO-6000",
    "NVIDIA GeForce RTX 4090": "GeForce-RTX-4090",
}


def profile(device: str, **settings: Any) -> Profile:
    return Profile(expert="sam", arch={}, dtype="float32", device=device, threads=1, batches=(), **settings)


def test_profiles_measured_without_ray_belong_to_the_label_that_their_device_names():
    profiles = [profile(device) for device in (*LABELS, "cpu AMD EPYC 7763")]
    for label in LABELS.values():
        devices = [measured.device for measured in profiles_on(label, "sam", profiles)]
        assert devices == [device for device, expected in LABELS.items() if expected == label]
    assert [measured.device for measured in profiles_on(None, "sam", profiles)] == ["cpu AMD EPYC 7763"]
    assert profiles_on("T4", "sam", [profile("T4")]), "a profile written by hand"
    assert not profiles_on("T4", "vary", profiles), "of another expert"


def test_the_label_that_a_profile_records_decides():
    own = profile("NVIDIA A100-SXM4-40GB", accelerator="A100-40G")  # a label that an administrator set
    assert profiles_on("A100-40G", "sam", [own]) == [own] and not profiles_on("A100", "sam", [own])


def test_a_cluster_file_is_read_and_a_wrong_one_refused(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "- {count: 4, cpus: 64, memory_gib: 256, accelerator: A100, gpus: 8, gpu_memory_gib: 40}\n"
        "- {cpus: 32, memory_gib: 0.5}\n"
    )
    gpus = NodeType(count=4, cpus=64, memory=256 * GIB, accelerator="A100", gpus=8, gpu_memory=40 * GIB)
    assert read_cluster(file) == [gpus, NodeType(cpus=32, memory=GIB // 2)]
    for text, wrong in (
        ("- {cpus: 4}", r"cluster\.yaml, machine 1: memory_gib is missing"),
        ("- {cpus: 4, memory_gib: 1, gpu: 2}", r"no such key gpu; there are accelerator, count, cpus"),
        ("- {cpus: 4, memory_gib: 1, gpus: 2}", r"gpus: and accelerator: \(e\.g\. A100\) go together"),
        ("- {cpus: x, memory_gib: 1}", r"machine 1: could not convert"),
        ("- {cpus: 4, memory_gib: 1, count: 0}", r"count must be at least 1"),
        ("cpus: 4", r"write a list of machines"),
    ):
        file.write_text(text)
        with pytest.raises(PlanError, match=wrong):
            read_cluster(file)


def test_identical_live_nodes_are_grouped():
    def row(alive=True, **resources):
        return {"Alive": alive, "Resources": {"memory": 64.3 * GIB} | resources}

    a100 = {"CPU": 16.0, "GPU": 2.0, "accelerator_type:A100": 1.0}
    rows = [row(**a100), row(**a100, memory=64.9 * GIB), row(CPU=4.0), row(False, CPU=4.0), row(CPU=4.0, GPU=1.0)]
    assert group_identical(rows) == [
        NodeType(count=2, cpus=16.0, memory=64 * GIB, accelerator="A100", gpus=2),
        NodeType(count=2, cpus=4.0, memory=64 * GIB),
    ]

from dataclasses import replace

import pytest

from cluster.nodes import PlanError
from cluster.pools import PoolSpec, fit_pools, know_memory, plan_pools, read_pools, write_pools
from mova_core.experts.cost import Measured, Profile


def test_pool_is_read_from_the_command_line():
    pool = PoolSpec.parse("sam=2..8,gpu=0.5,accelerator=A100,batch=16")
    assert (pool.min_size, pool.max_size, pool.gpu, pool.accelerator, pool.batch) == (2, 8, 0.5, "A100", 16)
    assert pool.cpus == 0.25, "beside a GPU an actor holds little CPU"
    assert PoolSpec.parse("clip=3").cpus == 1.0
    assert PoolSpec.parse("clip=1,cpu=0,batch=1,gpu=0") == PoolSpec(expert="clip", cpu=0.0, batch=1)


@pytest.mark.parametrize(
    "text",
    ["sam=1", "sam=2..8", "sam=1,cpu=0", "sam=3,gpu=0.5,cpu=0.25,accelerator=A100,batch=16", "sam=1,gpu=2,batch=1"],
)
def test_what_is_written_is_read_back(text, tmp_path):
    pool = PoolSpec.parse(text)
    assert str(pool) == str(replace(pool, rate=7.5)) == text
    pools = [pool, replace(pool, rate=7.5)]
    write_pools(tmp_path / "pools.yaml", pools)
    assert read_pools(tmp_path / "pools.yaml") == pools


@pytest.mark.parametrize(
    "text", ["sam", "sam=", "sam=0", "sam=4..2", "sam=1,gpu=x", "sam=1,gpus=1", "sam=1,batch=0", "=1"]
)
def test_malformed_pool_is_refused(text):
    with pytest.raises(PlanError, match="--pool"):
        PoolSpec.parse(text)


def test_every_expert_gets_a_pool():
    pools = plan_pools(["sam", "vary"], ["vary=1..4"])
    assert [(pool.expert, pool.max_size) for specs in pools.values() for pool in specs] == [("sam", 1), ("vary", 4)]
    with pytest.raises(PlanError, match="clip"):
        plan_pools(["sam"], ["clip=1"])
    with pytest.raises(PlanError, match="twice for the CPU"):
        plan_pools(["sam"], ["sam=1", "sam=2"])
    kinds = ["sam=2,gpu=1,accelerator=A100", "sam=4,gpu=0.5,accelerator=L4", "sam=1"]
    assert [pool.accelerator for pool in plan_pools(["sam"], kinds)["sam"]] == ["A100", "L4", None]
    with pytest.raises(PlanError, match=r"twice for 1 of a A100"):
        plan_pools(["sam"], [kinds[0], *kinds])


def test_pools_are_read_from_a_file(tmp_path):
    file = tmp_path / "pools.yaml"
    file.write_text("- {expert: sam, size: 2..8, gpu: 0.5, accelerator: A100, batch: 16, rate: 7.5}\n- expert: vary\n")
    sam, vary = read_pools(file)
    assert sam == replace(PoolSpec.parse("sam=2..8,gpu=0.5,accelerator=A100,batch=16"), rate=7.5)
    assert vary == PoolSpec(expert="vary")
    for text, wrong in (
        ("- {expert: sam, size: 8..2}", r"pool 1: the size must"),
        ("- {expert: sam, gpus: 1}", r"pools\.yaml, pool 1: write NAME=SIZE"),
        ("expert: sam", r"write a list of pools"),
        ("- sam", r"write a list of pools"),
        ("- {size: 1}", r"write a list of pools"),
        ("[", r"is no YAML"),
    ):
        file.write_text(text)
        with pytest.raises(PlanError, match=wrong):
            read_pools(file)
    with pytest.raises(PlanError, match="No such file"):
        read_pools(tmp_path / "none.yaml")


def test_pools_are_cut_to_the_cluster_and_leave_a_cpu_free():
    pools = fit_pools(plan_pools(["sam"], ["sam=1..8"]), {"CPU": 4})
    assert [pool.max_size for pool in pools["sam"]] == [3]
    with pytest.raises(PlanError, match=r"pool sam: 4 actors hold 4 CPUs .* has 4 CPUs"):
        fit_pools(plan_pools(["sam"], ["sam=4"]), {"CPU": 4})
    with pytest.raises(PlanError, match="0 GPUs"):
        fit_pools(plan_pools(["sam"], ["sam=1,gpu=1"]), {"CPU": 4})
    with pytest.raises(PlanError, match="no node has a A100"):
        fit_pools(plan_pools(["sam"], ["sam=1,gpu=1,accelerator=A100"]), {"CPU": 4, "GPU": 1, "accelerator_type:L4": 1})


def test_a_pool_that_fits_exactly_is_kept():
    [pool] = fit_pools(plan_pools(["sam"], ["sam=3"]), {"CPU": 4})["sam"]
    assert (pool.min_size, pool.max_size) == (3, 3)
    exact = PoolSpec(expert="sam", min_size=1, max_size=3, memory=2)
    assert fit_pools({"sam": [exact]}, {"CPU": 9, "memory": 6})["sam"] == (exact,)
    assert fit_pools({"sam": [replace(exact, min_size=3)]}, {"CPU": 9, "memory": 6})["sam"][0].max_size == 3
    [pool] = fit_pools(plan_pools(["sam"], ["sam=2..3"]), {"CPU": 9})["sam"]
    assert (pool.min_size, pool.max_size) == (2, 3), "a pool never grows over the size that was given"
    tenths = fit_pools(plan_pools(["sam"], ["sam=1..10,gpu=0.1"]), {"CPU": 9, "GPU": 1})["sam"]
    assert tenths[0].max_size == 10, "ten tenths make one GPU"
    with pytest.raises(PlanError, match="has 0 CPUs"):
        fit_pools(plan_pools(["sam"], ["sam=1,cpu=0.5"]), {})


def test_pools_of_one_expert_must_fit_together():
    cluster = {"CPU": 8, "GPU": 3, "accelerator_type:L4": 1, "accelerator_type:A100": 1}
    asked = ["sam=1..8,gpu=1,accelerator=A100", "sam=1..8,gpu=0.5,accelerator=L4"]
    assert [pool.max_size for pool in fit_pools(plan_pools(["sam"], asked), cluster)["sam"]] == [2, 2]
    with pytest.raises(PlanError, match=r"pool sam: 5 actors hold 1\.25 CPUs and 3\.5 GPUs"):
        fit_pools(plan_pools(["sam"], ["sam=2,gpu=1,accelerator=A100", "sam=3,gpu=0.5,accelerator=L4"]), cluster)
    with pytest.raises(PlanError, match=r"no node has a T4 \(this cluster has A100, L4\)"):
        fit_pools(plan_pools(["sam"], [asked[0], "sam=1,gpu=1,accelerator=T4"]), cluster)


def test_memory_of_a_profile_limits_pools_on_cpus():
    batches = [Measured(batch=batch, images_per_second=batch, peak_bytes=batch << 30) for batch in (1, 2, 4)]
    profile = Profile(expert="sam", arch={}, dtype="float32", device="cpu X", threads=1, batches=batches)
    on_gpu = Profile(expert="sam", arch={}, dtype="float32", device="NVIDIA L4", threads=1, batches=batches)

    def memory(pool: str, *profiles: Profile) -> int:
        return know_memory(plan_pools(["sam", "vary"], [pool]), profiles)["sam"][0].memory >> 30

    assert memory("sam=1", profile) == 4, "its best batch"
    assert memory("sam=1,batch=2", profile) == 2
    assert memory("sam=1,gpu=1", profile) == memory("sam=1", on_gpu) == memory("vary=1", on_gpu) == 0

    pools = know_memory(plan_pools(["sam"], ["sam=1..8,batch=2"]), [profile])
    assert fit_pools(pools, {"CPU": 32, "memory": 7 << 30})["sam"][0].max_size == 3
    with pytest.raises(PlanError, match=r"pool sam: 1 actors take 2\.0 GiB as profiled, but the cluster has 1\.0 GiB"):
        fit_pools(pools, {"CPU": 32, "memory": 1 << 30})

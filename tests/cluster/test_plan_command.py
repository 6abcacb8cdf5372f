import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.pools import read_pools
from mova_core.experts import expert_card
from mova_core.experts.cost import write_profiles
from pipelines.cli.main import app
from tests.pipelines.cli.json_page import check

DOCS = Path(__file__).parents[2] / "docs" / "placement.md"


@pytest.mark.parametrize("chance", [5], indirect=True)
def test_a_plan_for_the_cluster_of_the_docs(chance, tmp_path):
    [cluster] = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "cluster.yaml").write_text(cluster)
    profiles = [measured for measured in chance.profiles(["A100", "L4"]) if measured.expert in ("vary", "biomedclip")]
    write_profiles(
        tmp_path / "p.json", [replace(measured, arch=dict(expert_card(measured.expert).full)) for measured in profiles]
    )
    base = ["plan", "--profile", str(tmp_path / "p.json"), "--cluster", str(tmp_path / "cluster.yaml"), "--quiet"]
    command = [*base, "--dtype", "bfloat16", "--wanted", "vary=300000", "--wanted", "biomedclip=600000"]

    completed = CliRunner().invoke(app, [*command, "--simulate", "--output", str(tmp_path / "pools.yaml"), "--json"])
    plan = json.loads(completed.stdout)
    check("plan", plan)
    assert completed.stderr == "", "neither bars nor warnings"
    assert plan["images_per_second"] == pytest.approx(plan["simulated"]["images_per_second"], rel=0.1)
    pools = read_pools(tmp_path / "pools.yaml")
    assert [(pool.expert, pool.max_size, pool.rate) for pool in pools] == [
        (pool["expert"], pool["max_size"], pool["rate"]) for pool in plan["pools"]
    ]
    assert {pool.expert for pool in pools} == {"vary", "biomedclip"}

    shown = CliRunner().invoke(app, [*command, "--simulate", "--store-mb-s", "100"], env={"COLUMNS": "200"}).stdout
    assert all(
        word in shown
        for word in ("images/s that have passed all experts", "bottleneck:", "one more A100", "simulated:")
    )
    limit = 100 * 2**20 / (2 * (32 * 32 * 512 / 2 + 14 * 14 * 768))  # images/s, of which every other goes through vary
    assert float(re.findall(r"simulated: ([\d.,]+)", shown)[0].replace(",", "")) == pytest.approx(limit, rel=0.05)
    assert "size full in float32" in str(CliRunner().invoke(app, base).exception)
    assert CliRunner().invoke(app, [*base, "--wanted", "vary"]).exit_code == 2

"""The walls of the house: who may import whom, and that the core starts nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "mova_core": set(),
    "cluster": {"mova_core"},
    "actors": {"mova_core"},
    "pipelines": {"mova_core", "actors", "cluster"},
}


def imported(path: Path) -> set[str]:
    """Top-level packages a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it goes"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    forbidden = set(ROOMS) - ROOMS[room] - {room} | ({"ray"} if room == "mova_core" else set())
    broken = {str(path.relative_to(ROOT)): found for path in files if (found := imported(path) & forbidden)}
    assert not broken


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    ).stdout.strip()


def test_core_works_without_ray_installed_and_lists_its_experts_without_their_networks():
    """Every module of the core is imported with `ray` made unimportable, as on a machine that does not have it."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "mova_core").rglob("*.py")
    )
    code = f"""
import importlib, sys
sys.modules["ray"] = None
from mova_core.experts import EXPERTS, expert_card
cards = [expert_card(name) for name in EXPERTS]
print([name for name in sys.modules if name == "timm" or name.startswith("transformers.models")])
for module in {modules!r}:
    importlib.import_module(module)
print("ok")
"""
    assert run(code).splitlines() == ["[]", "ok"]


def test_command_line_starts_without_torch():
    code = "import sys, pipelines.cli.main; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_pictures_are_inspected_without_torch():
    code = "import sys, pipelines.precompute.inspect_images; print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    assert run(code) == "[]"


def _private_of_ray(path: Path) -> list[str]:
    """Uses of private modules, arguments and attributes of Ray in a file, as far as its syntax shows them."""
    found = []
    uses_ray = "ray" in imported(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif uses_ray and isinstance(node, ast.keyword) and (node.arg or "").startswith("_"):
            names = [f"ray.{node.arg}"]  # a private argument, e.g. `_internal=True`
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] in ("ray", "serve") and any(part.startswith("_") and part != "__version__" for part in parts):
                found.append(f"line {getattr(node, 'lineno', 0)}: {name}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_only_the_public_api_of_ray_is_used(room):
    """Private parts of Ray change in any release without a word."""
    used = {
        str(path.relative_to(ROOT)): found for path in (ROOT / room).rglob("*.py") if (found := _private_of_ray(path))
    }
    assert not used


def test_pipelines_reach_into_no_private_attribute_of_another_object():
    """Ray Data's executors and pools were once reached through attributes such as `pool._config`."""
    used = {
        f"{path.relative_to(ROOT)}:{node.lineno}": ast.unparse(node)
        for path in (ROOT / "pipelines").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in ("_replace", "_asdict", "_fields", "_make")  # public members of named tuples
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    assert not used

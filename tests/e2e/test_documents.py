"""Every snippet of README.md and docs/ runs as printed, in processes without this suite's environment.

A fenced block of `sh` or `python` is run, page by page, in the order of the page and in one folder per page. A block behind the comment
`<!-- not run: reason -->` needs what no test machine has (a GPU, a hub, a cluster, hours): its `mova` commands must still parse, and its
Python must compile. Other fenced blocks are output (`text`) or files (`json`, `yaml`). A `text` block right after a `python` block is what
the latter prints.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import ray
import typer
from PIL import Image

from pipelines.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "python", "text", "json", "yaml"}
FENCE = re.compile(
    r"^(<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.M | re.S
)
PRINTED = re.compile(r"\s*^```text\n(.*?)^```$", re.M | re.S)


class Snippet(NamedTuple):
    """One fenced block of a page."""

    language: str
    code: str
    reason: str | None  # why no test can run it
    line: int
    printed: str | None  # what the page says that a Python snippet prints


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        printed = PRINTED.match(text, match.end()) if match["language"] == "python" else None
        line = text[: match.start()].count("\n") + 1
        found.append(Snippet(match["language"], match["code"], match["reason"], line, printed and printed[1]))
    return found


def runnable(page: Path) -> list[Snippet]:
    return [block for block in snippets(page) if block.language in ("sh", "python") and block.reason is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_name_their_language(page):
    assert page.read_text().count("```") == 2 * len(snippets(page)), "a fence that this test does not see"
    assert {block.language for block in snippets(page)} <= LANGUAGES


def commands(code: str) -> list[list[str]]:
    """The `mova` commands of a shell snippet, split as a shell splits them, without `mova`."""
    lines = (line.split(" # ")[0] for line in code.replace("\\\n", " ").splitlines())
    return [shlex.split(line)[1:] for line in lines if line.startswith("mova ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_not_run_exist(page):
    for block in snippets(page):
        if block.language == "python":
            compile(block.code, f"{page.name}:{block.line}", "exec")
        for arguments in commands(block.code) if block.language == "sh" else ():
            command = typer.main.get_command(app)
            context = typer.Context(command, info_name="mova")
            while isinstance(command, typer.core.TyperGroup):
                if arguments[0] not in command.commands and "run" in command.commands:
                    arguments = ["run", *arguments]  # `mova precompute SOURCE` is `mova precompute run SOURCE`
                name, found, arguments = command.resolve_command(context, arguments)  # UsageError where there is none
                assert found is not None
                command, context = found, typer.Context(found, info_name=name, parent=context)
            command.make_parser(context).parse_args(list(arguments))  # raises on an option that does not exist


def stranger(home: Path) -> dict[str, str]:
    """The environment of somebody who has installed the project and nothing else."""
    home.mkdir(exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    one_thread = {"OMP_NUM_THREADS": "1"}  # for the machine's sake: two workers of two threads each wait for two cores
    return {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT), "TERM": "dumb"} | one_thread


def running_cluster() -> dict[str, str]:
    """The variables that connect a command to this session's cluster."""
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "disabled"}


def prepare(folder: Path, demo: Path) -> None:
    """What the pages take for granted: the demo's folder, and a few pictures and records."""
    (folder / ".demo").symlink_to(demo, target_is_directory=True)
    (folder / "pictures").mkdir()
    drawn = np.random.default_rng(5)
    for name in ("cat.png", "dog.png", "picture.png", *(f"pictures/{number}.png" for number in range(6))):
        Image.fromarray(drawn.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    turns = [{"from": "human", "value": "<image>\nIs it bright?"}, {"from": "gpt", "value": "no"}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(6)]
    (folder / "data.json").write_text(json.dumps(records))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.stem)
def test_snippets_run_as_printed(page, demo_folder, tmp_path):
    prepare(tmp_path, demo_folder)
    # Each of the tutorial's commands would start a cluster, which costs some ten CPU-seconds; those of the other pages do.
    environment = stranger(tmp_path / "home") | (running_cluster() if page.stem == "tutorial" else {})
    for block in runnable(page):
        run = ["bash", "-euo", "pipefail", "-c"] if block.language == "sh" else [sys.executable, "-c"]
        done = subprocess.run(
            [*run, block.code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{page.name}, line {block.line}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert block.printed is None or done.stdout == block.printed, f"{page.name}, line {block.line}"

"""docs/features.md: each snippet runs as printed, in a process of its own, with a newcomer's environment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PREFIXES = ("RAY_", "HF_", "OMP_", "MALLOC_")  # of variables that the test suite or a user's shell may set


@pytest.mark.ray
def test_snippets_run_as_printed(tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "features.md").read_text(), re.S)
    for name, colour in (("cat", "orange"), ("dog", "brown")):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    outputs = []
    for number, snippet in enumerate(snippets):
        script = tmp_path / f"snippet_{number}.py"
        script.write_text(snippet)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, script.name],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        outputs.append(done.stdout.splitlines()[-1])
    assert outputs == ["torch.Size([64, 32]) (8, 8)", "2 epochs done", "2 features"]

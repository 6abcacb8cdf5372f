"""No file but uris.py tells URLs from paths: a second way to do so once made `s3://bucket/x` a local folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def marks_of_urls(path: Path) -> list[int]:
    """Lines with a string that serves to find or to cut off a scheme; text with a whole URL in it is none."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.endswith("://")
        and " " not in node.value.strip()
    ]


@pytest.mark.parametrize("room", ["mova_core", "actors", "pipelines", "cluster"])
def test_only_uris_knows_the_mark_of_a_url(room):
    files = [path for path in (ROOT / room).rglob("*.py") if path.name != "uris.py"]
    found = {str(path.relative_to(ROOT)): lines for path in files if (lines := marks_of_urls(path))}
    assert files and not found

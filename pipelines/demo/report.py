"""The demo's report: one self-contained HTML page (report.html.j2) with the questions, the experts chosen and their gate weights."""

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mova_core.experts import EXPERTS, expert_card
from mova_core.images import load_image
from mova_core.io.atomic import write_atomic

EXAMPLES = 4  # shown per kind of picture
# Seven of Observable's ten colours, in the order of the pool.
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2")


def write_report(path: Path, result: dict[str, Any], answers: Sequence[dict[str, Any]], stages: dict[str, Any]) -> None:
    """Writes the page.

    Args:
        path: HTML file.
        result: what `mova demo --json` prints.
        answers: one mapping per test question, as `evaluate` returns them.
        stages: stage -> its numbers, `seconds` among them.
    """
    # Questions and file names come from data: the template escapes every value.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "colour": _colour,
        "thumbnail": _thumbnail,
        "title_of": lambda name: expert_card(name).title,
        "file_name": lambda file: Path(file).name,
    }
    by_kind: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        by_kind[answer["kind"]].append(answer)
    page = environment.get_template("report.html.j2").render(
        result=result,
        questions=len(answers),
        stages=stages,
        longest=max((row["seconds"] for row in stages.values()), default=1.0) or 1.0,
        examples={kind: _examples(of_kind) for kind, of_kind in sorted(by_kind.items())},
    )
    write_atomic(path, page)


def _examples(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few answers on different pictures, right and wrong ones in the proportion they have."""
    unique = list({answer["image"]: answer for answer in answers}.values())
    right = [answer for answer in unique if answer["correct"]]
    wrong = [answer for answer in unique if not answer["correct"]]
    share = sum(answer["correct"] for answer in answers) / len(answers)
    count = min(len(right), round(EXAMPLES * share))
    return (right[:count] + wrong)[:EXAMPLES] if len(wrong) >= EXAMPLES - count else (right + wrong)[:EXAMPLES]


def _colour(name: str) -> str:
    return COLOURS[EXPERTS.index(name) % len(COLOURS)] if name in EXPERTS else "#777"


def _thumbnail(path: str) -> str:
    """The picture as a data URI, at most 340 pixels a side."""
    image = load_image(path)
    image.thumbnail((340, 340))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"

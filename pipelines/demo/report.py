"""The demo's report: one self-contained HTML page with what was asked, which experts were chosen, and how they were weighed."""

import base64
import html
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mova_core.experts import EXPERTS, expert_card
from mova_core.images import load_image

EXAMPLES = 4  # shown per kind of picture
COLOURS = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
)  # Observable's ten, in pool order

_STYLE = """
:root{color-scheme:light;--ink:#1c2330;--soft:#5c6675;--line:#e3e7ee;--good:#1f8a4c;--bad:#c0392b}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);margin:0;background:#f6f7f9}
main{max-width:1080px;margin:auto;padding:32px 24px}
h1{margin:0 0 4px;font-size:26px}h2{margin:36px 0 12px;font-size:19px}p{max-width:72ch}
.soft{color:var(--soft)}.note{background:#fff7e0;border:1px solid #f0dfae;border-radius:8px;padding:10px 14px}
table{border-collapse:collapse;background:#fff;border:1px solid var(--line);border-radius:8px}
th,td{padding:7px 12px;text-align:left;border-bottom:1px solid var(--line)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(470px,1fr));gap:16px}
.card{background:#fff;border:1px solid var(--line);border-radius:10px;padding:14px;display:flex;gap:14px}
.card img{width:170px;height:170px;object-fit:contain;background:#eef0f4;border-radius:6px;flex:none}
.q{font-weight:600}.ok{color:var(--good)}.no{color:var(--bad)}
.chip{display:inline-block;border-radius:20px;padding:0 9px;margin:2px 4px 2px 0;color:#fff;font-size:12.5px}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
"""


def write_report(path: Path, result: dict[str, Any], answers: Sequence[dict[str, Any]], stages: dict[str, Any]) -> None:
    """Writes the page.

    Args:
        result: what `mova demo --json` prints.
        answers: one mapping per test question, as `evaluate` gives them.
        stages: stage -> its numbers, `seconds` among them.
    """
    by_kind: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for answer in answers:
        by_kind[answer["kind"]].append(answer)
    body = [
        "<h1>MoVA on Ray: demo report</h1>",
        f"<p class=soft>{len(answers)} test questions on pictures, tables and texts that training never saw. "
        f"{result['features_computed']} features computed, {result['features_reused']} reused, "
        f"{result['seconds']:.0f} s, peak memory {result['peak_bytes'] / 2**30:.1f} GiB.</p>",
        "<p class=note>The vision experts are frozen <b>random</b> networks at size mini and the language model is a small one "
        "trained from nothing in this run. The numbers show that every part works together, not what MoVA can do.</p>",
        "<h2>Accuracy by kind of picture</h2>",
        _accuracy_chart(result["kinds"]),
        _kinds_table(result["kinds"]),
        "<h2>Time by stage</h2>",
        _stage_chart(stages),
        "<h2>Answers, and why</h2>",
        "<p class=soft>Bars: weight the dynamic gate gave each routed expert in every adapter block.</p>",
    ]
    for kind, given in sorted(by_kind.items()):
        body.append(f"<h2>{html.escape(kind)}</h2><div class=cards>{''.join(map(_card, _pick(given)))}</div>")
    body.append("<h2>Quarantined pictures</h2>" + _quarantine(result["quarantined"]))
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>MoVA on Ray: demo</title><style>{_STYLE}</style><main>"
    path.write_text(page + "".join(body) + "</main></html>", encoding="utf-8")


def _pick(given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few answers on different pictures, right and wrong ones in the proportion they have."""
    unique = list({answer["image"]: answer for answer in given}.values())
    right = [answer for answer in unique if answer["correct"]]
    wrong = [answer for answer in unique if not answer["correct"]]
    share = sum(answer["correct"] for answer in given) / len(given)
    count = min(len(right), round(EXAMPLES * share))
    return (right[:count] + wrong)[:EXAMPLES] if len(wrong) >= EXAMPLES - count else (right + wrong)[:EXAMPLES]


def _card(answer: dict[str, Any]) -> str:
    verdict = "<b class=ok>right</b>" if answer["correct"] else "<b class=no>wrong</b>"
    chips = "".join(_chip(name) for name in answer["experts"]) or "<span class=soft>none: base encoder alone</span>"
    words = html.escape(answer["router"] if answer["router"] is not None else "forced")
    return (
        f"<div class=card><img src='{_thumbnail(answer['image'])}' alt=''><div><div class=q>{html.escape(answer['question'])}</div>"
        f"<div>answer <b>{html.escape(answer['answer']) or '(nothing)'}</b>, truth <b>{html.escape(answer['truth'])}</b>: {verdict}</div>"
        f"<div class=soft>router said “{words}”</div><div>{chips}</div>{_gate_chart(answer)}</div></div>"
    )


def _chip(name: str) -> str:
    return f"<span class=chip style='background:{_colour(name)}' title='{html.escape(expert_card(name).title)}'>{name}</span>"


def _colour(name: str) -> str:
    return COLOURS[EXPERTS.index(name) % len(COLOURS)] if name in EXPERTS else "#777"


def _gate_chart(answer: dict[str, Any]) -> str:
    """One row of stacked gate weights per adapter block."""
    if not answer["experts"]:
        return ""
    rows = []
    for block, gates in enumerate(answer["gates"]):
        y, x = 4 + block * 20, 52.0
        rows.append(f"<text x=0 y={y + 11}>block {block + 1}</text>")
        for name in answer["experts"]:
            width = 190 * gates.get(name, 0.0)
            label = f"<title>{name}: {gates.get(name, 0.0):.2f}</title>"
            rows.append(f"<rect x={x:.1f} y={y} width={width:.1f} height=14 fill='{_colour(name)}'>{label}</rect>")
            if width > 26:
                rows.append(f"<text x={x + 4:.1f} y={y + 11} style='fill:#fff'>{gates.get(name, 0.0):.2f}</text>")
            x += width
    return f"<svg width=246 height={8 + 20 * len(answer['gates'])}>{''.join(rows)}</svg>"


def _accuracy_chart(kinds: dict[str, dict[str, Any]]) -> str:
    """Accuracy per kind as a bar, chance as a tick across it."""
    rows = []
    for at, (kind, row) in enumerate(kinds.items()):
        y = 6 + 28 * at
        rows.append(f"<text x=0 y={y + 14}>{html.escape(kind)}</text>")
        rows.append(f"<rect x=90 y={y} width=500 height=20 fill='#e9edf3'/>")
        rows.append(f"<rect x=90 y={y} width={500 * row['accuracy']:.1f} height=20 fill='#4269d0'/>")
        if row["chance"] is not None:
            x = 90 + 500 * row["chance"]
            rows.append(f"<line x1={x:.1f} x2={x:.1f} y1={y - 3} y2={y + 23} stroke='#1c2330' stroke-width=2 />")
        rows.append(f"<text x=600 y={y + 14}>{100 * row['accuracy']:.1f} %</text>")
    legend = f"<text x=90 y={22 + 28 * len(kinds)}>bar: accuracy, line: chance (most frequent training answer of the same form)</text>"
    return f"<svg width=680 height={34 + 28 * len(kinds)}>{''.join(rows)}{legend}</svg>"


def _kinds_table(kinds: dict[str, dict[str, Any]]) -> str:
    head = "<tr><th>kind<th class=n>questions<th class=n>accuracy<th class=n>chance<th>experts picked (times)</tr>"
    rows = [
        f"<tr><td>{html.escape(kind)}<td class=n>{row['questions']}<td class=n>{100 * row['accuracy']:.1f} %"
        f"<td class=n>{_percent(row['chance'])}<td>"
        + " ".join(f"{_chip(name)}{count}" for name, count in row["experts"].items())
        for kind, row in kinds.items()
    ]
    return f"<table>{head}{''.join(rows)}</table>"


def _stage_chart(stages: dict[str, Any]) -> str:
    longest = max((row["seconds"] for row in stages.values()), default=1.0) or 1.0
    rows = []
    for at, (name, row) in enumerate(stages.items()):
        y, width = 4 + 22 * at, 420 * row["seconds"] / longest
        rows.append(
            f"<text x=0 y={y + 12}>{html.escape(name)}</text><rect x=110 y={y} width={width:.1f} height=16 fill='#6cc5b0'/>"
        )
        rows.append(f"<text x={116 + width:.1f} y={y + 12}>{row['seconds']:.0f} s</text>")
    return f"<svg width=620 height={8 + 22 * len(stages)}>{''.join(rows)}</svg>"


def _quarantine(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return "<p class=soft>none</p>"
    lines = [f"<tr><td>{html.escape(Path(row['path']).name)}<td>{html.escape(row['reason'])}" for row in rows]
    return f"<table><tr><th>picture<th>reason{''.join(lines)}</table>"


def _thumbnail(path: str) -> str:
    """The picture as a data URI, at most 340 pixels a side."""
    image = load_image(path)
    image.thumbnail((340, 340))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"

"""Bar and line charts of real tables."""

import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.random import Generator
from PIL import Image

from pipelines.demo.picture import INKS, Picture, Traits
from pipelines.demo.sources import SOURCES, Table, table

GROUNDS = {"white": ("white", "black"), "grey": ("#b4b4b4", "black"), "black": ("black", "white")}  # (back, front)


def _categories(rng: Generator, data: Table, count: int) -> tuple[str, list[str], np.ndarray] | None:
    """A quantity for `count` categories in random order, as (title, labels, values); None where the table has none."""
    if data.order is not None:  # rows follow each other in time: keep their order
        column = str(rng.choice(list(data.numbers)))
        step = int(rng.choice((1, 3, 7, 12)))
        start = int(rng.integers(0, max(1, data.rows() - count * step)))
        picked = slice(start, start + count * step, step)
        return f"{column} ({data.name})", data.order[picked], data.numbers[column][picked]
    groups = [group for group, cells in data.words.items() if 2 < len(set(cells)) < len(cells) / 3]
    if not groups:
        return None
    group = str(rng.choice(groups))
    cells = np.array(data.words[group])
    names = sorted(set(cells))
    if len(names) < count:
        return None
    labels = [str(label) for label in rng.choice(names, size=count, replace=False)]
    column = str(rng.choice([*data.numbers, "count"]))
    chosen = [cells == label for label in labels]
    values = [rows.sum() if column == "count" else np.nanmean(data.numbers[column][rows]) for rows in chosen]
    return f"{column} by {group}", labels, np.array(values, dtype=np.float64)


def _course(rng: Generator, data: Table) -> tuple[str, list[str], np.ndarray] | None:
    """A quantity over time or over another quantity, as (title, labels, values); None where both are the same column."""
    column = str(rng.choice(list(data.numbers)))
    if data.order is not None:
        count = int(rng.integers(5, 25))
        step = int(rng.choice((1, 2, 5, 30)))
        start = int(rng.integers(0, max(1, data.rows() - count * step)))
        picked = slice(start, start + count * step, step)
        return f"{column} ({data.name})", data.order[picked], data.numbers[column][picked]
    over = str(rng.choice(list(data.numbers)))
    if over == column:
        return None
    x, y = data.numbers[over], data.numbers[column]
    known = ~(np.isnan(x) | np.isnan(y))
    bins = np.array_split(np.argsort(x[known], kind="stable"), int(rng.integers(5, 11)))
    labels = [f"{x[known][rows].mean():.4g}" for rows in bins]
    return f"{column} by {over}", labels, np.array([y[known][rows].mean() for rows in bins])


def _trend(values: np.ndarray) -> str | None:
    """Whether the values rise or fall as a whole, None where a reader could doubt it."""
    span = values.max() - values.min()
    if len(values) < 5 or not np.isfinite(span) or span <= 0:
        return None
    fit = np.corrcoef(np.arange(len(values)), values)[0, 1]
    if abs(fit) < 0.85 or abs(values[-1] - values[0]) < 0.7 * span:
        return None
    return "rise" if fit > 0 else "fall"


def _peak(values: np.ndarray) -> str | None:
    """In which third of the chart the highest bar stands, None where it is near a border or not clearly the highest."""
    second, first = np.sort(values)[-2:]
    at = (int(values.argmax()) + 0.5) / len(values)
    if first < 1.15 * second or 0.3 < at < 0.4 or 0.6 < at < 0.7:
        return None
    return "left" if at < 0.4 else "middle" if at < 0.6 else "right"


def chart(rng: Generator, split: str, traits: Traits) -> Picture:
    """A bar chart of a number by category or a line chart of its course, from a real table."""
    names = SOURCES["table"][split]
    bar = traits["type"] == "bar"
    count, peak = traits["bars"]
    while True:  # until random columns have these traits: the tables of both splits hold some for all traits
        name = str(rng.choice(list(names)))
        data = table(name, names[name])
        series = _categories(rng, data, count) if bar else _course(rng, data)
        if series is None or not np.isfinite(series[2]).all():
            continue
        title, labels, values = series
        if bar and len(values) == count and values.min() > 0.05 * values.max() > 0 and _peak(values) == peak:
            break
        if not bar and _trend(values) == traits["trend"]:
            break
    facts = {f"chart-{key}": traits[key] for key in ("type", "legend", "background", "colour")}
    facts |= {"chart-peak": peak, "chart-count": str(count)} if bar else {"chart-trend": traits["trend"]}
    return Picture(_plot(rng, traits, title, labels, values), (f"table:{name}",), facts)


def _plot(rng: Generator, traits: Traits, title: str, labels: Sequence[str], values: np.ndarray) -> Image.Image:
    """Draws a chart with the wanted traits; all else of its look is random."""
    back, front = GROUNDS[traits["background"]]
    family, letters = str(rng.choice(("DejaVu Sans", "DejaVu Serif"))), rng.uniform(6.5, 9)
    size = (rng.uniform(2.2, 3.8), rng.uniform(2.0, 3.2))  # inches of 100 pixels
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc must not change the pictures
        matplotlib.rc("font", family=family, size=letters)
        figure = Figure(figsize=size, dpi=100, facecolor=back, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor=back)
        _plot_values(rng, axes, traits, title, labels, values)
        if rng.random() < 0.4:
            axes.grid(axis="y", color=front, alpha=0.25)
        if traits["legend"] == "yes":
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend, so that it hides no value
            axes.legend(
                loc="upper left" if rng.random() < 0.5 else "upper right",
                facecolor=back,
                edgecolor=front,
                labelcolor=front,
                framealpha=1,
            )
        if rng.random() < 0.8:
            axes.set_title(title[:34], color=front)
        axes.tick_params(colors=front)
        framed = bool(rng.random() < 0.5)
        for side, spine in axes.spines.items():
            spine.set(color=front, visible=framed or side in ("left", "bottom"))
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _plot_values(
    rng: Generator, axes: Axes, traits: Traits, title: str, labels: Sequence[str], values: np.ndarray
) -> None:
    """Draws the bars or the line, and the labels below."""
    places, label = np.arange(len(values)), re.split(r" \(| by ", title)[0]
    ink = tuple(value / 255 for value in INKS[traits["colour"]])
    if traits["type"] == "bar":
        axes.bar(places, values, width=rng.uniform(0.45, 0.8), color=ink, label=label)
        shown = places
    else:
        marker, width = str(rng.choice(("", "o", "s"))), rng.uniform(1.5, 3)
        axes.plot(places, values, color=ink, linewidth=width, marker=marker, markersize=4, label=label)
        shown = places[:: max(1, len(places) // 4)]
    axes.set_xticks(shown, [str(labels[int(i)])[:10] for i in shown], rotation=0 if len(shown) < 4 else 30)

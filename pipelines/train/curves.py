"""Pictures of runs: loss, gradient norm, learning rate and data wait over the steps, one run or several laid on each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mova_core.figures import number

SOFTWARE = "mova train"  # in the metadata of a PNG: such a file may be replaced without --overwrite
SMOOTH = 20  # a long run's loss is drawn as the mean of so many steps, over the losses themselves
LONG = 200  # steps

Lines = Sequence[Mapping[str, Any]]  # of a run, as `read_metrics` returns them


def draw_curves(runs: Mapping[str, Lines], path: str | Path) -> None:
    """Draws runs to a PNG.

    Args:
        runs: name of a run -> its lines, at least one. The first run's curves are wide and pale, so that another run's that
            lie on them can be seen.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        4, 1, sharex=True, figsize=(10, 9), height_ratios=(4, 2, 1.4, 1.4), layout="constrained"
    )
    losses, norms, rates, waits = panels
    colors = plt.get_cmap("tab10")
    for index, (name, lines) in enumerate(runs.items()):
        under = index == 0 and len(runs) > 1
        style = {"color": colors(index), "linewidth": 4.0 if under else 1.3, "alpha": 0.45 if under else 1.0}
        _draw_losses(losses, name, lines, style)
        norms.plot(*_points(lines, "grad_norm"), **style)
        rates.plot(*_points(lines, "lr"), **style)
        steps = [line["step"] for line in lines]
        waits.plot(steps, [100 * line["data_wait"] / line["seconds"] for line in lines], **style)
        for line in lines:
            if line.get("skipped") or line.get("spike"):
                norms.axvline(
                    line["step"], color="red" if line.get("skipped") else "orange", linewidth=0.8, linestyle=":"
                )
    norms.set_yscale("log")
    labels = ("loss, nats per answer token", "gradient norm", "learning rate", "data wait, %")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    waits.set_ylim(bottom=0)
    waits.set_xlabel("step")
    waits.xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels(panels)
    losses.legend(frameon=False)
    losses.set_title(_title(runs), loc="left")
    figure.savefig(path, format="png", dpi=120, metadata={"Software": SOFTWARE})
    plt.close(figure)


def difference(first: Lines, second: Lines) -> float | None:
    """The largest difference of the losses of two runs in a step that both have; None without such a step."""
    of_second = {line["step"]: line["loss"] for line in second}
    pairs = [(line["loss"], of_second.get(line["step"])) for line in first]
    return max((abs(one - other) for one, other in pairs if one is not None and other is not None), default=None)


def _draw_losses(axes: Any, name: str, lines: Lines, style: dict[str, Any]) -> None:
    import numpy as np

    steps, values = _points(lines, "loss")
    if len(values) > LONG:
        axes.plot(steps, values, **(style | {"linewidth": 0.5, "alpha": 0.3}))
        steps, values = steps[SMOOTH - 1 :], np.convolve(values, np.ones(SMOOTH) / SMOOTH, "valid").tolist()
    axes.plot(steps, values, label=name, **style)
    evaluated = _points([line for line in lines if "eval_loss" in line], "eval_loss")
    if evaluated[0]:
        axes.plot(*evaluated, "o--", label=f"{name}, held-out samples", **(style | {"linewidth": 0.8}))


def _points(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key where the value is a number."""
    points = [(line["step"], line[key]) for line in lines if line[key] is not None]
    return [step for step, _ in points], [value for _, value in points]


def _title(runs: Mapping[str, Lines]) -> str:
    if len(runs) == 2:
        apart = difference(*runs.values())
        return "mova train, two runs" + ("" if apart is None else f": losses differ by at most {apart:.1e}")
    steps = max(len(lines) for lines in runs.values())
    return f"mova train, {number(steps)} steps" if len(runs) == 1 else f"mova train, {len(runs)} runs"

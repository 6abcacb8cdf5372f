"""A picture of a precompute run: images per second and actors over time, per expert."""

from pathlib import Path

from mova_core.figures import number
from pipelines.precompute.progress import RunLog

SOFTWARE = "mova precompute"  # in the metadata of a PNG: such a file may be replaced without --overwrite


def draw_run(log: RunLog, path: str | Path) -> None:
    """Draws images per second and actors over time, per expert, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (rates, sizes) = plt.subplots(
        2, 1, sharex=True, figsize=(10, 6), height_ratios=(3, 2), layout="constrained"
    )
    colors = plt.get_cmap("tab10")
    drawn = [(name, expert) for name, expert in log.experts.items() if expert.computed]
    for index, (name, expert) in enumerate(drawn):
        seconds = np.array([sample.seconds for sample in expert.samples])
        computed = np.array([sample.computed for sample in expert.samples], float)
        actors = np.array([sample.actors for sample in expert.samples])
        width = max(2.0, seconds[-1] / 40)  # a rate over a moving window: shards and batches come in steps
        before = np.interp(np.maximum(seconds - width, 0), seconds, computed)
        rate = (computed - before) / np.maximum(np.minimum(seconds, width), 1e-9)
        rate[rate <= 0] = np.nan
        # A marker per sample, so that an expert that was done within one sample shows as a dot.
        overall = "" if expert.images_per_second is None else f", {number(expert.images_per_second)} images/s"
        rates.plot(seconds, rate, color=colors(index), label=name + overall, linewidth=1.6, marker=".", markersize=3)
        # Beside each other, not upon: equal pools would hide one another.
        sizes.step(
            seconds,
            actors + 0.05 * index * (actors > 0),
            where="post",
            color=colors(index),
            linewidth=1.6,
        )
    for seconds_in, text in log.events:
        for axes in (rates, sizes):
            axes.axvline(seconds_in, color="0.6", linewidth=0.8, linestyle=":")
        rates.annotate(
            text[:60],
            (seconds_in, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=6,
            color="0.3",
            ha="right",
            va="bottom",
        )
    if drawn:
        rates.set_yscale("log")
        rates.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        rates.yaxis.set_major_formatter("{x:g}")
        rates.yaxis.set_minor_formatter(NullFormatter())
        rates.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    rates.set_ylabel("images/s, moving average")
    sizes.set_ylabel("actors ready")
    sizes.set_ylim(bottom=0)
    sizes.yaxis.get_major_locator().set_params(integer=True)
    sizes.set_xlabel("seconds since the run began")
    rates.set_title(f"mova precompute, run {log.job}", loc="left")
    for axes in (rates, sizes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": SOFTWARE})
    plt.close(figure)

"""Progress bars on stderr."""

import sys

from tqdm import tqdm


def progress_bar(total: int | None, what: str, unit: str, show: bool = True) -> tqdm:
    """A bar of `total` units; beside a terminal it is drawn often, in a log file a line at a time and seldom."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=f"{what:>14}",
        unit=f" {unit}",
        disable=not show,
        file=sys.stderr,
        dynamic_ncols=live,
        mininterval=0.2 if live else 10,
        delay=0 if live else 2,
        leave=live,
        position=None if live else 0,
    )

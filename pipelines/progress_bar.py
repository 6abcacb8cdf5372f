"""Progress bars on stderr, and how a bar here follows work that goes on elsewhere."""

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

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


def write_progress(path: Path, done: int, total: int, note: str = "") -> None:
    """Tells whoever follows `path` how far the work is. Readers never see half of it."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps({"done": done, "total": total, "note": note}))
    draft.replace(path)


@contextlib.contextmanager
def follow_progress(path: Path, what: str, unit: str, show: bool = True) -> Iterator[None]:
    """Draws what `write_progress` tells, by another process on the same file system, while the body runs."""
    ended = threading.Event()

    def draw() -> None:
        bar = progress_bar(None, what, unit, show)
        while not (last := ended.wait(0.5)) or last:
            with contextlib.suppress(OSError, ValueError):  # not there yet
                told = json.loads(path.read_text())
                bar.total = told["total"]
                bar.set_postfix_str(told["note"], refresh=False)
                bar.update(told["done"] - bar.n)
            if last:
                bar.close()
                return

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

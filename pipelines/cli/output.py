"""What a command prints: one JSON document, or tables for people."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Keeps stdout for the result: whatever prints while the work runs goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        print(
            "mova: stopped; stored features and checkpoints are kept, the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(130)


def emit(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    """The result: one JSON document, or what `show` prints for people."""
    if as_json:
        print(json.dumps(value, indent=2, default=str))
    else:
        show()


def rounded(value: float) -> float:
    """Three digits, or all those before the point."""
    return round(value) if value >= 100 else float(f"{value:.3g}")


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table for people; columns of numbers are right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in rows)
        last = index == len(columns) - 1
        drawn.add_column(name, justify="right" if numeric else "left", no_wrap=not last, overflow="fold")
    for row in rows:
        drawn.add_row(*(f"{cell:,}" if isinstance(cell, int | float) else cell or "" for cell in row))
    Console(width=None if sys.stdout.isatty() else 140).print(drawn)


def say(line: str) -> None:
    """A line about the work, beside the progress bars."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)

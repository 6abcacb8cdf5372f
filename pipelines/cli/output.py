"""What a command prints: one JSON document, or tables for people; and what it silences."""

import contextlib
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mova_core.figures import number
from mova_core.io import strict_json


@contextlib.contextmanager
def results_only(silent: bool = False, resumes: bool = False) -> Iterator[None]:
    """Keeps stdout for the result: whatever prints while the work runs goes to stderr. Ctrl-C ends with one line and code 130.

    Args:
        silent: whether libraries may print no bar and no warning, as --quiet and --json ask.
        resumes: whether a command that was stopped resumes when it is given again; the line then says so, unless the work
            itself says where it stopped.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), _silenced() if silent else contextlib.nullcontext():
            yield
    except KeyboardInterrupt as stop:
        rest = "; stored features and checkpoints stay, the same command resumes from them" if resumes else ""
        print(f"mova: {stop}" if str(stop) else f"mova: stopped{rest}", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Turns off the bars and warnings of transformers and huggingface_hub, here and in processes started meanwhile.

    Both libraries read these variables when they are imported; if they are imported already, their own switches apply.
    """
    settings = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils.logging import set_verbosity_error

        disable_progress_bars()
        set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def print_result(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Prints the result: one JSON document, or what `show` prints for people."""
    if as_json:
        print(strict_json.dumps(value, indent=2))
    else:
        show()


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if value is None or isinstance(value, int | float) else str(value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], drop: Sequence[str] = ()) -> None:
    """Prints a table in which no number and no name is cut or wrapped.

    A pipe gets every column. A terminal gets those that fit: the columns of `drop` go first, in that order, and a line below
    names them; where the rest is still too wide, each row becomes a block of one line per column.

    Args:
        title: a line above.
        columns: their names.
        rows: cells; numbers are formatted by `number` and aligned at the right.
        drop: columns that a narrow terminal may leave out, the least useful first.
    """
    line(title)
    width = _terminal_width()
    shown, dropped = list(columns), []
    for name in drop:
        if width is None or _width(shown, columns, rows) <= width:
            break
        shown.remove(name)
        dropped.append(name)
    if width is not None and _width(shown, columns, rows) > width:
        for row in rows:
            print()
            fields(zip(columns, row, strict=True))
        return
    _draw(shown, columns, rows)
    if dropped:
        line(f"(too narrow for: {', '.join(dropped)}; --json has them)")


def fields(pairs: Iterable[tuple[str, Any]]) -> None:
    """Prints one "name: value" per line; a value without a name stands alone."""
    for name, value in pairs:
        line(f"  {name}: {_cell(value)}" if name else f"  {_cell(value)}")


def line(text: str) -> None:
    """Prints a line; a terminal gets it wrapped between words, so that the terminal's edge cuts no number and no name."""
    width = _terminal_width()
    if width is None or len(text) <= width:
        print(text)
        return
    indent = " " * (len(text) - len(text.lstrip()))
    wrapped = textwrap.wrap(
        text.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    print("\n".join(wrapped))


def _terminal_width() -> int | None:
    """Columns of the terminal; None where stdout is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _widths(shown: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[int]:
    from rich.cells import cell_len

    places = [list(columns).index(name) for name in shown]
    return [max(cell_len(text) for text in (columns[at], *(_cell(row[at]) for row in rows))) for at in places]


def _width(shown: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> int:
    return sum(_widths(shown, columns, rows)) + 2 * (len(shown) - 1)


def _draw(shown: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.cells import cell_len

    widths = _widths(shown, columns, rows)
    places = [list(columns).index(name) for name in shown]
    right = [any(isinstance(row[at], int | float) and not isinstance(row[at], bool) for row in rows) for at in places]

    def joined(cells: Sequence[str]) -> str:
        padded = []
        for text, width, to_right in zip(cells, widths, right, strict=True):
            space = " " * (width - cell_len(text))
            padded.append(space + text if to_right else text + space)
        return "  ".join(padded).rstrip()

    print(joined([*shown]))
    print("  ".join("-" * width for width in widths))
    for row in rows:
        print(joined([_cell(row[at]) for at in places]))


def log_line(line: str) -> None:
    """Writes a line about the work on stderr, above the progress bars."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)

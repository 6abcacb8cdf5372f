"""Tables and numbers: nothing is cut at 80 columns or in a pipe."""

import os
import pty
import sys
import termios
import warnings
from typing import Any

import pytest

from mova_core.figures import number, percent
from pipelines.cli.output import line, results_only, table

COLUMNS = ["expert", "fingerprint", "features", "network", "public weights"]
ROWS: list[list[Any]] = [
    ["codetr", "0123456789abcdef", 1234567, "Co-DETR", "https://example.org/" + 60 * "w"],
    ["sam", "f", None, "", ""],
]


def in_terminal(program, columns: int = 80) -> str:
    """What `program` prints to a terminal of that width and 24 lines."""
    child, terminal = pty.fork()
    if child == 0:
        termios.tcsetwinsize(1, (24, columns))
        os.environ.pop("COLUMNS", None)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  pytest has replaced the other
        try:
            program()
            sys.stdout.flush()
        finally:
            os._exit(0)
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # the child has closed its end
            break
        if not chunk:
            break
        shown += chunk
    os.waitpid(child, 0)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    "value, shown",
    [
        (1234567, "1,234,567"),
        (5.624464551607768, "5.62"),
        (15.8209262700002, "15.8"),
        (1837.4, "1,837"),
        (None, "-"),
        (0, "0"),
        (0.0, "0"),
        (1.41e-06, "< 0.001"),
        (99.96, "100"),
        (0.25, "0.25"),
    ],
)
def test_numbers(value, shown):
    assert number(value) == shown


def test_percent():
    assert (percent(0.5), percent(1 / 3, 1), percent(None)) == ("50 %", "33.3 %", "-")


def test_a_pipe_gets_every_column(capsys):
    table("title", COLUMNS, ROWS, drop=["public weights", "network"])
    shown = capsys.readouterr().out.splitlines()
    assert all(name in shown[1] for name in COLUMNS) and "1,234,567" in shown[3] and 60 * "w" in shown[3]
    assert len(shown) == 5 and not any(line.endswith(" ") for line in shown)


def test_a_terminal_leaves_columns_out_and_says_so():
    shown = in_terminal(lambda: table("title", COLUMNS, ROWS, drop=["public weights", "network"]))
    assert "1,234,567" in shown and "0123456789abcdef" in shown and "Co-DETR" in shown and "www" not in shown
    assert shown.splitlines()[-1] == "(too narrow for: public weights; --json has them)"
    assert max(map(len, shown.splitlines())) <= 80


def test_rows_become_blocks_where_nothing_may_be_left_out():
    shown = in_terminal(lambda: table("title", COLUMNS, ROWS), 40)
    assert "  features: 1,234,567" in shown.splitlines() and 60 * "w" in shown and "  features: -" in shown


def test_a_terminal_wraps_lines_between_words():
    text = "bottleneck: " + " ".join(f"{number(count)}" for count in range(1_000_000, 1_000_020))
    shown = in_terminal(lambda: line(text)).splitlines()
    assert len(shown) > 1 and max(map(len, shown)) <= 80 and " ".join(" ".join(shown).split()) == text


@pytest.mark.parametrize(
    "stop, resumes, message",
    [
        (
            KeyboardInterrupt(),
            True,
            "stopped; stored features and checkpoints stay, the same command resumes from them",
        ),
        (KeyboardInterrupt(), False, "stopped"),
        (
            KeyboardInterrupt("stopped at step 20; the last checkpoint is of step 10"),
            True,
            "stopped at step 20; the last ",
        ),
    ],
)
def test_ctrl_c_ends_with_one_line(stop, resumes, message, capsys):
    with pytest.raises(SystemExit) as ended, results_only(resumes=resumes):
        raise stop
    told = capsys.readouterr()
    assert ended.value.code == 130 and told.err.startswith(f"mova: {message}") and told.err.count("\n") == 1
    assert told.out == ""


def test_quiet_silences_libraries_and_restores_the_environment(capsys):
    before = dict(os.environ)
    with results_only(silent=True):
        assert os.environ["HF_HUB_VERBOSITY"] == os.environ["TRANSFORMERS_VERBOSITY"] == "error"
        warnings.warn("a library complains", stacklevel=1)
        print("printed by the work")
    assert dict(os.environ) == before and capsys.readouterr() == ("", "printed by the work\n")

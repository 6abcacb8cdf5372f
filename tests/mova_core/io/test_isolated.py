"""Functions in a child process: what they return, and what is told where they end or hang."""

import os
import signal
import time

import pytest

from mova_core.io.isolated import IsolatedFunction, ProcessDied


def act(what: str, data: bytes = b"") -> object:
    """Runs in the child."""
    if what == "die":
        signal.raise_signal(signal.SIGSEGV)
    if what == "leave":
        os._exit(3)
    if what == "hang":
        time.sleep(60)
    if what == "raise":
        raise KeyError("nothing")
    print("a library that talks")
    return [what, len(data), os.getpid()]


@pytest.fixture(scope="module")
def isolated():
    return IsolatedFunction(f"{__name__}:act", seconds=2.0)


def test_results_and_errors_come_back_from_one_child(isolated):
    name, length, child = isolated("é\n", data=bytes(3_000_000))
    assert (name, length) == ("é\n", 3_000_000) and child != os.getpid()
    with pytest.raises(ValueError, match="nothing"):
        isolated("raise")
    assert isolated("again")[2] == child


@pytest.mark.parametrize(
    ("what", "told"),
    [("die", "ended its process \\(signal 11\\)"), ("leave", "exit code 3"), ("hang", "longer than 2 s")],
)
def test_a_call_that_ends_its_process_or_hangs_is_reported_and_the_next_call_works(isolated, what, told):
    isolated.seconds = 30.0
    isolated("start")
    isolated.seconds = 2.0 if what != "hang" else 0.2
    with pytest.raises(ProcessDied, match=told.replace("2 s", "0 s")):
        isolated(what)
    isolated.seconds = 30.0
    assert isolated("next")[0] == "next"

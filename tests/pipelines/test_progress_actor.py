import io
import time

import pytest
import ray
from tqdm import tqdm

from pipelines import progress_actor
from pipelines.progress_actor import ProgressReporter, follow_progress


@ray.remote(num_cpus=0)
def work(reporter: ProgressReporter, steps: int) -> None:
    for step in range(steps):
        reporter.report(step + 1, steps, f"loss {step}")
        time.sleep(0.02)


@pytest.mark.ray
def test_a_bar_shows_the_last_report_of_a_remote_worker(ray_cluster, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(progress_actor, "progress_bar", lambda total, *_: tqdm(total=total, file=shown, mininterval=0))
    with follow_progress("train", "steps") as reporter:
        ray.get(work.remote(reporter, 30))
    assert "30/30" in shown.getvalue() and "loss 29" in shown.getvalue()


@pytest.mark.ray
def test_nothing_is_drawn_where_no_bar_is_wanted(ray_cluster, capsys):
    with follow_progress("train", "steps", show=False) as reporter:
        ray.get(work.remote(reporter, 3))
    assert capsys.readouterr().err == ""


def test_reports_in_quick_succession_are_dropped_but_the_last_is_not():
    class Recorder:
        reported: list[int] = []  # noqa: RUF012

        @property
        def report(self):
            return self

        def remote(self, done, total, note):
            self.reported.append(done)

    reporter = ProgressReporter(Recorder())
    for step in range(1000):
        reporter.report(step + 1, 1000)
    assert reporter.actor.reported[0] == 1 and reporter.actor.reported[-1] == 1000
    assert len(reporter.actor.reported) < 100

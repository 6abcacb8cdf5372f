"""MicroBatcher without an expert; tests/actors/test_expert_server.py has it at work behind a server."""

import threading
import time

import pytest
import torch

from actors import batching
from actors.batching import FAULTS, UNPROVEN, DeviceLost, MicroBatcher, ServerBusy, ServerError, State
from mova_core.experts import Features
from mova_core.images import ImageError, ImageRef


def image(number: int) -> ImageRef:
    return ImageRef(data=bytes([number]))


def prepare(images):
    return {"number": torch.tensor([[float(image.data[0])] for image in images])}


def compute(batch):
    return [Features(row[:, None], (1, 1)) for row in batch["number"]]


@pytest.fixture
def start():
    """Starts a batcher; closed at the end."""
    batchers = []

    def start(**arguments) -> MicroBatcher:
        defaults = {
            "prepare": prepare,
            "compute": compute,
            "device": torch.device("cpu"),
            "batch_size": 4,
            "wait": 0.01,
        }
        more = {"queue": 16, "sizes": None, "prepare_threads": 1, "observe": lambda name, value: None}
        batchers.append(MicroBatcher("numbers", **{**defaults, **more, **arguments}))
        return batchers[-1]

    yield start
    for batcher in batchers:
        batcher.close()


def numbers(pending) -> list[float]:
    return [request.result.result(timeout=30).tokens.item() for request in pending]


def test_each_image_gets_its_own_features(start):
    batcher = start(prepare_threads=4)
    assert numbers(batcher.submit([image(number) for number in range(10)])) == list(range(10))
    assert batcher.load() | {"computed": 10, "splits": 0, "waiting": 0} == batcher.load()


def test_closing_while_a_batch_is_gathered_is_no_failure(start, caplog):
    batcher = start(wait=60.0)
    [pending] = batcher.submit([image(1)])
    time.sleep(0.05)  # the gathering thread waits for more images
    batcher.close()
    with pytest.raises(ServerError, match="the server of numbers was closed"):
        pending.result.result(timeout=30)
    assert batcher.state is State.CLOSED and not caplog.records


def test_breaking_while_a_batch_is_gathered_is_reported_once(start, caplog):
    """The first batch breaks the batcher while later images wait for theirs to fill."""
    gathering = threading.Event()

    def lose_device(batch):
        assert gathering.wait(30)
        raise torch.AcceleratorError("the device is gone")

    batcher = start(compute=lose_device, batch_size=2, wait=60.0)
    pending = batcher.submit([image(number) for number in range(3)])
    time.sleep(0.05)
    gathering.set()
    for request in pending:
        with pytest.raises(DeviceLost, match="numbers lost cpu"):
            request.result.result(timeout=30)
    with pytest.raises(DeviceLost, match="numbers lost cpu"):  # a precompute starts another process for it
        batcher.submit([image(4)])
    batcher.close()
    assert not caplog.records
    with pytest.raises(ServerError, match="numbers lost cpu"):
        batcher.check()


def test_a_failure_of_the_batcher_itself_reaches_the_callers(start, caplog):
    batcher = start(compute=lambda batch: [])  # no row for the image
    [pending] = batcher.submit([image(1)])
    with pytest.raises(ServerError, match=r"the server of numbers failed \(ValueError: zip"):
        pending.result.result(timeout=30)
    assert batcher.state is State.BROKEN and "the server of numbers failed" in caplog.text


def test_time_of_all_preparing_threads_is_counted(start):
    seconds, images = 0.02, 24

    def prepare_slowly(images):
        time.sleep(seconds)
        return prepare(images)

    batcher = start(prepare=prepare_slowly, prepare_threads=4)
    numbers(batcher.submit([image(number) for number in range(images)][:16]))
    numbers(batcher.submit([image(number) for number in range(images)][16:]))
    assert batcher.load()["prepare"] >= images * seconds


def test_sizes_that_were_not_warmed_up_are_not_fallen_back_to(start):
    batches = []

    def compute_three(batch):
        batches.append(len(batch["number"]))
        if batches[-1] > 3:
            torch.empty(1 << 60)  # the allocator's own refusal
        return compute(batch)

    batcher = start(compute=compute_three, batch_size=8, sizes=(1, 2, 8))
    assert numbers(batcher.submit([image(number) for number in range(8)])) == list(range(8))
    assert batches == [8, 2, 2, 2, 2] and batcher.batch_size == 2


def odd_fail(batch):
    return ["odd" if row.item() % 2 else Features(row[:, None], (1, 1)) for row in batch["number"]]


def test_bad_images_in_a_row_do_not_break_the_server(start):
    """The model is tried on an image that it computed before, and computes it again: the images are at fault."""
    batcher = start(compute=odd_fail, queue=64)
    submitted = batcher.submit([image(0), *[image(1)] * (UNPROVEN + FAULTS), image(2)])
    results = [request.result.result(timeout=30) for request in submitted]
    assert [isinstance(result, ImageError) for result in results] == [False, *[True] * (UNPROVEN + FAULTS), False]
    assert batcher.state is State.SERVING


def test_a_model_that_fails_on_an_image_it_computed_before_is_broken(start):
    ill = threading.Event()
    batcher = start(compute=lambda batch: ["ill"] * len(batch["number"]) if ill.is_set() else compute(batch))
    assert numbers(batcher.submit([image(0)])) == [0]
    ill.set()
    requests = batcher.submit([image(number) for number in range(1, 1 + FAULTS)])
    with pytest.raises(
        ServerError, match=f"numbers failed on {FAULTS} pictures in a row and now fails on an image that"
    ):
        requests[-1].result.result(timeout=30)
    assert batcher.state is State.BROKEN


@pytest.mark.parametrize(("good", "failures"), [(7, FAULTS), (8, UNPROVEN)])
def test_a_model_that_never_computed_an_image_is_broken(start, good, failures):
    """At once where it fails on its example, too; with a sound example after more than a handful of bad images."""
    batcher = start(compute=odd_fail, queue=64, example={"number": torch.tensor([[float(good)]])})
    requests = batcher.submit([image(1)] * failures)
    with pytest.raises(ServerError, match=r"its example, too|all of its first 32 pictures"):
        requests[-1].result.result(timeout=30)
    assert all(isinstance(request.result.result(), ImageError) for request in requests[: FAULTS - 1])


def test_a_batch_that_hangs_is_reported(start, monkeypatch):
    monkeypatch.setattr(batching, "STAGE_SECONDS", 0.02)
    hanging, released = threading.Event(), threading.Event()

    def hang(batch):
        hanging.set()
        assert released.wait(30)
        return compute(batch)

    batcher = start(compute=hang)
    assert batcher.overdue() is None
    [pending] = batcher.submit([image(1)])
    assert hanging.wait(30)
    time.sleep(0.05)
    with pytest.raises(ServerError, match="numbers hangs: a batch is 0 s over its time limit"):
        batcher.check()
    released.set()
    assert numbers([pending]) == [1] and batcher.overdue() is None


def test_a_full_queue_refuses_unless_the_caller_waits(start):
    batcher = start(queue=2)
    with pytest.raises(ServerBusy, match="0 pictures waiting and room for 2, so it takes no 3 more"):
        batcher.submit([image(number) for number in range(3)])
    assert numbers(batcher.submit([image(number) for number in range(6)], wait_for_room=True)) == list(range(6))

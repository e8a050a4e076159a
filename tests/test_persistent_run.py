"""The persistent kernel's launches for a batch: one behind the other, given up, failed; and the way back to graphs.

The kernel is a stand-in, and so is the batch that it works on.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from persistent_standin import FakeBatch, FakeStream, FakeWords, StandIn, path_of, request

from soprano_cupy.errors import DeviceError
from soprano_cupy.gpu import persistent_run, slots
from soprano_cupy.gpu.batch import PROMPT_TABLES, SLOT_TABLES, Batch
from soprano_cupy.gpu.batch_sizes import BatchSizes, upload_specs
from soprano_cupy.gpu.batch_upload import Upload
from soprano_cupy.gpu.persistent_path import PersistentPath
from soprano_cupy.gpu.persistent_run import ALONE, SHARED, PersistentRun
from soprano_cupy.testing import SOPRANO_1_1_80M


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[FakeBatch]:
    """Waiting for the stream lets the kernel of every batch in the list go on to its end."""
    batches: list[FakeBatch] = []

    def synchronize(stream: int) -> None:
        for batch in batches:
            while batch.left:
                batch.step()

    monkeypatch.setattr(persistent_run, "synchronize", synchronize)
    return batches


def begin(path: PersistentPath, batches: list[FakeBatch], lengths: list[int]) -> FakeBatch:
    batch: Any = FakeBatch(lengths)
    batches.append(batch)
    path.decoder.batch = batch  # type: ignore[attr-defined]
    batch.run = PersistentRun(path, batch, FakeWords(batch), len(lengths))  # type: ignore[arg-type]
    batch.run.start()
    return batch


def advance(batch: FakeBatch, slot: int = 0, *, whole: bool = False) -> bool:
    """What `Batch.wait` and `Batch.finish` do; False once the voice has ended or graphs have taken over."""
    word = int(batch.progress[slot])
    if batch.run is None or slots.progress_status(word):
        return False
    batch.run.await_change(slot, word, whole=whole)
    return True


def counts(batch: FakeBatch) -> list[int]:
    return [slots.progress_count(int(word)) for word in batch.progress]


@pytest.mark.parametrize("whole", [False, True])
def test_one_voice_in_launches_one_behind_the_other(no_gpu: list[FakeBatch], whole: bool) -> None:
    decoder = StandIn()
    path = path_of(decoder, "1")
    batch = begin(path, no_gpu, [2 * ALONE + 10])
    while advance(batch, whole=whole):
        pass
    assert counts(batch) == [2 * ALONE + 10]
    assert [common.budget for _, common in decoder.launches] == [ALONE] * 3
    assert {(common.cancel, common.report) for _, common in decoder.launches} == {(0x1000, 0x1008)}
    assert batch.run is not None
    batch.run.close()
    assert path.users == 0


def test_launches_are_short_while_others_wait(no_gpu: list[FakeBatch]) -> None:
    decoder = StandIn()
    path = path_of(decoder, "1")
    path.enter()
    batch = begin(path, no_gpu, [SHARED + 5])
    while advance(batch):
        pass
    assert [common.budget for _, common in decoder.launches] == [SHARED] * 2


@pytest.mark.parametrize("whole", [False, True])
def test_several_voices_stay_together(no_gpu: list[FakeBatch], whole: bool) -> None:
    decoder = StandIn()
    batch = begin(path_of(decoder, "1"), no_gpu, [9, 1, ALONE + 7])
    for slot in (0, 1, 2):
        while advance(batch, slot, whole=whole):
            pass
    assert counts(batch) == [9, 1, ALONE + 7]
    assert [(voices, common.budget) for voices, common in decoder.launches] == [(3, ALONE)] * 2


def test_voices_that_end_with_their_first_token(no_gpu: list[FakeBatch]) -> None:
    batch = begin(path_of(StandIn(), "1"), no_gpu, [1, 1])
    assert advance(batch)
    assert counts(batch) == [1, 1]
    assert not advance(batch)


@pytest.mark.parametrize("whole", [False, True])
def test_a_stall_goes_on_by_graphs(no_gpu: list[FakeBatch], whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    path = path_of(StandIn(), "1")
    batch = begin(path, no_gpu, [50])
    batch.stall_after = 7
    while advance(batch, whole=whole):
        pass
    assert batch.went_on == [True]
    assert counts(batch) == [8]
    assert path.users == 0
    assert path.failure is not None
    assert path.failure.startswith("the persistent decode kernel waited too long for a token")
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    assert not path.takes([request()])


@pytest.mark.parametrize("error", [DeviceError("too many resources"), MemoryError("no room for the weights")])
def test_a_launch_that_fails_goes_on_by_graphs(no_gpu: list[FakeBatch], error: Exception) -> None:
    decoder = StandIn()
    decoder.raises = error
    path = path_of(decoder, "1")
    batch = begin(path, no_gpu, [50])
    assert batch.went_on == [False]
    assert not advance(batch)
    assert path.failure == str(error)
    assert path.users == 0


def test_a_lost_context_ends_the_call(no_gpu: list[FakeBatch]) -> None:
    decoder = StandIn()
    decoder.raises = DeviceError("the context is gone")
    decoder.raises.sticky = True  # type: ignore[attr-defined]
    with pytest.raises(DeviceError, match="gone"):
        begin(path_of(decoder, "1"), no_gpu, [50])


def test_others_leave_the_kernel_at_the_end_of_their_launch(no_gpu: list[FakeBatch]) -> None:
    decoder = StandIn()
    path = path_of(decoder, "1")
    batch = begin(path, no_gpu, [3 * ALONE])
    for _ in range(5):
        assert advance(batch)
    path.fail(DeviceError("somebody else's launch stalled"))
    while advance(batch):
        pass
    assert batch.went_on == [False]
    assert counts(batch) == [1 + ALONE]


def test_other_errors_come_through(no_gpu: list[FakeBatch]) -> None:
    path = path_of(StandIn(), "1")
    batch = begin(path, no_gpu, [50])
    assert advance(batch)
    batch.left = {}  # the launch is gone without a word
    with pytest.raises(DeviceError, match="the GPU is done"):
        advance(batch)
    assert path.failure is None


def test_who_loses_interest_ends_the_launch(no_gpu: list[FakeBatch]) -> None:
    path = path_of(StandIn(), "1")
    batch = begin(path, no_gpu, [50])
    for _ in range(4):
        assert advance(batch)
    before = counts(batch)[0]
    assert batch.run is not None
    batch.run.close()
    assert counts(batch)[0] == before + 1
    assert path.users == 0
    assert path.failure is None


# ---- the way back ----


class Tail:
    """The program that draws the next tokens."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, stream: int) -> None:
        self.runs += 1


def half_way(progress: list[int], tokens: list[list[int]]) -> tuple[Any, list[Any], Tail]:
    """A batch without a GPU, with voices in any state; what it reads again, and the program behind that."""
    batch: Any = object.__new__(Batch)
    batch._run, batch._rows, batch.stream = None, len(progress), FakeStream()
    batch._requests = [request(length=3 + i) for i in range(len(progress))]
    batch.progress, batch.tokens = np.array(progress, np.uint64), np.array(tokens, np.int32)
    read: list[Any] = []
    tail = Tail()
    batch._read = lambda prompts: read.append([p.tolist() for p in prompts])
    batch._tail = lambda rows: tail
    return batch, read, tail


def test_graphs_read_again_what_was_said() -> None:
    batch, read, tail = half_way([2, 3 | slots.STOP << 32, 4], [[50, 51, 0, 0], [60, 61, 3, 0], [70, 71, 72, 73]])
    batch.go_on(again=True)
    assert read == [[[4, 5, 6, 50, 51], [4], [4, 5, 6, 7, 8, 70, 71, 72, 73]]]
    assert (batch.steps, tail.runs) == (3, 1)


def test_graphs_take_over_what_the_kernel_has_left() -> None:
    batch, read, tail = half_way([2, 1 | slots.LENGTH << 32], [[50, 51], [60, 0]])
    batch.go_on(again=False)
    assert (read, batch.steps, tail.runs) == ([], 2, 0)


def test_what_has_ended_needs_no_graphs() -> None:
    batch, read, tail = half_way([2 | slots.STOP << 32], [[50, 3]])
    batch.go_on(again=True)
    assert (read, tail.runs) == ([], 0)


def test_uploads_that_lie_side_by_side_go_together() -> None:
    upload: Any = object.__new__(Upload)
    upload._offsets = {
        name: 256 * place for place, name in enumerate(upload_specs(SOPRANO_1_1_80M, BatchSizes(1, 8, 8)))
    }
    assert upload._runs(SLOT_TABLES) == [["slots", "seen", "slot_of_row"]]
    assert upload._runs(PROMPT_TABLES) == [["starts", "lengths", "ids", "row_slots", "row_positions"]]
    assert upload._runs(("ids", "slots", "seen")) == [["slots", "seen"], ["ids"]]
    assert upload._runs(()) == []
    assert {*SLOT_TABLES, *PROMPT_TABLES} == set(upload._offsets)

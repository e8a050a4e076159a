"""Who computes the tokens of a few voices: the table, the setting, what is logged, launches and the way back to graphs.

The kernel is a stand-in, and so is the batch that it works on.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest

from soprano_cupy import settings
from soprano_cupy.cuda.module import DeviceFacts
from soprano_cupy.errors import DeviceError, ParameterError
from soprano_cupy.generation import Request
from soprano_cupy.gpu import persistent_choice, persistent_run, slots
from soprano_cupy.gpu.batch import PROMPT_TABLES, SLOT_TABLES, Batch
from soprano_cupy.gpu.batch_sizes import BatchSizes, upload_specs
from soprano_cupy.gpu.batch_upload import Upload
from soprano_cupy.gpu.persistent import VOICES, Common
from soprano_cupy.gpu.persistent_choice import StepTimes, measured_times, reason_against, reason_for
from soprano_cupy.gpu.persistent_path import PersistentPath
from soprano_cupy.gpu.persistent_run import ALONE, SHARED, PersistentRun
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.testing import SOPRANO_1_1_80M

REAL = persistent_choice.STEP_US
HOPPER, OTHER = (9, 0), (8, 0)
TABLE = {
    HOPPER: {
        (1, False): StepTimes(164.0, 120.0),
        (1, True): StepTimes(172.0, 180.0),
        (2, False): StepTimes(177.0, 176.5),
        (4, False): StepTimes(181.0, 208.0),
    }
}


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent_choice, "STEP_US", TABLE)


def facts(capability: tuple[int, int] = HOPPER) -> DeviceFacts:
    return DeviceFacts(0, "a GPU", capability, 132)


def request(temperature: float = 0.0, length: int = 5) -> Request:
    return Request(np.arange(4, 4 + length, dtype=np.int32), SamplingParams(temperature, seed=1, max_new_tokens=200))


# ---- the setting and the table ----


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOPRANO_PERSISTENT", raising=False)
    assert settings.persistent() == "auto"
    for value in ("0", "1", "AUTO"):
        monkeypatch.setenv("SOPRANO_PERSISTENT", value)
        assert settings.persistent() == value.lower()
        assert settings.persistent("1") == "1"
    monkeypatch.setenv("SOPRANO_PERSISTENT", "yes")
    with pytest.raises(ParameterError, match=r"SOPRANO_PERSISTENT = 'yes' .* auto, 0, 1"):
        settings.persistent()


def test_figures_of_the_next_number_that_was_measured() -> None:
    assert measured_times(HOPPER, 1, False) == (164.0, 120.0)
    assert measured_times(HOPPER, 1, True) == (172.0, 180.0)
    assert measured_times(HOPPER, 3, False) == (181.0, 208.0)
    assert measured_times(HOPPER, 2, True) == (177.0, 176.5)  # no figure for drawn ones
    assert measured_times(HOPPER, 5, False) is None
    assert measured_times(OTHER, 1, False) is None


@pytest.mark.parametrize(
    ("voices", "drawn", "reason"),
    [
        (1, False, None),
        (1, True, "faster by measurement, 172 against 180 us"),
        (2, False, None),
        (3, False, "faster by measurement, 181 against 208 us"),
        (8, False, "not measured for 8 voices on compute capability 9.0"),
    ],
)
def test_what_was_measured_decides(voices: int, drawn: bool, reason: str | None) -> None:
    assert reason_against("auto", HOPPER, voices, drawn) == reason
    assert reason_against("1", HOPPER, voices, drawn) is None
    assert reason_against("0", HOPPER, voices, drawn) == "SOPRANO_PERSISTENT=0"


def test_reasons_for() -> None:
    assert reason_for("auto", HOPPER, 1, False) == "faster by measurement, 120 against 164 us"
    assert reason_for("1", OTHER, 1, False) == "SOPRANO_PERSISTENT=1"


def test_the_real_table_is_of_few_voices() -> None:
    for measured in REAL.values():
        assert {voices for voices, _ in measured} <= set(VOICES)
        assert {(1, False), (1, True), (2, False), (4, False)} <= set(measured)
        assert all(20 < us < 1000 for times in measured.values() for us in times)


# ---- the path ----


class StandIn:
    """A decoder whose kernel makes tokens 100, 101, ... in the words of `FakeBatch`."""

    def __init__(self, problem: str | None = None) -> None:
        self.reason, self.nbytes = problem, 0
        self.prepared: list[str] = []
        self.launches: list[tuple[int, Common]] = []
        self.raises: Exception | None = None
        self.batch: FakeBatch | None = None

    def problem(self, voices: int = 1) -> str | None:
        if isinstance(self.reason, Exception):
            raise self.reason
        return self.reason

    def prepare(self, voices: int = 1) -> None:
        self.prepared.append(threading.current_thread().name)
        self.nbytes = 143

    def launch(self, stream: int, places: list[int], common: Common) -> None:
        if self.raises is not None:
            raise self.raises
        assert self.batch is not None
        self.launches.append((len(places), common))
        self.batch.start(places, common.budget)


def path_of(decoder: Any, setting: str = "auto", capability: tuple[int, int] = HOPPER) -> PersistentPath:
    return PersistentPath(decoder, facts(capability), setting)


def test_one_voice_is_made_ready_beside_and_waited_for() -> None:
    decoder = StandIn()
    path = path_of(decoder)
    path.prepare()
    assert path.takes([request()])
    assert decoder.prepared == ["soprano-persistent"]
    assert path.nbytes == 143


@pytest.mark.parametrize(("setting", "capability"), [("0", HOPPER), ("auto", OTHER)])
def test_what_is_not_taken_is_not_made_ready(setting: str, capability: tuple[int, int]) -> None:
    decoder = StandIn()
    path = path_of(decoder, setting, capability)
    path.prepare()
    assert not path.takes([request()])
    assert decoder.prepared == []
    assert path.nbytes == 0


def test_each_decision_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    path = path_of(StandIn())
    with caplog.at_level(logging.INFO, "soprano_cupy.gpu.persistent_path"):
        for _ in range(3):
            assert path.takes([request()])
            assert not path.takes([request(0.7)])
            assert not path.takes([request()] * 3)
    assert [record.message for record in caplog.records] == [
        "1 voice, greedy: the persistent kernel (faster by measurement, 120 against 164 us)",
        "1 voice, drawn: a graph for each token (faster by measurement, 172 against 180 us)",
        "3 voices, greedy: a graph for each token (faster by measurement, 181 against 208 us)",
    ]


def test_the_kernel_has_its_own_reasons(caplog: pytest.LogCaptureFixture) -> None:
    path = path_of(StandIn("only 3 of 4 clusters of 16 blocks run at once"), "1")
    path.prepare()
    with caplog.at_level(logging.INFO):
        assert not path.takes([request()])
    assert path.failure is None
    assert "a graph for each token (only 3 of 4 clusters" in caplog.text
    assert (
        path.describe()[0] == "1 voice, greedy: a graph for each token (only 3 of 4 clusters of 16 blocks run at once)"
    )


@pytest.mark.parametrize("error", [DeviceError("NVRTC refuses"), MemoryError("no memory for the weights")])
def test_a_kernel_that_cannot_be_had_is_one_warning(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    decoder = StandIn()
    decoder.reason = error  # type: ignore[assignment]
    path = path_of(decoder, "1")
    path.prepare()
    assert not path.takes([request()])
    assert not path.takes([request()])
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        f"the persistent decode kernel is off from now on, graphs take over: {error}"
    ]
    assert path.describe() == [f"1 voice, greedy: a graph for each token ({error})"]


def test_a_lost_context_is_not_hidden() -> None:
    decoder = StandIn()
    lost = DeviceError("the context is gone")
    lost.sticky = True
    decoder.reason = lost  # type: ignore[assignment]
    with pytest.raises(DeviceError, match="gone"):
        path_of(decoder, "1").takes([request()])


def test_descriptions() -> None:
    assert path_of(StandIn()).describe()[:3] == [
        "1 voice, greedy: the persistent kernel (faster by measurement, 120 against 164 us)",
        "1 voice, drawn: a graph for each token (faster by measurement, 172 against 180 us)",
        "2 voices, greedy: the persistent kernel (faster by measurement, 176 against 177 us)",
    ]
    assert path_of(StandIn(), "0").describe() == ["1 voice, greedy: a graph for each token (SOPRANO_PERSISTENT=0)"]


def test_another_setting_for_measurements() -> None:
    path = path_of(StandIn(), "0")
    assert not path.takes([request()])
    path.use("1")
    assert path.takes([request()] * 4)
    path.use("auto")
    assert not path.takes([request()] * 4)


# ---- launches ----


class FakeStream:
    ptr = 7


class FakeBatch:
    """Voices whose n-th token is 100 + n and that end after `lengths` tokens; whoever waits lets the kernel go on."""

    def __init__(self, lengths: list[int]) -> None:
        self.stream, self.lengths = FakeStream(), lengths
        self.progress = np.zeros(len(lengths), np.uint64)
        self.left: dict[int, int] = {}  # tokens of the launch under way, by slot
        self.report = self.cancelled = 0
        self.stall_after = -1  # tokens of a launch
        self.went_on: list[bool] = []
        self.run: PersistentRun | None = None

    def start(self, places: list[int], budget: int) -> None:
        assert not self.left, "launched while the one before goes on"
        self.left = dict.fromkeys(places, budget)

    def places(self, slot: int) -> int:
        return slot

    def common(self, budget: int, *, cancel: int, report: int) -> Common:
        return Common(1, 2, budget, cancel, report)

    def draw(self, slot: int) -> None:
        count = slots.progress_count(int(self.progress[slot])) + 1
        status = slots.STOP if count >= self.lengths[slot] else slots.RUNNING
        self.progress[slot] = count | status << 32 | (100 + count) << 40

    def step(self) -> None:
        """The sampling kernel draws the first tokens; then the kernel makes one of each voice that runs, or ends."""
        if not self.progress.all():
            for slot in range(len(self.lengths)):
                self.draw(slot)
            return
        if self.stall_after == 0:
            self.report, self.left = 1 + 3, {}
            return
        self.stall_after -= 1
        for slot in list(self.left):
            if not slots.progress_status(int(self.progress[slot])):
                self.draw(slot)
                self.left[slot] -= 1
            if self.left[slot] == 0 or slots.progress_status(int(self.progress[slot])) or self.cancelled:
                del self.left[slot]
        if not self.left:
            self.report = 1

    def await_word(self, slot: int, word: int, *, listened: bool) -> None:
        assert int(self.progress[slot]) == word
        while self.left and int(self.progress[slot]) == word:
            self.step()
        if int(self.progress[slot]) == word:
            raise DeviceError("the GPU is done")

    def go_on(self, *, again: bool) -> None:
        self.went_on.append(again)
        assert self.run is not None
        run, self.run = self.run, None
        run.close()


class FakeWords:
    """`ControlWords` of a `FakeBatch`."""

    device = 0x1000

    def __init__(self, batch: FakeBatch) -> None:
        self.batch = batch

    ended = property(lambda self: bool(self.batch.report))
    code = property(lambda self: max(0, self.batch.report - 1))

    def reset(self) -> None:
        self.batch.report = self.batch.cancelled = 0

    def cancel(self) -> None:
        self.batch.cancelled = 1

    def await_report(self, stream: int) -> None:
        while self.batch.left:
            self.batch.step()


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

"""The crowd's scheduler on a simulated device in virtual time: nobody starves, nothing is lost or doubled, slots are
conserved, sentences come in order, cancellation and deadlines hold, and every request is answered or fails."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest
import simulated_device
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import AHEAD, STEP_S, TOKEN_SAMPLES, Faults, SimulatedDevice, Stage, audio_of, sentence

from soprano_cupy import Busy, Closed, DeadlineExceeded, DeviceError
from soprano_cupy.config import SAMPLE_RATE_HZ
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.scheduler import MAX_FAULTS, Scheduler
from soprano_cupy.crowd.speech import Speech
from soprano_cupy.generation import Request

SENTENCES = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2)), min_size=1, max_size=8)  # tokens, stuck attempts
WISHES = st.builds(
    Wish, st.booleans(), st.booleans(), st.integers(0, 2), st.none() | st.sampled_from([0.0, 0.005, 0.05, 0.5])
)
FAULTS = st.builds(
    Faults,
    st.dictionaries(st.integers(1, 60), st.sampled_from([DeviceError("launch"), MemoryError("memory")]), max_size=3),
    st.dictionaries(st.integers(1, 10), st.sampled_from([DeviceError("launch"), MemoryError("memory")]), max_size=2),
    st.dictionaries(st.integers(0, 9), st.integers(1, 4), max_size=3),
    st.sampled_from([1, 2, 1 << 30]),
)


def requests(job: int, sizes: list[tuple[int, int]]) -> list[Request]:
    return [sentence(job, i, tokens, stuck) for i, (tokens, stuck) in enumerate(sizes)]


def expected(wanted: list[Request], wish: Wish) -> np.ndarray:
    """What is heard: of each sentence the first attempt that is not stuck, or the last."""
    attempts = [min(int(r.ids[3]), wish.retries) for r in wanted]
    return np.concatenate([audio_of(r, attempt) for r, attempt in zip(wanted, attempts, strict=True)])


def idle(stage: Stage) -> None:
    """Every slot is free again."""
    for driver in stage.working:
        assert driver.free == driver.slots
        assert isinstance(driver.device, SimulatedDevice)
        assert driver.device.used == 0
    assert stage.scheduler.unfinished == stage.scheduler.waiting == 0


@settings(max_examples=150, deadline=None)
@given(
    jobs=st.lists(st.tuples(SENTENCES, WISHES, st.integers(0, 60), st.none() | st.integers(0, 60)), max_size=10),
    slots=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    data=st.data(),
)
def test_every_request_is_answered_once_or_fails(jobs: list, slots: list[int], data: st.DataObject) -> None:
    """Random requests, cancellations, deadlines and failures."""
    faults = [data.draw(FAULTS) for _ in slots]
    faulty = any(f.steps or f.admissions or f.poisoned or f.makes < 1 << 30 for f in faults)
    stage = Stage(Scheduler(), slots, faults)
    speeches: dict[int, Speech] = {}
    ends: dict[int, list[Speech]] = {}
    for turn in range(200):
        for job, (sizes, wish, begin, cancelled) in enumerate(jobs):
            if turn == begin:
                try:
                    speeches[job] = stage.scheduler.submit(requests(job, sizes), wish, stage.clock.now)
                except DeviceError:
                    assert not stage.working
                    continue
                ends[job] = []
                speeches[job].add_done_callback(ends[job].append)
            if cancelled is not None and turn == begin + cancelled and job in speeches:
                speeches[job].cancel()
        stage.turn()
    stage.run()
    idle(stage)
    for job, speech in speeches.items():
        sizes, wish, _, cancelled = jobs[job]
        assert ends[job] == [speech]
        if speech.cancelled():
            assert cancelled is not None
            with pytest.raises(CancelledError):
                speech.result()
        elif (error := speech.exception(0)) is not None:
            if isinstance(error, DeadlineExceeded):
                assert wish.deadline_s is not None
            else:
                assert isinstance(error, DeviceError)
                assert faulty
        else:
            np.testing.assert_array_equal(speech.result(), expected(requests(job, sizes), wish))
            np.testing.assert_array_equal(np.concatenate([np.empty(0), *speech]), speech.result())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=6), st.integers(1, 8), st.integers(1, 50), st.booleans())
def test_a_cancelled_slot_is_free_within_two_steps(sizes: list[int], slots: int, at: int, stream: bool) -> None:
    stage = Stage(Scheduler(), [slots])
    speech = stage.scheduler.submit(requests(0, [(n, 0) for n in sizes]), Wish(stream=stream), stage.clock.now)
    for _ in range(at):
        stage.turn()
    driver, device = stage.working[0], stage.device()
    asked, generating, now = device.asked, driver.generating, stage.clock.now
    removed = len(device.removed_at)
    assert speech.cancel() or speech.done()
    stage.turn()
    if generating and speech.cancelled():
        assert len(device.removed_at) > removed
        assert max(device.removed_at.values()) == asked  # before any further step
    while driver.free < driver.slots:
        stage.clock.now += STEP_S / 8
        stage.turn()
    # The steps under way, and a prompt or a piece of audio that had been asked for.
    assert stage.clock.now - now <= (AHEAD + 1) * STEP_S + STEP_S / 2
    idle(stage)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(2, 30), st.sampled_from([0.0, 0.002, 0.02, 0.2]))
def test_deadlines_are_kept(slots: int, count: int, seconds: float) -> None:
    """A request is done or has failed no later than a turn behind its deadline."""
    stage = Stage(Scheduler(), [slots])
    wish = Wish(deadline_s=seconds)
    speeches = [stage.scheduler.submit(requests(job, [(40, 0)] * 3), wish, 0.0) for job in range(count)]
    while stage.scheduler.unfinished:
        stage.turn()
        if stage.clock.now > seconds + 3 * STEP_S:
            assert all(speech.done() for speech in speeches)
    stage.run()
    idle(stage)
    for speech in speeches:
        assert speech.exception() is None or isinstance(speech.exception(), DeadlineExceeded)
        assert isinstance(speech.exception(), (TimeoutError, type(None)))


@pytest.mark.parametrize("slots", [1, 4, 32])
def test_a_short_request_is_not_stuck_behind_a_book(slots: int) -> None:
    stage = Stage(Scheduler(), [slots])
    book = stage.scheduler.submit(requests(0, [(20, 0)] * 60), Wish(), 0.0)
    for _ in range(3):
        stage.turn()
    begin = stage.clock.now
    short = stage.scheduler.submit(requests(1, [(20, 0)]), Wish(), begin)
    while not short.done():
        stage.turn()
    # behind one sentence of the book at most, since that takes a slot, and its own 20 steps
    assert stage.clock.now - begin <= (20 + 20 + 6) * STEP_S
    assert not book.done()
    stage.run()
    np.testing.assert_array_equal(book.result(), expected(requests(0, [(20, 0)] * 60), Wish()))


@pytest.mark.parametrize("stream", [False, True])
def test_newcomers_do_not_starve_a_book(stream: bool) -> None:
    """More short requests arrive than there are slots for; the book goes on all the same."""
    stage = Stage(Scheduler(max_queue=8), [4])
    book = stage.scheduler.submit(requests(0, [(10, 0)] * 12), Wish(), 0.0)
    refused = made = 0
    while not book.done():
        made += 1
        assert made < 3000
        try:
            stage.scheduler.submit(requests(1, [(10, 0)]), Wish(stream=stream), stage.clock.now)
        except Busy:
            refused += 1
        stage.turn()
    assert refused > 0
    assert stage.clock.now <= 12 * 10 * 9 * STEP_S  # a ninth of one slot at least, where nine share four
    stage.run()


@pytest.mark.parametrize("step_s", [0.002, 0.03])
def test_streams_never_run_dry_beside_books(step_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams of many sentences are played while books want every slot. A token is 64 ms of sound."""
    monkeypatch.setattr(simulated_device, "TOKEN_SAMPLES", 2048)
    monkeypatch.setattr(simulated_device, "STEP_S", step_s)
    stage = Stage(Scheduler(), [8])
    books = [stage.scheduler.submit(requests(9, [(30, 0)] * 200), Wish(), 0.0) for _ in range(3)]
    for _ in range(40):
        stage.turn()
    begin = stage.clock.now
    streams = [stage.scheduler.submit(requests(i, [(25, 0)] * 8), Wish(stream=True), begin) for i in range(2)]
    heard = [0] * len(streams)
    first: list[float | None] = [None] * len(streams)
    while not all(stream.done() for stream in streams):
        for i, stream in enumerate(streams):
            played = None if first[i] is None else (stage.clock.now - first[i]) * SAMPLE_RATE_HZ
            assert stream.done() or played is None or played <= heard[i], "silence"
        stage.turn()
        for i, stream in enumerate(streams):
            heard[i] = sum(map(len, stream._from(0)))
            if heard[i] and first[i] is None:
                first[i] = stage.clock.now
    assert not any(book.done() for book in books)
    assert max(stream.first_audio_s or 1e9 for stream in streams) <= (30 + 12) * step_s  # a slot, then its own pieces


def full_house(slots: int, waiting: int = 0) -> Stage:
    """Many who speak for long, in slots that end one by one, and some who wait."""
    stage = Stage(Scheduler(), [slots])
    stage.device().prompt_rows = 4096
    for job in range(slots + waiting):
        stage.scheduler.submit([sentence(job, 0, 60 + job)], Wish(), 0.0)
    while stage.working[0].generating < slots:
        stage.turn()
    return stage


def test_newcomers_are_gathered_where_many_speak() -> None:
    """Each prefill keeps everybody waiting: it reads a sixteenth of them, or what has waited for eight steps."""
    stage = full_house(128, waiting=128)
    device = stage.device()
    admissions: list[int] = []
    admit = device.admit
    device.admit = lambda entries: (admissions.append(len(entries)), admit(entries))  # type: ignore[assignment, func-returns-value]
    asked = device.asked
    while stage.scheduler.waiting:
        stage.turn()
    assert sum(admissions) == 128
    assert len(admissions) <= 128 // 8 + (device.asked - asked) // 8
    stage.run()
    idle(stage)


def test_a_book_is_gathered_too() -> None:
    """A book that has all the slots it may have: its next sentences wait for each other."""
    stage = Stage(Scheduler(), [256])
    device = stage.device()
    device.prompt_rows, device.most_entries = 4096, 64
    stage.scheduler.submit(requests(0, [(40 + i % 97, 0) for i in range(900)]), Wish(), 0.0)
    admissions: list[int] = []
    admit = device.admit
    device.admit = lambda entries: (admissions.append(len(entries)), admit(entries))  # type: ignore[assignment, func-returns-value]
    while stage.scheduler.waiting:
        stage.turn()
    assert sum(admissions) == 900
    assert len(admissions) <= 900 / 8
    stage.run()
    idle(stage)


@pytest.mark.parametrize(
    ("slots", "stream", "step_s", "turns"),
    [(128, True, 0.001, 1), (300, True, 0.001, 2), (128, False, 0.001, 9), (8, False, 0.001, 1), (128, False, 0.03, 1)],
)
def test_streams_small_crowds_and_slow_ones_wait_for_nobody(
    slots: int, stream: bool, step_s: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who comes when all but a few slots are taken."""
    monkeypatch.setattr(simulated_device, "STEP_S", step_s)
    stage = Stage(Scheduler(), [slots])
    stage.device().prompt_rows = 4096
    for job in range(slots - 2):
        stage.scheduler.submit([sentence(job, 0, 500)], Wish(), 0.0)
    while stage.working[0].generating < slots - 2 or stage.device().asked < 40:
        stage.turn()
    stage.scheduler.submit([sentence(slots, 0, 30)], Wish(stream=stream), stage.clock.now)
    waited = 0
    while stage.scheduler.waiting:
        stage.turn()
        waited += 1
    assert waited == turns
    stage.run()
    idle(stage)


def test_whole_sentences_are_gathered_for_the_decoder() -> None:
    """Fewer calls than sentences; none waits for more than eight steps."""
    stage = full_house(64)
    device = stage.device()
    calls: list[int] = []
    decode = device.decode
    device.decode = lambda orders: (calls.append(len(orders)), decode(orders))  # type: ignore[assignment, func-returns-value]
    device.decode_states = 1000
    ended: dict[int, int] = {}
    while stage.working[0].generating >= 32:
        stage.turn()
        for slot in stage.working[0]._orders:
            ended.setdefault(slot, device.asked)
            assert device.asked - ended[slot] <= 8
    assert 1 <= len(calls) <= sum(calls) / 4
    stage.run()
    idle(stage)


def test_pieces_of_a_stream_begin_early_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated_device, "TOKEN_SAMPLES", 2048)
    stage = Stage(Scheduler(), [2])
    speech = stage.scheduler.submit([sentence(3, 0, 200)], Wish(stream=True), 0.0)
    stage.run()
    chunks = [len(chunk) // 2048 for chunk in speech]
    assert chunks[0] == 1
    assert sum(chunks) == 198
    assert len(chunks) <= 9


def test_retries_of_a_stuck_sentence_keep_its_place() -> None:
    stage = Stage(Scheduler(), [4])
    wanted = [sentence(1, 0, 30), sentence(1, 1, 20, stuck_attempts=2), sentence(1, 2, 10)]
    speech = stage.scheduler.submit(wanted, Wish(retries=2), 0.0)
    stage.run()
    np.testing.assert_array_equal(speech.result(), expected(wanted, Wish(retries=2)))
    assert speech.result()[28 * TOKEN_SAMPLES] % 2 == 0  # the second retry, not the first


@pytest.mark.parametrize("kind", ["launch", "memory", "nan"])
def test_work_survives_a_fault_and_not_many(kind: str) -> None:
    error = MemoryError("no memory") if kind == "memory" else DeviceError("launch failed")
    for count, survives in ((MAX_FAULTS, True), (MAX_FAULTS + 1, False)):
        faults = Faults()
        if kind == "nan":
            faults.poisoned = {0: count}
        else:
            faults.steps = {5 + 9 * i: error for i in range(count)}
        stage = Stage(Scheduler(), [3], [faults])
        speech = stage.scheduler.submit([sentence(0, 0, 30)], Wish(), 0.0)
        stage.run()
        idle(stage)
        if survives:
            np.testing.assert_array_equal(speech.result(), audio_of(sentence(0, 0, 30)))
        else:
            with pytest.raises(DeviceError, match={"launch": "launch", "memory": "memory", "nan": "finite"}[kind]):
                speech.result()


def test_a_poisoned_sentence_leaves_the_others_alone() -> None:
    stage = Stage(Scheduler(), [8], [Faults(poisoned={2: 1 << 20})])
    speeches = [stage.scheduler.submit([sentence(job, 0, 25)], Wish(), 0.0) for job in range(5)]
    stage.run()
    assert [speech.exception() is None for speech in speeches] == [True, True, False, True, True]
    assert isinstance(speeches[2].exception(), DeviceError)
    assert stage.faults[0].makes == (1 << 30) - 1  # the device was not made anew for that


def test_a_stream_goes_on_after_a_fault_where_it_was() -> None:
    stage = Stage(Scheduler(), [2], [Faults(steps={20: DeviceError("launch")})])
    speech = stage.scheduler.submit([sentence(4, 0, 60)], Wish(stream=True), 0.0)
    for _ in range(18):
        stage.turn()
    assert speech.first_audio_s is not None
    stage.run()
    np.testing.assert_array_equal(speech.result(), audio_of(sentence(4, 0, 60)))


def test_a_stream_that_would_go_on_differently_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(Scheduler(), [2], [Faults(steps={20: DeviceError("launch")})])
    speech = stage.scheduler.submit([sentence(4, 0, 60)], Wish(stream=True), 0.0)
    for _ in range(18):
        stage.turn()
    monkeypatch.setattr(SimulatedDevice, "tokens", lambda self, slot, count: np.full(count, 7, np.int32))
    stage.run()
    idle(stage)
    with pytest.raises(DeviceError, match="made to fit"):
        speech.result()


def test_a_device_that_dies_leaves_its_work_to_the_other() -> None:
    dying = Faults(steps={15: DeviceError("off the bus")}, makes=1)
    stage = Stage(Scheduler(), [4, 4], [dying, Faults()])
    speeches = [stage.scheduler.submit(requests(job, [(20, 0)] * 2), Wish(), 0.0) for job in range(12)]
    stage.run()
    assert stage.drivers[0] is None
    for job, speech in enumerate(speeches):
        np.testing.assert_array_equal(speech.result(), expected(requests(job, [(20, 0)] * 2), Wish()))
    idle(stage)


def test_without_any_device_everything_fails_and_nothing_is_taken() -> None:
    stage = Stage(Scheduler(), [2], [Faults(steps={5: DeviceError("off the bus")}, makes=1)])
    speeches = [stage.scheduler.submit([sentence(job, 0, 20)], Wish(), 0.0) for job in range(6)]
    stage.run()
    assert all(isinstance(speech.exception(), DeviceError) for speech in speeches)
    with pytest.raises(DeviceError, match="fallen off"):
        stage.scheduler.submit([sentence(0, 0, 20)], Wish(), 0.0)


def test_devices_share_the_work() -> None:
    """A few sentences go to both devices, and a full house fills both."""
    for count in (2, 8, 40):
        stage = Stage(Scheduler(), [8, 8])
        for job in range(count):
            stage.scheduler.submit([sentence(job, 0, 30)], Wish(), 0.0)
        stage.run()
        used = [stage.device(place).most_used for place in range(2)]
        assert abs(used[0] - used[1]) <= 1
        assert sum(used) >= min(count, 16)


def test_the_queue_is_bounded_by_requests_that_wait() -> None:
    stage = Stage(Scheduler(max_queue=3), [1])
    first = stage.scheduler.submit([sentence(0, 0, 10)], Wish(), 0.0)
    stage.turn()
    waiting = [stage.scheduler.submit([sentence(1, 0, 10)], Wish(), 0.0) for _ in range(3)]
    with pytest.raises(Busy, match="3 requests are waiting"):
        stage.scheduler.submit([sentence(1, 0, 10)], Wish(), 0.0)
    waiting[0].cancel()
    stage.scheduler.submit([sentence(1, 0, 10)], Wish(), 0.0)
    stage.run()
    assert len(first.result()) == 8 * TOKEN_SAMPLES


def test_closing_fails_what_is_not_done() -> None:
    stage = Stage(Scheduler(), [1])
    speeches = [stage.scheduler.submit([sentence(job, 0, 10)], Wish(), 0.0) for job in range(3)]
    for _ in range(5):
        stage.turn()
    stage.scheduler.close()
    stage.run()
    assert all(isinstance(speech.exception(), Closed) for speech in speeches)
    with pytest.raises(Closed):
        stage.scheduler.submit([sentence(0, 0, 10)], Wish(), 0.0)
    idle(stage)


@pytest.mark.parametrize("wish", [Wish(), Wish(stream=True), Wish(deadline_s=1e6), Wish(stream=True, retries=1)])
@pytest.mark.parametrize("cancelled", [False, True])
def test_nobody_keeps_what_is_over(wish: Wish, cancelled: bool) -> None:
    """Samples go with the last reference to their future, without the garbage collector, which would stop everybody."""
    stage = Stage(Scheduler(), [4])
    gc.collect()
    gc.disable()
    try:
        for job in range(3):
            speech = stage.scheduler.submit(requests(job, [(20, 0)] * 6), wish, stage.clock.now)
            for _ in range(9):
                stage.turn()
            if cancelled:
                speech.cancel()
            stage.run()
            assert speech.done()
            kept = weakref.ref(speech)
            del speech
            assert kept() is None
        assert gc.collect() < 100
    finally:
        gc.enable()


def test_nothing_to_hear_is_an_empty_answer() -> None:
    stage = Stage(Scheduler(), [2])
    speech = stage.scheduler.submit([sentence(0, 0, 1), sentence(0, 1, 2), sentence(0, 2, 5)], Wish(stream=True), 0.0)
    stage.run()
    np.testing.assert_array_equal(speech.result(), audio_of(sentence(0, 2, 5)))
    empty = stage.scheduler.submit([sentence(0, 0, 1)], Wish(pcm=True), 0.0)
    stage.run()
    assert empty.result().shape == (0,)
    assert empty.result().dtype == np.int16

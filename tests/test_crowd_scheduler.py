"""The crowd's scheduler on a simulated device in virtual time: nothing is lost or doubled, slots are conserved,
sentences come in order, cancellation and deadlines hold, and every request is answered or fails."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import (
    AHEAD,
    STEP_S,
    TOKEN_SAMPLES,
    Faults,
    Stage,
    audio_of,
    expected,
    idle,
    requests,
    sentence,
)

from soprano_cupy import Busy, Closed, DeadlineExceeded, DeviceError
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.scheduler import Scheduler
from soprano_cupy.crowd.speech import Speech

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

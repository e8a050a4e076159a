"""The crowd's threads on simulated devices in real time: many callers and event loops, hung and dying devices, a clean
end with no thread left."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, as_completed, wait

import numpy as np
import pytest
from simulated_device import TOKEN_SAMPLES, Clock, Faults, SimulatedDevice, audio_of, sentence

from soprano_cupy import Busy, Closed, DeadlineExceeded, DeviceError, ParameterError
from soprano_cupy.crowd.crowd import MAX_FAILURES, Crowd, Maker
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.speech import Speech


class RealTime(SimulatedDevice):
    """Steps take no time by themselves; virtual time goes on with each turn."""

    def report(self, watched):  # type: ignore[no-untyped-def]
        self.clock.now += 0.0005
        time.sleep(0.0001)
        return super().report(watched)


def maker(slots: int = 8, faults: Faults | None = None) -> Maker:
    faults = faults or Faults()
    return lambda: RealTime(slots, Clock(), faults)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    end = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left


def ask(crowd: Crowd, job: int, tokens: int = 20, sentences: int = 2, **wish: object) -> Speech:
    wanted = [sentence(job, i, tokens) for i in range(sentences)]
    return crowd.submit(wanted, Wish(**wish))  # type: ignore[arg-type]


def right(speech: Speech, job: int, tokens: int = 20, sentences: int = 2) -> None:
    whole = np.concatenate([audio_of(sentence(job, i, tokens)) for i in range(sentences)])
    np.testing.assert_array_equal(speech.result(20), whole)


def test_many_threads() -> None:
    found: dict[int, Speech] = {}
    with Crowd([maker()]) as crowd:

        def work(first: int) -> None:
            for job in range(first, first + 6):
                found[job] = ask(crowd, job, stream=job % 2 == 0)
                if job % 3 == 0:
                    np.testing.assert_array_equal(np.concatenate(list(found[job])), found[job].result())

        threads = [threading.Thread(target=work, args=(8 * i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(as_completed(found.values(), 20))) == 36
        for job, speech in found.items():
            right(speech, job)
    assert len(found) == 36


def test_several_event_loops() -> None:
    with Crowd([maker()]) as crowd:

        async def listen(job: int) -> None:
            speech = ask(crowd, job, stream=True)
            chunks = [chunk async for chunk in speech]
            assert len(chunks) > 1
            again = [chunk async for chunk in speech]
            np.testing.assert_array_equal(np.concatenate(chunks), np.concatenate(again))
            np.testing.assert_array_equal(np.concatenate(chunks), await speech)
            right(speech, job)

        async def everything(first: int) -> None:
            await asyncio.gather(*(listen(job) for job in range(first, first + 5)))

        threads = [threading.Thread(target=asyncio.run, args=(everything(8 * i),)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert crowd.scheduler.unfinished == 0


def test_a_cancelled_task_cancels_its_speech() -> None:
    with Crowd([maker()]) as crowd:

        async def give_up() -> Speech:
            speech = ask(crowd, 0, tokens=100_000)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(speech), 0.05)
            return speech

        assert asyncio.run(give_up()).cancelled()


def test_waiting_stops_when_it_is_cancelled() -> None:
    with Crowd([maker()]) as crowd:
        with ask(crowd, 0, tokens=100_000, stream=True) as speech:
            chunks = iter(speech)
            next(chunks)
        assert speech.cancelled()
        with pytest.raises(CancelledError):
            list(chunks)
        assert not wait([speech], 1).not_done
        assert speech.cancel()
        done = ask(crowd, 1)
        right(done, 1)
        assert not done.cancel()


def test_callbacks_may_submit() -> None:
    with Crowd([maker()]) as crowd:
        second: list[Speech] = []
        both = threading.Event()

        def go_on(_: object) -> None:
            second.append(ask(crowd, 2))
            both.set()

        ask(crowd, 1).add_done_callback(go_on)
        assert both.wait(20)
        right(second[0], 2)


def test_deadlines_without_anybody_waiting() -> None:
    with Crowd([maker(slots=1)]) as crowd:
        long = ask(crowd, 0, tokens=100_000)
        late = ask(crowd, 1, deadline_s=0.05)
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            late.result(20)
        assert not long.done()


def test_a_full_queue() -> None:
    with Crowd([maker(slots=1)], max_queue=2) as crowd:
        first = ask(crowd, 0, tokens=100_000)
        while crowd.scheduler.waiting > 1:
            time.sleep(0.001)
        ask(crowd, 1)
        ask(crowd, 2)
        with pytest.raises(Busy, match="try again later"):
            ask(crowd, 3)
        assert not first.done()
    for wrong in (0, True, "many"):
        with pytest.raises(ParameterError, match="max_queue"):
            Crowd([maker()], max_queue=wrong)  # type: ignore[arg-type]


def test_prompts_that_do_not_fit() -> None:
    with Crowd([maker()]) as crowd:
        long = sentence(0, 0, 5)
        with pytest.raises(ParameterError, match="65 tokens; at most 64"):
            crowd.submit([type(long)(np.zeros(65, np.int32), long.params)], Wish())


def test_closing() -> None:
    crowd = Crowd([maker(slots=2)])
    drained = Crowd([maker()])
    unfinished, last = ask(crowd, 0, tokens=100_000), ask(drained, 1)
    drained.close(drain_s=20)
    crowd.close()
    crowd.close()
    right(last, 1)
    assert isinstance(unfinished.exception(1), Closed)
    with pytest.raises(Closed):
        ask(crowd, 2)


def test_a_device_that_cannot_be_made() -> None:
    with pytest.raises(DeviceError, match="fallen off"):
        Crowd([maker(faults=Faults(makes=0))])
    with Crowd([maker(faults=Faults(makes=0)), maker()]) as crowd:
        assert len(crowd.devices) == 1
        right(ask(crowd, 0), 0)


def test_a_device_that_keeps_failing_is_used_no_more() -> None:
    faults = Faults(steps={i: DeviceError("launch failed") for i in range(1, 100)})
    with Crowd([maker(faults=faults)]) as crowd:
        with pytest.raises(DeviceError, match="launch failed"):
            ask(crowd, 0).result(20)
        while crowd.devices or not isinstance(_refusal(crowd), DeviceError):
            time.sleep(0.01)
        with pytest.raises(DeviceError, match="no device is left: launch failed"):
            ask(crowd, 1)
    assert faults.makes == (1 << 30) - MAX_FAILURES


def _refusal(crowd: Crowd) -> Exception | None:
    return crowd.scheduler._refusal


def test_bugs_are_failures_too(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a device raises, nobody waits for ever."""
    with Crowd([maker(faults=Faults(steps={3: IndexError("a bug")}))]) as crowd:
        right(ask(crowd, 0), 0)
    assert "IndexError: a bug" in caplog.text


def test_an_error_keeps_no_device() -> None:
    """Whoever keeps what `result` raised keeps no device, whose memory is needed for the next one."""
    made: list[weakref.ref[RealTime]] = []
    faults = Faults(steps={i: DeviceError("launch failed") for i in range(1, 3)}, poisoned={0: 9})

    def make() -> RealTime:
        gc.collect()
        assert all(reference() is None for reference in made)
        device = RealTime(8, Clock(), faults)
        made.append(weakref.ref(device))
        return device

    with Crowd([make]) as crowd:
        error = ask(crowd, 0).exception(20)
        assert isinstance(error, DeviceError)
        assert len(made) == 3
    gc.collect()
    assert all(reference() is None for reference in made)


def test_nobody_keeps_a_sound_that_nobody_wants() -> None:
    """Neither a deadline that is far away nor cycles of objects."""
    with Crowd([maker()]) as crowd:
        other = ask(crowd, 0, tokens=100_000)  # the crowd is never idle
        gc.disable()
        try:
            speech = ask(crowd, 1, deadline_s=1000.0)
            right(speech, 1)
            samples = weakref.ref(speech)
            del speech
            right(ask(crowd, 2), 2)  # the queue forgets who has been there when it is asked for another
            right(ask(crowd, 3), 3)
            end = time.monotonic() + 5
            while samples() is not None and time.monotonic() < end:
                time.sleep(0.01)
            assert samples() is None
        finally:
            gc.enable()
        assert not other.done()


class Hanging(RealTime):
    """Hangs in its third step until it is released."""

    release = threading.Event()

    def advance(self) -> None:
        if self.asked == 2:
            self.release.wait(20)
            raise DeviceError("hung")
        super().advance()


def test_a_device_that_hangs_is_taken_out(caplog: pytest.LogCaptureFixture) -> None:
    with Crowd([lambda: Hanging(8, Clock()), maker()], stall_s=0.3) as crowd:
        speeches = [ask(crowd, job) for job in range(8)]
        for job, speech in enumerate(speeches):
            right(speech, job)
        assert "has not answered for 0.3 s" in caplog.text
        assert len(crowd.devices) == 1
    Hanging.release.set()
    alone = Crowd([lambda: Hanging(8, Clock())], stall_s=0.3)
    Hanging.release.clear()
    with pytest.raises(DeviceError, match="has not answered"):
        ask(alone, 0).result(20)
    alone.close()
    Hanging.release.set()


def test_seconds_of_chaos() -> None:
    """Random submissions, cancellations, deadlines and failures on three devices, one of which dies."""
    rng = random.Random(3)

    def errors() -> dict[int, BaseException]:
        return {rng.randrange(300, 6000): rng.choice([DeviceError("launch"), MemoryError("memory")]) for _ in range(2)}

    faults = [Faults(steps=errors(), poisoned={7: 2, 11: 9}), Faults(steps=errors()), Faults(steps={99: OSError()})]
    faults[2].makes = 1
    told: dict[Speech, int] = {}
    speeches: list[tuple[int, Speech]] = []
    with Crowd([maker(faults=one) for one in faults], max_queue=64) as crowd:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            job = rng.randrange(60)
            try:
                speech = ask(
                    crowd, job, sentences=2, stream=rng.random() < 0.5, deadline_s=rng.choice([None, 0.02, 5.0])
                )
            except Busy:
                time.sleep(0.01)
                continue
            speech.add_done_callback(lambda s: told.__setitem__(s, told.get(s, 0) + 1))
            speeches.append((job, speech))
            if rng.random() < 0.2:
                rng.choice(speeches)[1].cancel()
            time.sleep(0.001)
        crowd.close(drain_s=20)
    assert len(crowd.devices) == 0
    answered = 0
    for job, speech in speeches:
        assert told[speech] == 1
        if not speech.cancelled() and speech.exception() is None:
            right(speech, job)
            answered += 1
        elif not speech.cancelled():
            assert isinstance(speech.exception(), (DeviceError, DeadlineExceeded))
    assert answered > len(speeches) / 3


def test_who_waits_for_a_future_holds_nobody_up() -> None:
    """While a callback does not return, others are heard; and a callback can close the crowd itself."""
    with Crowd([maker()]) as crowd:
        held, go = threading.Event(), threading.Event()

        def hold(_: object) -> None:
            held.set()
            assert go.wait(20)

        ask(crowd, 1).add_done_callback(hold)
        assert held.wait(20)
        other = ask(crowd, 2, stream=True)
        chunks = iter(other)
        heard = 0
        while heard < 2 * 18 * TOKEN_SAMPLES:
            heard += len(next(chunks))
        assert not other.done()
        go.set()
        right(other, 2)
        closed = threading.Event()

        def close(_: object) -> None:
            crowd.close()
            closed.set()

        ask(crowd, 3).add_done_callback(close)
        assert closed.wait(20)
        with pytest.raises(Closed):
            ask(crowd, 4)

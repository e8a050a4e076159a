"""A crowd when something goes wrong: sentences that get stuck or are poisoned, calls that fail, devices that die. On a
simulated device in virtual time."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_device import TOKEN_SAMPLES, Faults, SimulatedDevice, Stage, audio_of, expected, idle, requests, sentence

from soprano_cupy import DeviceError
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.scheduler import MAX_FAULTS, Scheduler


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

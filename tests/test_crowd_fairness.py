"""Who waits for whom in a crowd: nobody starves, streams never run dry, and work is gathered where many speak. On a
simulated device in virtual time."""

from __future__ import annotations

import numpy as np
import pytest
import simulated_device
from simulated_device import STEP_S, Stage, expected, idle, requests, sentence

from soprano_cupy import Busy
from soprano_cupy.config import SAMPLE_RATE_HZ
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.scheduler import Scheduler


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

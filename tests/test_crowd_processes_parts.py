"""What several processes are made of: the ring of samples, the channel of messages, and a request that moves."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soprano_cupy import errors
from soprano_cupy.crowd.job import Wish
from soprano_cupy.crowd.processes_channel import Channel
from soprano_cupy.crowd.processes_messages import Sound, Speak, packed, unpacked
from soprano_cupy.crowd.processes_orders import Orders
from soprano_cupy.crowd.processes_relay import AudioChannel
from soprano_cupy.crowd.processes_ring import Ring, RingReader, RingWriter
from soprano_cupy.crowd.processes_ticket import Ticket
from soprano_cupy.crowd.speech import Speech

SIZE = 4096


@pytest.fixture
def ends() -> Iterator[tuple[RingWriter, RingReader]]:
    file = Ring.create(SIZE)
    writer, reader = RingWriter(file, SIZE), RingReader(file, SIZE)
    os.close(file)
    yield writer, reader
    writer.close()
    reader.close()


@given(st.lists(st.tuples(st.integers(0, 600), st.sampled_from(["<f4", "<i2", "<f8"]), st.booleans()), max_size=60))
def test_samples_come_out_as_they_went_in(pieces: list[tuple[int, str, bool]]) -> None:
    file = Ring.create(SIZE)
    writer, reader = RingWriter(file, SIZE), RingReader(file, SIZE)
    os.close(file)
    under_way: list[tuple[int, np.ndarray]] = []

    def read_all() -> None:
        writer.flush()
        taken = reader.take((begin, len(wanted), wanted.dtype.str) for begin, wanted in under_way)
        for samples, (_, wanted) in zip(taken, under_way, strict=True):
            np.testing.assert_array_equal(samples, wanted)
        under_way.clear()

    for index, (count, dtype, read) in enumerate(pieces):
        samples = (np.arange(count) + 7 * index).astype(dtype)[: SIZE // 2 // np.dtype(dtype).itemsize]
        place = writer.put(samples)
        if place is None or read:  # no room: everything is read
            read_all()
            writer.freed(reader.read)
        if place is None:
            place = writer.put(samples)
            assert place is not None
        under_way.append((place, samples))
    read_all()
    writer.close()
    reader.close()
    with pytest.raises(ValueError, match="the ring has been closed"):
        reader.take([(0, 1, "<i2")])


def test_a_full_ring_takes_nothing(ends: tuple[RingWriter, RingReader]) -> None:
    writer, reader = ends
    half = np.arange(SIZE // 4, dtype=np.int16)
    places = [writer.put(half), writer.put(half + 1)]
    assert places == [0, SIZE // 2]
    assert writer.put(half) is None
    writer.flush()
    (taken,) = reader.take([(0, len(half), "<i2")])
    writer.freed(reader.read)
    assert writer.put(half + 2) == SIZE
    np.testing.assert_array_equal(taken, half)  # a copy
    writer.flush()
    second, third = reader.take([(SIZE // 2, len(half), "<i2"), (SIZE, len(half), "<i2")])
    np.testing.assert_array_equal(second, half + 1)
    np.testing.assert_array_equal(third, half + 2)


def test_messages_come_in_order_whatever_their_size() -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    sent = [(i, "x" * size) for i, size in enumerate([0, 10, 1 << 20, 3, 1 << 18, 5] * 3)]
    received: list[object] = []

    def read() -> None:
        while len(received) < len(sent) + 100:
            received.extend(theirs.exchange(5))

    def post() -> None:
        for i in range(100):
            ours.post(i)

    threads = [threading.Thread(target=read), threading.Thread(target=post)]
    for thread in threads:
        thread.start()
    for message in sent:
        ours.post(message)
    while threads[0].is_alive():
        ours.exchange(0.01)
    for thread in threads:
        thread.join()
    assert [message for message in received if isinstance(message, tuple)] == sent
    assert [message for message in received if not isinstance(message, tuple)] == list(range(100))
    ours.close()
    ours.post("to nobody")
    with pytest.raises(EOFError):
        theirs.exchange(5)
    theirs.close()


def test_streams_come_first_but_not_for_ever() -> None:
    orders: Orders[int] = Orders()
    for number in range(20):
        orders.put(number, 1, urgent=number >= 10)
    found = [orders.take(room) for room in (3, 0, 4, 1, 100)]
    assert found == [[10, 11, 12], [13], [0, 14, 15, 16], [17], [1, 18, 19, 2, 3, 4, 5, 6, 7, 8, 9]]
    waiting = threading.Thread(target=lambda: found.append(orders.take(5)))
    waiting.start()
    orders.put(20, 100, urgent=False)
    waiting.join(5)
    assert found[-1] == [20]
    for number, size in ((21, 3), (22, 2), (23, 1)):
        orders.put(number, size, urgent=False)
    assert orders.take(5) == [21, 22], "as many as there is room for, in their order"
    assert orders.take(5) == [23]


def test_samples_wait_for_room(ends: tuple[RingWriter, RingReader]) -> None:
    """What finds no room waits with all behind it; large pieces are cut."""
    writer, reader = ends
    connections = socket.socketpair()
    sender, receiver = AudioChannel(connections[0], writer), Channel(connections[1])
    samples = np.arange(3000, dtype=np.float32)  # 12 kB, thrice the ring
    sender.post((1, samples))
    sender.post("behind")
    heard: list[np.ndarray] = []
    messages: list[object] = []
    while "behind" not in messages:
        sender.exchange(0)
        assert sender.pending is False
        messages = receiver.exchange(0)
        sounds = [message for message in messages if isinstance(message, Sound)]
        heard += reader.take((sound.place, sound.length, sound.dtype) for sound in sounds)
        sender.freed(reader.read)
    np.testing.assert_array_equal(np.concatenate(heard), samples)
    assert max(len(piece) for piece in heard) <= SIZE // 4 // 4
    sender.close()
    receiver.close()


def test_the_end_of_the_other_end_wakes() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    found: list[BaseException] = []

    def exchange() -> None:
        try:
            channel.exchange(10)
        except EOFError as error:
            found.append(error)

    waiting = threading.Thread(target=exchange)
    waiting.start()
    theirs.close()
    waiting.join(5)
    assert len(found) == 1
    channel.close()


@pytest.mark.parametrize("name", ["Busy", "Closed", "DeadlineExceeded", "DeviceError", "ParameterError", "TextError"])
def test_errors_travel(name: str) -> None:
    error = unpacked(packed(getattr(errors, name)("what is wrong")))
    assert type(error) is getattr(errors, name)
    assert str(error) == "what is wrong"


def test_other_errors_are_the_devices() -> None:
    for error, text in ((IndexError("a bug"), "IndexError: a bug"), (MemoryError(), "MemoryError: MemoryError")):
        assert type(unpacked(packed(error))) is errors.DeviceError
        assert str(unpacked(packed(error))) == text


def ticket() -> Ticket:
    return Ticket(Speech(lambda _: None), Speak(1, "One.", None, Wish(stream=True), 0.0), 4)


def test_what_was_heard_is_not_heard_again() -> None:
    samples = np.sin(np.arange(1000, dtype=np.float32))
    moved = ticket()
    for piece in (samples[:200], samples[200:500]):
        assert moved.hear(piece)
    for begin, roundings in ((300, 1e-4), (0, 0.0)):
        moved.begin_again()
        assert moved.hear(samples[:begin] + np.float32(roundings))
    assert all(moved.hear(piece) for piece in (samples[:450], samples[450:470], samples[470:]))
    moved.speech.settle(None)
    np.testing.assert_array_equal(moved.speech.result(), samples)
    assert moved.faults == 2


def test_something_else_is_noticed() -> None:
    moved = ticket()
    assert moved.hear(np.sin(np.arange(500, dtype=np.float32)))
    moved.begin_again()
    assert not moved.hear(np.cos(np.arange(300, dtype=np.float32)))


def test_what_is_left_of_a_text() -> None:
    book = Ticket(Speech(lambda _: None), Speak(1, "x" * 984, None, Wish(), 0.0), 984)
    assert book.left == 1000
    assert book.advance(20_000) == 10
    assert book.left == 990
    book.advance(10**9)
    assert book.left == 1

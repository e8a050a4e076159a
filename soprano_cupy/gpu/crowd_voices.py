"""Voices that are decoded piece by piece where their states lie: what each piece computes, and the samples it gives.

Nothing is remembered of a voice but how many hops it has given. A piece computes the frames around its own anew, as the
pieces of a whole voice that is too long for one launch do, so that joined they have the bits of the whole.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..config import FRAMES_PER_TOKEN
from ..crowd.buffers import Buffers
from ..crowd.device import Audio, Order
from . import program
from .vocos_tables import PARTS, Piece, group_pieces, margins, voice_pieces

if TYPE_CHECKING:
    from .vocos import GpuDecoder

logger = logging.getLogger(__name__)

CALLS = 2  # under way
BLOCKS = 4  # of page-locked memory: a call's samples lie there until they are copied to memory of their own
CUT_BYTES = 1 << 16  # of samples that the device's thread copies itself
CUTTERS = 2  # threads that copy the rest
BUFFERS_BYTES = 32 << 20  # of sentences heard and forgotten, that a block fills again
FLOAT_BYTES = 4


class _Part(NamedTuple):
    """Where an order's samples lie in its call's memory."""

    order: Order
    start: int  # bytes
    nbytes: int


def _kind(order: Order) -> type[np.int16 | np.float32]:
    return np.int16 if order.pcm else np.float32


class _Call(NamedTuple):
    """A call under way."""

    done: Any  # Event
    block: _Block
    parts: list[_Part]


class _Block:
    """Page-locked memory for the samples of one call."""

    def __init__(self, nbytes: int) -> None:
        memory = program.MappedMemory(nbytes)
        self.address, self._memory = memory.host, memory
        self._buffers = Buffers(BUFFERS_BYTES)  # a block is cut by one thread at a time

    def cut(self, parts: Sequence[_Part]) -> list[Audio]:
        """The samples of orders, each in memory of its own; the interpreter's lock is given away once for all."""
        from ._driver import copy_on_host

        audio = [
            Audio(order.slot, self._buffers.empty(nbytes).view(_kind(order)), order.ends) for order, _, nbytes in parts
        ]
        places = zip(audio, parts, strict=True)
        copy_on_host([(own.samples.ctypes.data, self.address + part.start, part.nbytes) for own, part in places])
        return audio


class _Cutters:
    """Threads that cut blocks, from the first one on. To give them work takes less than it does with an executor."""

    def __init__(self) -> None:
        self._work: SimpleQueue[tuple[Future[list[Audio]], _Block, list[_Part]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def cut(self, block: _Block, parts: list[_Part]) -> Future[list[Audio]]:
        """`block.cut(parts)`, soon."""
        if not self._threads:
            self._start()
        cut: Future[list[Audio]] = Future()
        self._work.put((cut, block, parts))
        return cut

    def close(self) -> None:
        """End the threads, once all is cut."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        for i in range(CUTTERS):
            thread = threading.Thread(target=self._cut_for_ever, name=f"soprano-samples-{i}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _cut_for_ever(self) -> None:
        while (work := self._work.get()) is not None:
            cut, block, parts = work
            try:
                cut.set_result(block.cut(parts))
            except BaseException as error:
                cut.set_exception(error)


class VoiceDecoder:
    """Answers orders for slots whose states lie in (slots, tokens, input_size) float32 on the device.

    Work and copies go on streams of their own; `order` returns at once, `answers` never waits. Until it is answered, a
    call has one of `CALLS` buffers to itself. Whole sentences, half a megabyte each, are copied out of page-locked
    memory by threads that do nothing else.
    """

    def __init__(self, decoder: GpuDecoder, states: Any, *, one_class: bool = False) -> None:
        import cupy

        self._config = decoder.config
        self._slices = decoder.own_slices(one_class=one_class)
        self._margin = margins(decoder.config).total
        self._address, self._tokens = int(states.data.ptr), int(states.shape[1])
        self._slot_bytes = int(states.strides[0])
        self._given = [0] * len(states)  # hops of each slot
        self._owed = [0] * len(states)  # orders of each slot that are not answered
        self._hop_bytes = self._config.hop_length * FLOAT_BYTES
        hops = max(self._slices.rows, FRAMES_PER_TOKEN * self._tokens) + PARTS
        self._buffers = [cupy.empty(hops * self._hop_bytes, np.uint8) for _ in range(CALLS)]
        self._blocks = [_Block(hops * self._hop_bytes) for _ in range(BLOCKS)]
        self._cutters = _Cutters()
        self._cutting: deque[tuple[Future[list[Audio]], _Block]] = deque()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._copies = cupy.cuda.Stream(non_blocking=True)
        self._computed = program.Event()
        self._calls: deque[_Call] = deque()
        self._events: list[Any] = []  # to be used again
        self._turn = 0
        self._slices.prepare()

    @property
    def nbytes(self) -> int:
        """GPU memory of activations and samples."""
        return int(self._slices.nbytes + sum(buffer.nbytes for buffer in self._buffers))

    @property
    def most_states(self) -> int:
        """New states of one call."""
        return int(self._slices.rows // FRAMES_PER_TOKEN)

    @property
    def room(self) -> int:
        """Calls that can be begun now."""
        return min(CALLS - len(self._calls), len(self._blocks))

    @property
    def busy(self) -> bool:
        return bool(self._calls or self._cutting)

    def owes(self, slot: int) -> bool:
        """Whether an order of a slot is not answered yet."""
        return self._owed[slot] > 0

    def begin(self, slots: Sequence[int]) -> None:
        """Other voices are in these slots."""
        for slot in slots:
            self._given[slot] = 0

    def order(self, orders: Sequence[Order]) -> None:
        """Queue what the orders need, where there is room. The states must have been written for good."""
        from ._driver import copy

        buffer = self._buffers[self._turn]
        address = int(buffer.data.ptr)
        parts: list[_Part] = []
        used = 0
        for pcm in (False, True):
            used = self._run([order for order in orders if order.pcm is pcm], address, used, parts, pcm=pcm)
        self._computed.record(self._stream.ptr)
        self._computed.hold(self._copies.ptr)
        block = self._blocks.pop()
        if used:
            copy(block.address, address, used, self._copies.ptr)
        done = self._events.pop() if self._events else program.Event()
        done.record(self._copies.ptr)
        self._turn = (self._turn + 1) % CALLS
        self._calls.append(_Call(done, block, parts))

    def _run(self, orders: Sequence[Order], address: int, used: int, parts: list[_Part], *, pcm: bool) -> int:
        """Queue the orders of one kind, whose samples go behind the first `used` bytes; the bytes in use then."""
        hop_bytes = self._hop_bytes // 2 if pcm else self._hop_bytes
        pieces: list[Piece] = []
        hops = 0
        for order in orders:
            slot = order.slot
            first = hops
            found = voice_pieces(
                self._address + slot * self._slot_bytes, self._tokens, order.states, ends=order.ends,
                given=self._given[slot], output=hops, margin=self._margin, most_rows=self._slices.rows,
            )  # fmt: skip
            if found:
                pieces += found
                hops = found[-1].output + found[-1].hops
            self._given[slot] += hops - first
            self._owed[slot] += 1
            parts.append(_Part(order, used + first * hop_bytes, (hops - first) * hop_bytes))
        for group in group_pieces(pieces, self._slices.rows) if pieces else []:
            self._slices.run(group, self._stream.ptr, **{"pcm" if pcm else "samples": address + used})
        return used + hops * hop_bytes

    def answers(self) -> list[Audio]:
        """What is done by now."""
        audio: list[Audio] = []
        while self._calls and self._calls[0].done.done():
            done, block, parts = self._calls.popleft()
            self._events.append(done)
            # A slot's last samples only may come later than those of later calls: nothing of the slot follows them.
            later = [part for part in parts if part.order.ends and part.nbytes > CUT_BYTES]
            audio += block.cut([part for part in parts if not part.order.ends or part.nbytes <= CUT_BYTES])
            if later:
                self._cutting.append((self._cutters.cut(block, later), block))
            else:
                self._blocks.append(block)
        while self._cutting and self._cutting[0][0].done():
            cut, block = self._cutting.popleft()
            audio += cut.result()
            self._blocks.append(block)
        for answer in audio:
            self._owed[answer.slot] -= 1
        return audio

    def wait(self, seconds: float) -> None:
        """Wait at most so long for the next answer, where one is under way."""
        if self._cutting:
            wait([self._cutting[0][0]], seconds)
        elif self._calls:
            self._calls[0].done.wait(seconds)

    def close(self) -> None:
        """Wait for everything, and end the threads."""
        self._cutters.close()
        self._stream.synchronize()
        self._copies.synchronize()

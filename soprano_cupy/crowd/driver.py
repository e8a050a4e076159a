"""One device's slots, turn by turn: who enters, whose audio is due, who leaves.

A slot is free; or generating; or ended and waiting for its audio; or leaving, until the device says that it is free
again. The device looks through all slots each turn; Python sees one only when something happens in it.
"""

from __future__ import annotations

import heapq
import logging
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import DeviceError
from ..generation import retry
from . import device as status_of
from .device import AT_ITS_END, NOT_WATCHED, Audio, Device, Entry, News, Order
from .job import TOKEN_S, Sentence
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

FIRST_STATES = 5  # of a stream's first piece: four make the first sample final
LATER_STATES = 24  # of the first piece of a sentence that is not heard yet
GROWTH = 2  # a piece's new states for each that has been made before, while the listener has enough to hear
LONGEST_PIECE = 64  # states
PATIENCE_S = 1.0  # a whole sentence's audio is made as if it ran dry so long after its end
PIECE_COST = 6  # states that a piece costs beside its own: what surrounds it is made again
NEWEST_STEP = 0.05  # weight of a step's time in their mean
GATHER_STEPS = 8  # that newcomers and whole sentences may wait for others, so that they are read and decoded together
GATHER_PART = 16  # newcomers that need not wait: one for so many who generate, and who wait while prompts are read,
GATHER_PROMPT = 128  # or as many as one call reads, of so many tokens each
GATHER_FROM = 32  # who generate; below, a decoder's call is as good as any
GATHER_LIVE = 256  # who generate, for each step that newcomers and pieces wait where somebody listens
GATHER_STEP_S = 0.01  # of a step; where one takes longer, nobody waits for several

NOT_FINITE = "the language model made numbers that are not finite; the checkpoint may be damaged: download it again"


class Driver:
    """Speaks the scheduler's sentences on one device. One thread uses it."""

    def __init__(self, device: Device, scheduler: Scheduler) -> None:
        self.device, self.slots = device, device.slots
        self._scheduler = scheduler
        self._of: list[Sentence | None] = [None] * self.slots
        self._slot_of: dict[Sentence, int] = {}
        self.generating = 0  # slots that draw tokens
        self._due = array("q", [NOT_WATCHED]) * self.slots  # tokens at which a piece is due, of those that draw
        self._ordered = [0] * self.slots  # states of the newest order that was given
        self._free = list(range(self.slots))  # a heap: the lowest first, so that few rows hold all
        self._orders: dict[int, tuple[float, Order]] = {}  # wanted, not given yet; with when they should be done
        self._listened: set[int] = set()  # slots among them whose audio is heard as it is made
        self._held_in = self._held_out = 0  # turns that newcomers and orders have waited for others
        self._step_s = 0.0  # mean time of a step
        self._stepped: float | None = None  # when the last was asked for

    def turn(self, now: float) -> bool:
        """One round of everything; whether something is going on."""
        self._remove(self._slot_of[s] for s in self._scheduler.dropped(self) if s in self._slot_of)
        self._admit(now)
        if self.generating:
            self.device.advance()
            if self._stepped is not None:
                self._step_s += NEWEST_STEP * (now - self._stepped - self._step_s)
            self._stepped = now
        else:
            self._stepped = None
        report = self.device.report(self._due)
        for slot in report.left:
            heapq.heappush(self._free, slot)
        self._hear(report.audio, now)
        self._look(report.news, now)
        self._give_orders()
        self._scheduler.flush()
        return len(self._free) < self.slots

    @property
    def free(self) -> int:
        """Slots that can be entered."""
        return len(self._free)

    def _admit(self, now: float) -> None:
        room = min(len(self._free), self.device.most_entries)
        if not room or not self._scheduler.waiting:
            return
        least = 1
        if self._held_in < self._patience(listened=self._scheduler.pressing(now)):
            least = max(1, min(self.generating // GATHER_PART, self.device.prompt_rows // GATHER_PROMPT))
        sentences = self._scheduler.admit(self, room, self.device.prompt_rows, now, least)
        self._held_in = 0 if sentences or least == 1 else self._held_in + 1
        entries = []
        for sentence in sentences:
            slot = heapq.heappop(self._free)
            self._of[slot], self._slot_of[sentence] = sentence, slot
            self._due[slot], self._ordered[slot] = self._first_piece(sentence), 0
            self.generating += 1
            retries = sentence.job.wish.retries
            request = retry(sentence.request, sentence.attempt)
            entries.append(Entry(slot, request, sentence.attempt < retries))
        if entries:
            self.device.admit(entries)

    def _patience(self, *, listened: bool) -> int:
        """Steps that work may wait for more of its kind. listened: somebody would hear that it waits."""
        if self._step_s >= GATHER_STEP_S:
            return 0
        return self.generating // GATHER_LIVE if listened else GATHER_STEPS

    def _first_piece(self, sentence: Sentence) -> int:
        wish = sentence.job.wish
        if not wish.stream or wish.retries:
            return AT_ITS_END
        return FIRST_STATES if sentence.index == sentence.job.next else LATER_STATES

    def _look(self, news: Sequence[News], now: float) -> None:
        """Take care of the slots that have ended and of those that have a piece to give."""
        for slot, count, status, stuck in news:
            sentence = self._of[slot]
            assert sentence is not None
            if status != status_of.RUNNING:
                self._end(slot, sentence, count, status, stuck, now)
            elif self._goes_on_as_heard(slot, sentence, count):
                self._due[slot] = count + self._next_piece(slot, sentence, count, now)
                sentence.heard_tokens = self.device.tokens(slot, count)
                self._order(sentence, Order(slot, count, False, sentence.job.wish.pcm), now)

    def _next_piece(self, slot: int, sentence: Sentence, count: int, now: float) -> int:
        """Tokens until a stream's next piece: twice as many, or so few that half of what there is to hear is left."""
        most = min(GROWTH * count, LONGEST_PIECE)
        given = (count - self._ordered[slot]) * TOKEN_S
        if sentence.index != sentence.job.next or self._step_s <= 0:
            return most
        patience = (sentence.job.audio_ends() + given - now) / (2 * self._step_s)
        return max(1, min(most, int(patience)))

    def _end(self, slot: int, sentence: Sentence, count: int, status: int, stuck: bool, now: float) -> None:
        """A slot draws no more tokens."""
        self._draws_no_more(slot)
        wish = sentence.job.wish
        if status == status_of.FAILED:
            self._remove([slot])
            self._scheduler.fault(self, sentence, DeviceError(NOT_FINITE))
        elif stuck and sentence.attempt < wish.retries:
            logger.warning("a sentence got stuck; trying again with another seed")
            self._remove([slot])
            self._scheduler.again(self, sentence)
        elif self._goes_on_as_heard(slot, sentence, count):
            _warn(status, stuck)
            self._scheduler.made(sentence, count)
            states = count - (status == status_of.STOP)
            if states >= 2:
                self._order(sentence, Order(slot, states, True, wish.pcm), now)
            else:
                self._remove([slot])
                self._scheduler.deliver(self, sentence, np.empty(0, np.float32), ends=True, now=now)

    def _goes_on_as_heard(self, slot: int, sentence: Sentence, count: int) -> bool:
        """Whether a sentence that was heard in part before a fault says the same again; else it fails.

        State j follows from the tokens before j: the last of those that were drawn made no sound.
        """
        before = sentence.heard_tokens
        if before is None or sentence.faults == 0:
            return True
        common = min(len(before) - 1, count)
        if np.array_equal(self.device.tokens(slot, common), before[:common]):
            return True
        self._remove([slot])
        why = "a device failed while a stream was heard, and the rest could not be made to fit; submit it again"
        self._scheduler.fail(self, sentence, DeviceError(why))
        return False

    def _order(self, sentence: Sentence, order: Order, now: float) -> None:
        """A piece is wanted, in place of an earlier one of the slot that is not given yet."""
        listened = sentence.job.wish.stream
        self._orders[order.slot] = sentence.job.audio_ends() if listened else now + PATIENCE_S, order
        if listened:
            self._listened.add(order.slot)

    def _give_orders(self) -> None:
        while self._orders and self.device.decode_room() > 0 and not self._gathers():
            chosen = self._most_urgent()
            for order in chosen:
                del self._orders[order.slot]
                self._listened.discard(order.slot)
                self._ordered[order.slot] = order.states
            self._held_out = 0
            self.device.decode(chosen)

    def _gathers(self) -> bool:
        """Whether to wait for further orders: large calls cost the least for each state."""
        if self.generating < GATHER_FROM or self._held_out >= self._patience(listened=bool(self._listened)):
            return False
        if sum(order.states + PIECE_COST for _, order in self._orders.values()) >= self.device.decode_states:
            return False
        self._held_out += 1
        return True

    def _most_urgent(self) -> list[Order]:
        """As many orders as one call takes, those first that should be done first; at least one."""
        chosen: list[Order] = []
        room = self.device.decode_states
        wanted: Iterable[tuple[float, Order]] = self._orders.values()
        if sum(order.states + PIECE_COST for _, order in wanted) > room:
            wanted = sorted(wanted)
        for _, order in wanted:
            room -= order.states - self._ordered[order.slot] + PIECE_COST
            if chosen and room < 0:
                break
            chosen.append(order)
        return chosen

    def _hear(self, answers: Sequence[Audio], now: float) -> None:
        for slot, samples, ends in answers:
            sentence = self._of[slot]
            if sentence is not None:
                self._scheduler.deliver(self, sentence, samples, ends=ends, now=now)
        self._remove(slot for slot, _, ends in answers if ends and self._of[slot] is not None)

    def _remove(self, slots: Iterable[int]) -> None:
        gone = list(slots)
        for slot in gone:
            sentence, self._of[slot] = self._of[slot], None
            if sentence is not None:
                del self._slot_of[sentence]
            self._draws_no_more(slot)
            self._orders.pop(slot, None)
            self._listened.discard(slot)
        if gone:
            self.device.remove(gone)

    def _draws_no_more(self, slot: int) -> None:
        if self._due[slot] != NOT_WATCHED:
            self._due[slot] = NOT_WATCHED
            self.generating -= 1


def _warn(status: int, stuck: bool) -> None:
    if stuck:
        logger.warning("a sentence got stuck repeating itself; retries=2 makes it again with another seed")
    elif status == status_of.LENGTH:
        logger.warning("a sentence reached the token limit before its end; it may be cut off or hallucinated")

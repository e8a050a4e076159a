# cython: language_level=3, boundscheck=False, wraparound=False
"""What host and GPU tell each other. The decoder's tables and prompts go straight into the memory that is copied.

The loops of a table's rows run here with the interpreter's lock: they take a few microseconds, where arrays of NumPy
give the lock away at each operation and wait to have it back. The layouts are the dtypes of `vocos_tables.py` and
`slots.py`; a view of an array with another one is refused.
"""

import math

import numpy as np

from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset

from ..config import FRAMES_PER_TOKEN as _FRAMES_PER_TOKEN
from ..crowd.device import NOT_WATCHED, News
from ..errors import ParameterError
from .slots import COUNT, IS_STUCK, OPTION_GIVE_UP, OPTION_GREEDY, STATUS

cdef enum:
    PARTS_OF_A_FRAME = 4  # hops
PARTS = PARTS_OF_A_FRAME

cdef int FRAMES_PER_TOKEN = _FRAMES_PER_TOKEN
cdef int32_t GREEDY = OPTION_GREEDY, GIVE_UP = OPTION_GIVE_UP
cdef object LOG2_E = math.log2(math.e)
cdef double LARGEST_SCALE = 1e37  # of log2(e) / temperature: any colder takes the most likely token all the same
cdef double LARGEST_PENALTY = float(np.finfo(np.float32).max)


cdef struct Segment:
    uint64_t states
    int32_t ring
    int32_t rows
    int32_t token_shift
    int32_t history
    int32_t reserved[2]


cdef struct Token:
    int32_t segment
    int32_t token


cdef struct Row:
    int32_t segment
    int32_t index
    int32_t frame
    int32_t frames


cdef struct Span:
    int32_t row
    int32_t first_frame
    int32_t first_hop
    int32_t end_hop
    int32_t frames
    int32_t open
    int32_t keep
    int32_t output


cdef struct SlotState:
    uint64_t seed
    uint64_t stream
    double top_p
    float scale_high
    float scale_low
    float penalty
    int32_t options
    int32_t limit
    int32_t count
    int32_t position
    int32_t status
    int32_t repeats
    int32_t stuck


# ---- the decoder ----


cdef class Piece:
    """Frames first_frame to end_frame - 1 of a voice, and the hops that are made of them."""

    cdef readonly uint64_t states  # device address of (ring, input_size) float32; token t is row t % ring
    cdef readonly int ring
    cdef readonly int frames  # of the voice
    cdef readonly int first_frame
    cdef readonly int end_frame
    cdef readonly int first_token  # states to embed; -1 where a stream begins
    cdef readonly int end_token
    cdef readonly int first_hop
    cdef readonly int end_hop
    cdef readonly int output  # hops before first_hop in the output
    cdef readonly int lag  # of the last layer behind the rows' frames; streams
    cdef readonly int history  # which history to read, 2 slot + 0 or 1; -1: no stream
    cdef readonly bint resumes  # whether there are open sums to begin with; streams

    def __init__(
        self, *, states, ring, frames, first_frame, end_frame, first_token, end_token, first_hop, end_hop, output,
        lag=0, history=-1, resumes=False
    ):
        self.states, self.ring, self.frames = states, ring, frames
        self.first_frame, self.end_frame = first_frame, end_frame
        self.first_token, self.end_token = first_token, end_token
        self.first_hop, self.end_hop, self.output = first_hop, end_hop, output
        self.lag, self.history, self.resumes = lag, history, resumes

    @property
    def rows(self):
        return self.end_frame - self.first_frame

    @property
    def tokens(self):
        return self.end_token - self.first_token

    @property
    def hops(self):
        return max(0, self.end_hop - self.first_hop)

    def __repr__(self):
        return (
            f"Piece(frames {self.first_frame} to {self.end_frame} of {self.frames}, states {self.first_token} to "
            f"{self.end_token}, hops {self.first_hop} to {self.end_hop}, output {self.output}, history {self.history})"
        )


def pieces_between(
    int first_hop, int end_hop, int most_hops, *, uint64_t states, int ring, int known, int frames, int output,
    int margin
):
    """The pieces of at most so many hops each that make these hops one after the other, from `output` on.

    Each brings with it the frames around its own, of those `known`, that its results need: so they have the bits of
    the whole.
    """
    cdef int hop = first_hop
    cdef Piece piece
    cdef list pieces = []
    if most_hops < 1:
        raise ParameterError(f"a slice of the decoder has room for {most_hops} hops; it takes more rows")
    while hop < end_hop:
        piece = Piece.__new__(Piece)
        piece.states, piece.ring, piece.frames, piece.history = states, ring, frames, -1
        piece.first_hop, piece.end_hop = hop, min(hop + most_hops, end_hop)
        piece.first_frame = max(0, hop - PARTS_OF_A_FRAME + 1 - margin)
        piece.end_frame = min(known, piece.end_hop + margin)
        piece.first_token = piece.first_frame // FRAMES_PER_TOKEN
        piece.end_token = (piece.end_frame + FRAMES_PER_TOKEN - 2) // FRAMES_PER_TOKEN + 1
        piece.output = output + hop - first_hop
        pieces.append(piece)
        hop = piece.end_hop
    return pieces


cdef class SliceTables:
    """The tables of `kernels/vocos_params.cuh` for one slice, in arrays of their dtypes that are written again."""

    cdef uint64_t[::1] output
    cdef Segment[::1] segments
    cdef Token[::1] tokens
    cdef Row[::1] rows
    cdef Span[::1] spans

    def __init__(self, output, segments, tokens, rows, spans):
        self.output, self.segments, self.tokens, self.rows, self.spans = output, segments, tokens, rows, spans

    def write(self, pieces, int hops_of_a_block, *, uint64_t samples=0, uint64_t pcm=0):
        """Write the pieces' tables; how many rows, tokens and spans they have.

        hops_of_a_block: of whole voices; the hops of a stream's piece are one block's. samples, pcm: where float32 and
        16-bit samples go.
        """
        cdef Py_ssize_t rows = 0, tokens = 0, spans = 0
        cdef int segment = 0
        cdef Piece piece
        self._check(pieces, hops_of_a_block)
        self.output[0], self.output[1] = samples, pcm
        for piece in pieces:
            self._segment(piece, segment, tokens)
            spans = self._stream_span(piece, spans, rows) if piece.history >= 0 else self._whole_spans(
                piece, spans, rows, hops_of_a_block
            )
            tokens = self._tokens(piece, tokens, segment)
            rows = self._rows(piece, rows, segment)
            segment += 1
        return rows, tokens, spans

    cdef int _check(self, pieces, int hops_of_a_block) except -1:
        """That the tables hold the pieces."""
        cdef int64_t rows = 0, tokens = 0, spans = 0, count = 0
        cdef bint fits = hops_of_a_block > 0
        cdef Piece piece
        if fits:
            for piece in pieces:
                fits = fits and piece.end_frame >= piece.first_frame and piece.end_token >= piece.first_token
                rows += piece.end_frame - piece.first_frame
                tokens += piece.end_token - piece.first_token
                spans += 1 if piece.history >= 0 else blocks_of(piece, hops_of_a_block)
                count += 1
        if fits and count <= self.segments.shape[0] and tokens <= self.tokens.shape[0]:
            if rows <= self.rows.shape[0] and spans <= self.spans.shape[0]:
                return 0
        raise ParameterError(
            f"{count} pieces of {rows} frames, {tokens} states and {spans} spans of {hops_of_a_block} hops do not fit "
            f"tables of {self.segments.shape[0]}, {self.rows.shape[0]}, {self.tokens.shape[0]} and "
            f"{self.spans.shape[0]}; decode fewer at a time"
        )

    cdef void _segment(self, Piece piece, int number, Py_ssize_t first_token_row) noexcept:
        cdef Segment *segment = &self.segments[number]
        segment.states, segment.ring, segment.history = piece.states, piece.ring, piece.history
        segment.rows = piece.end_frame - piece.first_frame
        segment.token_shift = <int32_t>first_token_row - piece.first_token
        segment.reserved[0] = segment.reserved[1] = 0

    cdef Py_ssize_t _tokens(self, Piece piece, Py_ssize_t row, int segment) noexcept:
        cdef int number
        cdef Token *token
        for number in range(piece.first_token, piece.end_token):
            token = &self.tokens[row]
            token.segment, token.token = segment, number
            row += 1
        return row

    cdef Py_ssize_t _rows(self, Piece piece, Py_ssize_t first, int segment) noexcept:
        cdef int index, count = piece.end_frame - piece.first_frame, frame = piece.first_frame, frames = piece.frames
        cdef Row *row
        for index in range(count):
            row = &self.rows[first + index]
            row.segment, row.index, row.frame, row.frames = segment, index, frame + index, frames
        return first + count

    cdef Py_ssize_t _whole_spans(self, Piece piece, Py_ssize_t place, Py_ssize_t row, int hops_of_a_block) noexcept:
        """The thread blocks that make a whole voice's hops."""
        cdef int block, hop = piece.first_hop, count = blocks_of(piece, hops_of_a_block)
        cdef Span *span
        for block in range(count):
            span = &self.spans[place + block]
            span.first_frame = hop - (PARTS_OF_A_FRAME - 1)
            span.row = <int32_t>row - piece.first_frame + span.first_frame
            span.first_hop, span.end_hop = hop, min(hop + hops_of_a_block, piece.end_hop)
            span.frames, span.open, span.keep = piece.frames, -1, -1
            span.output = piece.output + hop - piece.first_hop
            hop += hops_of_a_block
        return place + count

    cdef Py_ssize_t _stream_span(self, Piece piece, Py_ssize_t place, Py_ssize_t row) noexcept:
        """The one thread block of a stream's piece."""
        cdef Span *span = &self.spans[place]
        span.row, span.first_frame, span.open = <int32_t>row, piece.first_frame - piece.lag, piece.history
        if not piece.resumes:  # nothing is before frame 0
            span.row, span.first_frame, span.open = <int32_t>row - span.first_frame, 0, -1
        span.first_hop, span.end_hop, span.frames = piece.first_hop, piece.end_hop, piece.frames
        span.keep, span.output = piece.history ^ 1, piece.output
        return place + 1


cdef inline int blocks_of(Piece piece, int hops_of_a_block) noexcept:
    """Thread blocks for a whole voice's hops."""
    cdef int hops = piece.end_hop - piece.first_hop
    return (hops - 1) // hops_of_a_block + 1 if hops > 0 else 0


# ---- prompts ----


cdef const int32_t[:] _int32(ids):
    """A prompt as it is, or as int32."""
    try:
        return ids
    except ValueError:
        return np.asarray(ids).astype(np.int32)


def write_prompts(tables, prompts, slots, padded):
    """Where each prompt starts, and the tokens, slots and positions of their rows; how many rows there are, and end.

    tables: starts, ids, row_slots and row_positions, int32. padded: from the prompts' rows to those that the program
    takes; those beyond are of no slot.
    """
    cdef int32_t[::1] starts = tables["starts"], ids = tables["ids"]
    cdef int32_t[::1] row_slots = tables["row_slots"], row_positions = tables["row_positions"]
    cdef const int32_t[:] prompt
    cdef Py_ssize_t most = min(ids.shape[0], row_slots.shape[0], row_positions.shape[0])
    cdef Py_ssize_t number = 0, row = 0, end, i
    cdef int32_t slot
    if len(prompts) >= starts.shape[0] or len(prompts) != len(slots):
        raise ParameterError(f"{len(prompts)} prompts for {len(slots)} slots do not fit {starts.shape[0]} starts")
    starts[0] = 0
    for ids_of_prompt, slot_of_prompt in zip(prompts, slots):
        prompt, slot = _int32(ids_of_prompt), slot_of_prompt
        if row + prompt.shape[0] > most:
            raise ParameterError(f"the prompts have more tokens than the {most} rows of a prefill; read fewer at a time")
        for i in range(prompt.shape[0]):
            ids[row + i], row_slots[row + i], row_positions[row + i] = prompt[i], slot, <int32_t>i
        row += prompt.shape[0]
        number += 1
        starts[number] = <int32_t>row
    end = padded(row)
    if end > most:
        raise ParameterError(f"a prefill of {end} rows has tables of {most}; read fewer prompts at a time")
    for i in range(row, end):
        ids[i], row_slots[i], row_positions[i] = 0, -1, 0
    return row, end


def write_seen_masks(uint32_t[:, ::1] seen, prompts):
    """Row i: bit t % 32 of word t / 32 is set for each id t that prompt i holds."""
    cdef const int32_t[:] prompt
    cdef Py_ssize_t row = 0, i, words = seen.shape[1]
    cdef uint32_t *mask
    cdef uint32_t token
    if len(prompts) > seen.shape[0]:
        raise ParameterError(f"{len(prompts)} prompts do not fit {seen.shape[0]} masks")
    for ids in prompts:
        prompt = _int32(ids)
        mask = &seen[row, 0]
        memset(mask, 0, words * sizeof(uint32_t))
        for i in range(prompt.shape[0]):
            token = <uint32_t>prompt[i]  # a negative one is too large then
            if token // 32 >= words:
                raise ParameterError(f"a prompt holds token {prompt[i]}; this model knows fewer than {32 * words}")
            mask[token // 32] |= <uint32_t>1 << token % 32
        row += 1


def write_slot_states(SlotState[::1] records, requests, give_up, int64_t capacity, int64_t tokens=INT32_MAX):
    """Row i: the record with which request i begins, behind its prompt and before its first token.

    give_up: of each request, whether it ends as soon as the loop check finds the voice stuck. capacity: tokens of a
    slot; tokens: new ones of a slot. A sequence ends by length at `max_new_tokens`, or where its next token would have
    no place any more.
    """
    cdef Py_ssize_t row = 0
    cdef SlotState *record
    cdef double scale
    cdef int64_t length
    if len(requests) > records.shape[0] or len(requests) != len(give_up):
        raise ParameterError(f"{len(requests)} sequences ({len(give_up)}) do not fit {records.shape[0]} slots")
    for request, gives_up in zip(requests, give_up):
        record, params, length = &records[row], request.params, len(request.ids)
        memset(record, 0, sizeof(SlotState))
        temperature = params.temperature
        greedy = temperature == 0
        scale = 0.0 if greedy else min(<double>(LOG2_E / temperature), LARGEST_SCALE)
        record.seed, record.stream, record.top_p = params.seed or 0, request.stream, params.top_p
        record.scale_high = <float>scale
        record.scale_low = <float>(scale - <double>record.scale_high)
        record.penalty = <float>min(<double>params.repetition_penalty, LARGEST_PENALTY)
        record.options = (GREEDY if greedy else 0) | (GIVE_UP if gives_up else 0)
        record.limit = <int32_t>min(<int64_t>params.max_new_tokens, capacity - length + 1, tokens)
        record.position = <int32_t>(length - 1)
        row += 1


def write_column(int32_t[::1] column, values, Py_ssize_t end, int32_t nothing):
    """The values first, then `nothing` up to `end`."""
    cdef Py_ssize_t row = 0
    if len(values) > column.shape[0] or end > column.shape[0]:
        raise ParameterError(f"{max(len(values), end)} numbers do not fit {column.shape[0]}")
    for value in values:
        column[row] = value
        row += 1
    while row < end:
        column[row] = nothing
        row += 1


# ---- their way ----


def joined(parts, Py_ssize_t gap):
    """(start, nbytes) of the copies that bring these parts of one memory, in the order of their places.

    Parts with at most `gap` bytes between them travel together.
    """
    cdef Py_ssize_t begin = 0, end = -1, start, nbytes
    cdef list copies = []
    for start, nbytes in parts:
        if nbytes == 0:
            continue
        if end < 0 or start - end > gap:
            if end >= 0:
                copies.append((begin, end - begin))
            begin = start
        end = start + nbytes
    if end >= 0:
        copies.append((begin, end - begin))
    return copies


# ---- what comes back ----


def watched_slots(const uint64_t[::1] words, watched):
    """`News` of the slots that have drawn as many tokens as are waited for, or have ended.

    words: what each slot has published last (`slots.py`); the GPU may be writing them. watched: as `Device.report`
    takes it.
    """
    cdef int64_t[::1] due = watched
    cdef Py_ssize_t slot
    cdef uint64_t word
    cdef int64_t tokens, nobody = NOT_WATCHED
    cdef int count_at = COUNT[0], status_at = STATUS[0], stuck_at = IS_STUCK[0], status
    cdef uint64_t count_mask = (1 << COUNT[1]) - 1, status_mask = (1 << STATUS[1]) - 1
    cdef list found = []
    if words.shape[0] != due.shape[0]:
        raise ParameterError(f"{due.shape[0]} slots are watched, and there are {words.shape[0]}")
    for slot in range(words.shape[0]):
        if due[slot] == nobody:
            continue
        word = words[slot]
        tokens, status = word >> count_at & count_mask, word >> status_at & status_mask
        if status != 0 or tokens >= due[slot]:
            found.append(News(slot, tokens, status, (word >> stuck_at & 1) != 0))
    return found

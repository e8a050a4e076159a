"""Which row of the decoder's activations is which frame of which voice: the tables of `kernels/vocos_params.cuh`.

T states make F = 4 (T - 1) + 1 frames, and those F - 1 hops of samples: hop h is what frames h - 3 to h share, and the
audio is hops 2 to F. A `Piece` is the consecutive frames of one voice that one launch sequence takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..config import FRAMES_PER_TOKEN, DecoderConfig

SEGMENT = np.dtype(
    [
        ("states", "<u8"), ("ring", "<i4"), ("rows", "<i4"), ("token_shift", "<i4"), ("history", "<i4"),
        ("reserved", "<i4", 2),
    ]
)  # fmt: skip
ROW_BYTES, TOKEN_BYTES, SPAN_BYTES = 16, 8, 32
ENDLESS = 1 << 30  # frames of a stream whose end is not known
PARTS = 4  # hops of a frame
FIRST_HOP = PARTS // 2  # the audio begins in the middle of the first frame


class Margins(NamedTuple):
    """Frames that a result needs to either side: of the embedding, of each block, of all together."""

    embed: int
    block: int
    total: int


def margins(config: DecoderConfig) -> Margins:
    """Half the windows of a decoder's convolutions."""
    embed, block = config.embed_kernel // 2, config.block_kernel // 2
    return Margins(embed, block, embed + config.num_blocks * block)


def frames_of(tokens: int) -> int:
    """The frames of a voice of `tokens` states."""
    return FRAMES_PER_TOKEN * (tokens - 1) + 1


@dataclass(frozen=True)
class Piece:
    """Frames first_frame to end_frame - 1 of a voice, and the hops that are made of them."""

    states: int  # device address of (ring, input_size) float32; token t is row t % ring
    ring: int
    frames: int  # of the voice
    first_frame: int
    end_frame: int
    first_token: int  # states to embed; -1 where a stream begins
    end_token: int
    first_hop: int
    end_hop: int
    output: int  # hops before first_hop in the output
    lag: int = 0  # of the last layer behind the rows' frames; streams
    history: int = -1  # which history to read, 2 slot + 0 or 1; streams
    resumes: bool = False  # whether there are open sums to begin with

    @property
    def rows(self) -> int:
        return self.end_frame - self.first_frame

    @property
    def tokens(self) -> int:
        return self.end_token - self.first_token

    @property
    def hops(self) -> int:
        return max(0, self.end_hop - self.first_hop)


def whole_pieces(states: int, tokens: int, output: int, margin: int, most_rows: int) -> Iterator[Piece]:
    """A whole voice of `tokens` states at address `states`, in several pieces where it is longer than `most_rows`.

    A piece brings with it the frames around it that its own results need, so its samples have the bits of the whole.
    """
    frames = frames_of(tokens)
    most_hops = frames if frames <= most_rows else most_rows - 2 * margin - PARTS
    for first_hop in range(FIRST_HOP, frames + 1, most_hops):
        end_hop = min(first_hop + most_hops, frames + 1)
        at = output + first_hop - FIRST_HOP
        yield piece_around(
            first_hop, end_hop, states=states, ring=tokens, known=frames, frames=frames, output=at, margin=margin
        )


def piece_around(
    first_hop: int, end_hop: int, *, states: int, ring: int, known: int, frames: int, output: int, margin: int
) -> Piece:
    """The piece that makes these hops, with the frames around them, of those `known`, that their results need."""
    first_frame, end_frame = max(0, first_hop - PARTS + 1 - margin), min(known, end_hop + margin)
    return Piece(
        states=states,
        ring=ring,
        frames=frames,
        first_frame=first_frame,
        end_frame=end_frame,
        first_token=first_frame // FRAMES_PER_TOKEN,
        end_token=(end_frame + FRAMES_PER_TOKEN - 2) // FRAMES_PER_TOKEN + 1,
        first_hop=first_hop,
        end_hop=end_hop,
        output=output,
    )


def group_pieces(pieces: Sequence[Piece], most_rows: int) -> list[list[Piece]]:
    """Slices of at most `most_rows` rows each, about as large as one another; pieces stay in order."""
    total = sum(piece.rows for piece in pieces)
    wanted = total / max(1, -(-total // most_rows))
    slices: list[list[Piece]] = [[]]
    rows = 0
    for piece in pieces:
        if slices[-1] and (rows + piece.rows > most_rows or rows + piece.rows / 2 > wanted):
            slices.append([])
            rows = 0
        slices[-1].append(piece)
        rows += piece.rows
    return slices


@dataclass(frozen=True)
class Tables:
    """What the kernels of one slice read, as arrays to be copied to the device."""

    segments: np.ndarray  # (pieces,) SEGMENT
    tokens: np.ndarray  # (tokens, 2) int32
    rows: np.ndarray  # (rows, 4) int32
    spans: np.ndarray  # (spans, 8) int32


def build_tables(pieces: Sequence[Piece], hops_of_a_block: int) -> Tables:
    """The tables of one slice. hops_of_a_block: of whole voices; the hops of a stream's piece are one block's."""
    columns = np.array(
        [(p.rows, p.tokens, p.first_frame, p.first_token, p.frames, p.history, p.ring) for p in pieces], np.int64
    )
    rows, tokens, first_frame, first_token, frames, history, ring = columns.T
    first_row, first_token_row = np.cumsum(rows) - rows, np.cumsum(tokens) - tokens
    segments = np.zeros(len(pieces), SEGMENT)
    segments["states"] = np.array([p.states for p in pieces], np.uint64)
    segments["ring"], segments["rows"], segments["history"] = ring, rows, history
    segments["token_shift"] = first_token_row - first_token
    row_table = np.empty((int(rows.sum()), 4), np.int32)
    row_table[:, 0], row_table[:, 1] = _numbered(rows)
    row_table[:, 2] = row_table[:, 1] + np.repeat(first_frame, rows)
    row_table[:, 3] = np.repeat(frames, rows)
    token_table = np.empty((int(tokens.sum()), 2), np.int32)
    token_table[:, 0], token_table[:, 1] = _numbered(tokens)
    token_table[:, 1] += np.repeat(first_token, tokens)
    if pieces[0].history >= 0:
        spans = [_stream_span(piece, row) for piece, row in zip(pieces, first_row.tolist(), strict=True)]
        return Tables(segments, token_table, row_table, np.array(spans, np.int32))
    return Tables(segments, token_table, row_table, _whole_spans(pieces, first_row, hops_of_a_block))


def _numbered(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For `counts` items of each group, one after the other: the group of each, and its number in the group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)


def _whole_spans(pieces: Sequence[Piece], first_row: np.ndarray, hops_of_a_block: int) -> np.ndarray:
    """(n, 8) int32: the thread blocks that make the pieces' hops, as `VocosSpan` has its fields."""
    columns = np.array([(p.first_hop, p.end_hop, p.first_frame, p.frames, p.output) for p in pieces], np.int64)
    first_hop, end_hop, first_frame, frames, output = columns.T
    piece, number = _numbered(-(-(end_hop - first_hop) // hops_of_a_block))
    behind = number * hops_of_a_block  # hops of the piece before the block's
    hop = first_hop[piece] + behind
    spans = np.empty((len(piece), 8), np.int32)
    spans[:, 0] = (first_row - first_frame)[piece] + hop - (PARTS - 1)
    spans[:, 1] = hop - (PARTS - 1)
    spans[:, 2] = hop
    spans[:, 3] = np.minimum(hop + hops_of_a_block, end_hop[piece])
    spans[:, 4] = frames[piece]
    spans[:, 5:7] = -1
    spans[:, 7] = output[piece] + behind
    return spans


def _stream_span(piece: Piece, first_row: int) -> tuple[int, ...]:
    """The one thread block of a stream's piece."""
    first, opened = piece.first_frame - piece.lag, piece.history
    if not piece.resumes:  # nothing is before frame 0
        first_row, first, opened = first_row - first, 0, -1
    return first_row, first, piece.first_hop, piece.end_hop, piece.frames, opened, piece.history ^ 1, piece.output


class Progress(NamedTuple):
    """How far a stream is: states that went through the decoder, and hops that came out."""

    tokens: int = 0
    hops: int = 0


def stream_piece(
    *, states: int, ring: int, slot: int, turn: int, done: Progress, tokens: int, ends: bool, lag: int, output: int
) -> Piece:
    """The piece of a stream that takes states done.tokens to tokens - 1 and, where it `ends`, everything behind them.

    turn: 0 or 1, the history to read; it changes with every piece. `lag` is the decoder's total margin.
    """
    first_frame = FRAMES_PER_TOKEN * (done.tokens - 1) + 1
    frames = frames_of(tokens)
    end_frame = frames + lag + 1 if ends else frames  # the last hop comes behind the last frame
    return Piece(
        states=states,
        ring=ring,
        frames=frames if ends else ENDLESS,
        first_frame=first_frame,
        end_frame=end_frame,
        first_token=done.tokens - 1,
        end_token=max(tokens, done.tokens),
        first_hop=FIRST_HOP + done.hops,
        end_hop=end_frame - lag,
        output=output,
        lag=lag,
        history=2 * slot + turn,
        resumes=done.tokens > 0,
    )

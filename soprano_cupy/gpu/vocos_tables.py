"""Which row of the decoder's activations is which frame of which voice: the tables of `kernels/vocos_params.cuh`.

T states make F = 4 (T - 1) + 1 frames, and those F - 1 hops of samples: hop h is what frames h - 3 to h share, and the
audio is hops 2 to F. A `Piece` is the consecutive frames of one voice that one launch sequence takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..config import FRAMES_PER_TOKEN, DecoderConfig
from ._tables import PARTS as PARTS
from ._tables import Piece as Piece
from ._tables import SliceTables, pieces_between

SEGMENT = np.dtype(
    [
        ("states", "<u8"), ("ring", "<i4"), ("rows", "<i4"), ("token_shift", "<i4"), ("history", "<i4"),
        ("reserved", "<i4", 2),
    ]
)  # fmt: skip
TOKEN = np.dtype([("segment", "<i4"), ("token", "<i4")])
ROW = np.dtype([("segment", "<i4"), ("index", "<i4"), ("frame", "<i4"), ("frames", "<i4")])
SPAN = np.dtype(
    [
        ("row", "<i4"), ("first_frame", "<i4"), ("first_hop", "<i4"), ("end_hop", "<i4"), ("frames", "<i4"),
        ("open", "<i4"), ("keep", "<i4"), ("output", "<i4"),
    ]
)  # fmt: skip
TABLES = {"output": np.dtype("<u8"), "segments": SEGMENT, "tokens": TOKEN, "rows": ROW, "spans": SPAN}
ROW_BYTES, TOKEN_BYTES, SPAN_BYTES = ROW.itemsize, TOKEN.itemsize, SPAN.itemsize
ENDLESS = 1 << 30  # frames of a stream whose end is not known
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


def whole_pieces(states: int, tokens: int, output: int, margin: int, most_rows: int) -> list[Piece]:
    """A whole voice of `tokens` states at address `states`, in several pieces where it is longer than `most_rows`.

    A piece brings with it the frames around it that its own results need, so its samples have the bits of the whole.
    """
    frames = frames_of(tokens)
    most_hops = frames if frames <= most_rows else most_rows - 2 * margin - PARTS
    return pieces_between(
        FIRST_HOP, frames + 1, most_hops, states=states, ring=tokens, known=frames, frames=frames, output=output,
        margin=margin,
    )  # fmt: skip


def voice_pieces(
    states: int, ring: int, count: int, *, ends: bool, given: int, output: int, margin: int, most_rows: int
) -> list[Piece]:
    """What makes the hops that the first `count` states make final, but for the first `given`.

    states: device address of (ring, input_size) float32. ends: there are no further ones. output: hops before these in
    the call's memory. margin: of the decoder in all.
    """
    known = frames_of(count)
    return pieces_between(
        FIRST_HOP + given, known + 1 if ends else known - margin, most_rows - 2 * margin - PARTS,
        states=states, ring=ring, known=known, frames=known if ends else ENDLESS, output=output, margin=margin,
    )  # fmt: skip


def group_pieces(pieces: Sequence[Piece], most_rows: int) -> list[list[Piece]]:
    """Slices of at most `most_rows` rows each, about as large as one another; pieces stay in order."""
    sizes = [piece.rows for piece in pieces]
    total = sum(sizes)
    wanted = total / max(1, -(-total // most_rows))
    slices: list[list[Piece]] = [[]]
    rows = 0
    for piece, size in zip(pieces, sizes, strict=True):
        if slices[-1] and (rows + size > most_rows or rows + size / 2 > wanted):
            slices.append([])
            rows = 0
        slices[-1].append(piece)
        rows += size
    return slices


def slice_tables(memory: Mapping[str, np.ndarray]) -> SliceTables:
    """What writes the tables of a slice to arrays of bytes with these names, each of them contiguous."""
    return SliceTables(**{name: memory[name].reshape(-1).view(dtype) for name, dtype in TABLES.items()})


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

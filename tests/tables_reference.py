"""The tables that the host writes for the GPU's kernels, in NumPy: what `soprano_cupy.gpu._tables` is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from soprano_cupy.generation import Request
from soprano_cupy.gpu.slots import OPTION_GIVE_UP, OPTION_GREEDY, SLOT_STATE
from soprano_cupy.gpu.vocos_tables import PARTS, SEGMENT, Piece


@dataclass(frozen=True)
class Tables:
    """What the kernels of one slice of the decoder read."""

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


def prompt_tables(
    prompts: Sequence[np.ndarray], slots: Sequence[int], padded: Callable[[int], int]
) -> dict[str, np.ndarray]:
    """starts, ids, row_slots and row_positions of a prefill, as long as they are used."""
    lengths = np.array([len(ids) for ids in prompts])
    ends = np.cumsum(lengths)
    behind = np.ones(padded(int(ends[-1])) - int(ends[-1]), np.int64)
    tables = {
        "starts": np.concatenate(([0], ends)),
        "ids": np.concatenate([*prompts, 0 * behind]),
        "row_slots": np.concatenate((np.repeat(slots, lengths), -behind)),
        "row_positions": np.concatenate([*map(np.arange, lengths), 0 * behind]),
    }
    return {name: table.astype(np.int32) for name, table in tables.items()}


def seen_masks(prompts: Sequence[np.ndarray], words: int) -> np.ndarray:
    """(len(prompts), words) uint32: bit i % 32 of word i / 32 is set for each id i that the prompt holds."""
    held = np.zeros((len(prompts), words * 32), np.uint8)
    for row, ids in zip(held, prompts, strict=True):
        row[ids] = 1
    return np.packbits(held, axis=1, bitorder="little").view(np.uint32)


def slot_state(request: Request, capacity: int, *, give_up: bool = False) -> Any:
    """The `SLOT_STATE` record with which a sequence begins."""
    params = request.params
    scale = 0.0 if params.temperature == 0 else min(math.log2(math.e) / params.temperature, 1e37)
    record = np.zeros((), SLOT_STATE)
    record["seed"] = params.seed or 0
    record["stream"] = request.stream
    record["top_p"] = params.top_p
    record["scale_high"] = np.float32(scale)
    record["scale_low"] = np.float32(scale - float(np.float32(scale)))
    record["penalty"] = np.float32(min(params.repetition_penalty, float(np.finfo(np.float32).max)))
    record["options"] = (OPTION_GREEDY if params.temperature == 0 else 0) | (OPTION_GIVE_UP if give_up else 0)
    record["limit"] = min(params.max_new_tokens, capacity - len(request.ids) + 1)
    record["position"] = len(request.ids) - 1
    return record[()]

"""What the host works out for a crowd on a GPU: rows, memory, graphs, the pieces of voices, and the news of slots."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soprano_cupy import ParameterError
from soprano_cupy.crowd.device import AT_ITS_END, NOT_WATCHED, News
from soprano_cupy.gpu import slots
from soprano_cupy.gpu._tables import watched_slots
from soprano_cupy.gpu.crowd_rows import BUCKETS, Rows, bucket_of, buckets_up_to
from soprano_cupy.gpu.crowd_sizes import (
    CrowdSizes,
    crowd_bytes,
    crowd_specs,
    packed_specs,
    slots_that_fit,
    staged_specs,
)
from soprano_cupy.gpu.vocos_tables import frames_of, voice_pieces, whole_pieces
from soprano_cupy.testing import SOPRANO_1_1_80M


def test_buckets() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert bucket_of(1) == 1
    assert bucket_of(65) == 96
    assert bucket_of(2048) == 2048
    assert buckets_up_to(5) == [1, 2, 4, 8]
    assert buckets_up_to(8) == [1, 2, 4, 8]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 19), max_size=120))
def test_rows_are_conserved(moves: list[int]) -> None:
    """Slots enter and leave; each keeps one row, the lowest that was free; packing keeps their order."""
    rows, held = Rows(20), {}
    for slot in moves:
        if slot in held:
            assert rows.leave(slot) == held.pop(slot)
        else:
            lowest = min(set(range(20)) - set(held.values()))
            held[slot] = rows.enter(slot)
            assert held[slot] == lowest
        assert {slot: row for row, slot in enumerate(rows.slot_of_row.tolist()) if slot >= 0} == held
        assert rows.bucket == bucket_of(max(held.values(), default=0) + 1)
        if rows.best_bucket < rows.bucket:
            before = sorted(held, key=lambda s: held[s])
            sources = rows.pack()
            assert sources.tolist() == sorted(held.values())
            held = {slot: row for row, slot in enumerate(before)}
            assert rows.bucket == rows.best_bucket


def test_memory_of_a_thousand_voices() -> None:
    """The keys and values of 832 tokens, and the states of 512: less than 10 GB."""
    sizes = CrowdSizes.plan(SOPRANO_1_1_80M, 1024, 316)
    assert (sizes.capacity, sizes.tokens, sizes.prompt_rows) == (832, 512, 4096)
    assert 8.5e9 < crowd_bytes(SOPRANO_1_1_80M, sizes) < 10e9
    assert slots_that_fit(SOPRANO_1_1_80M, 2048, 316, None) == 2048
    assert slots_that_fit(SOPRANO_1_1_80M, 2048, 316, 10_000_000_000) == 1024
    assert slots_that_fit(SOPRANO_1_1_80M, 100, 316, 10_000_000_000) == 100
    assert slots_that_fit(SOPRANO_1_1_80M, 100, 316, 1_000_000) == 0


def test_what_the_host_writes_lies_together() -> None:
    sizes = CrowdSizes.plan(SOPRANO_1_1_80M, 300, 316)
    names = list(crowd_specs(SOPRANO_1_1_80M, sizes))
    staged, packed = list(staged_specs(SOPRANO_1_1_80M, sizes)), list(packed_specs(sizes))
    assert names[-len(staged) - len(packed) :] == [*staged, *packed]
    assert sizes.entry_buckets == [1, 4, 16, 64, 128]
    assert sizes.prompt_classes == [64, 256, 1024, 4096]
    assert crowd_specs(SOPRANO_1_1_80M, sizes)["step.residual"][0][0] == 320


def test_prefills_are_graphs() -> None:
    """Every prefill has one that holds its rows and prompts, whichever they are."""
    sizes = CrowdSizes.plan(SOPRANO_1_1_80M, 1024, 316)
    graphs = sizes.entry_graphs
    assert len(graphs) == len(set(graphs)) < 90
    for rows in range(1, 4097):
        padded = sizes.padded_rows(rows)
        assert rows <= padded < min(max(33, 2 * rows), rows + 256)
        for count in {-(-rows // 316), min(5, rows), min(17, rows), min(128, rows)}:
            if rows <= 316 * count:
                assert (padded, sizes.entry_bucket(count)) in graphs
    few = CrowdSizes.plan(SOPRANO_1_1_80M, 1, 40)
    assert (few.prompt_rows, few.padded_rows(33)) == (40, 33)
    assert few.entry_graphs == [(32, 1)]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 600), st.lists(st.integers(1, 300), max_size=8), st.sampled_from([64, 128, 1024]))
def test_pieces_of_a_voice_make_each_hop_once(tokens: int, cuts: list[int], most_rows: int) -> None:
    margin, given_hops, made = 8, 0, []
    for count in [*sorted({cut for cut in cuts if 1 < cut < tokens}), tokens]:
        ends = count == tokens
        pieces = list(
            voice_pieces(1 << 20, 600, count, ends=ends, given=given_hops, output=5, margin=margin, most_rows=most_rows)
        )
        output = 5
        for piece in pieces:
            assert piece.output == output
            assert 0 <= piece.first_frame < piece.end_frame <= frames_of(count)
            assert piece.rows <= most_rows
            assert piece.end_token <= count
            assert ends or piece.end_hop + margin <= frames_of(count)
            made += list(range(piece.first_hop, piece.end_hop))
            output += piece.hops
        given_hops += output - 5
    whole = list(whole_pieces(1 << 20, tokens, 0, margin, 1 << 20))
    assert made == list(range(whole[0].first_hop, whole[-1].end_hop))


def test_watched_slots_are_news_once_they_are_there() -> None:
    rng = np.random.default_rng(0)
    count, status, stuck = rng.integers(0, 600, 700), rng.integers(0, 5, 700) * (rng.random(700) < 0.3), rng.random(700)
    token = rng.integers(0, 1 << 24, 700)
    words = [
        int(c) | int(s) << 32 | int(q < 0.2) << 39 | int(t) << 40
        for c, s, q, t in zip(count, status, stuck, token, strict=True)
    ]
    watched = array("q", [int(n) for n in rng.integers(1, 600, 700)])
    for slot in range(0, 700, 3):
        watched[slot] = (NOT_WATCHED, AT_ITS_END)[slot % 2]
    expected = [
        News(slot, slots.progress_count(word), slots.progress_status(word), slots.progress_stuck(word))
        for slot, word in enumerate(words)
        if watched[slot] != NOT_WATCHED
        and (slots.progress_status(word) != slots.RUNNING or slots.progress_count(word) >= watched[slot])
    ]
    assert 200 < len(expected) < 500
    assert watched_slots(np.array(words, np.uint64), watched) == expected
    assert watched_slots(np.array(words, np.uint64), array("q", [NOT_WATCHED]) * 700) == []
    with pytest.raises(ParameterError, match="3 slots are watched, and there are 700"):
        watched_slots(np.array(words, np.uint64), array("q", [1, 2, 3]))

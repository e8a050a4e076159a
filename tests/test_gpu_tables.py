"""What the host writes for the GPU's kernels: every byte that of the readable tables in `tables_reference`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tables_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_records import slot_state
from struct_layouts import compiled_layout, numpy_layout

from soprano_cupy import ParameterError
from soprano_cupy.crowd.device import Entry
from soprano_cupy.generation import Request
from soprano_cupy.gpu._tables import (
    SliceTables,
    joined,
    write_column,
    write_prompts,
    write_seen_masks,
    write_slot_states,
)
from soprano_cupy.gpu.crowd_sizes import CrowdSizes, staged_specs
from soprano_cupy.gpu.crowd_upload import write_entries
from soprano_cupy.gpu.slots import SLOT_STATE
from soprano_cupy.gpu.vocos_plan import Capacity, table_specs
from soprano_cupy.gpu.vocos_tables import (
    ROW,
    SEGMENT,
    SPAN,
    TABLES,
    TOKEN,
    Piece,
    Progress,
    frames_of,
    slice_tables,
    stream_piece,
    voice_pieces,
    whole_pieces,
)
from soprano_cupy.sampling import SamplingParams
from soprano_cupy.testing import SOPRANO_1_1_80M

POISON = 0xA5
ADDRESS = (1 << 63) + 4096  # which no signed number holds
MARGIN = 8

# ---- layouts

STRUCTS = {"VocosSegment": SEGMENT, "VocosToken": TOKEN, "VocosRow": ROW, "VocosSpan": SPAN}


def test_layouts_are_those_of_the_kernels(tmp_path: Path) -> None:
    """Offsets of all fields and the sizes, as the kernels' compiler sees them."""
    assert compiled_layout(tmp_path, "vocos_params.cuh", STRUCTS) == numpy_layout(STRUCTS)


def without_a_field(dtype: np.dtype) -> np.dtype:
    return np.dtype([(name, dtype[name]) for name in (dtype.names or ())[:-1]])


@pytest.mark.parametrize("changed", ["output", "segments", "tokens", "rows", "spans"])
def test_other_layouts_are_refused(changed: str) -> None:
    """The compiled records are those of the dtypes, or no table is written at all."""
    arrays = {name: np.zeros(4, dtype) for name, dtype in TABLES.items()}
    SliceTables(**arrays)
    other = np.dtype("<i8") if changed == "output" else without_a_field(TABLES[changed])
    with pytest.raises(ValueError, match=r"mismatch|[Ee]xpected"):
        SliceTables(**arrays | {changed: np.zeros(4, other)})
    with pytest.raises(ValueError, match=r"mismatch|[Ee]xpected"):
        write_slot_states(np.zeros(1, without_a_field(SLOT_STATE)), [], [], 64)


# ---- the decoder


def poisoned_tables(rows: int) -> dict[str, np.ndarray]:
    specs = table_specs(Capacity(rows=rows, tokens=rows, pieces=64, spans=rows))
    tables = {name: np.zeros(shape, dtype) for name, (shape, dtype) in specs.items()}
    for table in tables.values():
        table.view(np.uint8)[...] = POISON
    return tables


def check_slice(pieces: Sequence[Piece], hops_of_a_block: int) -> None:
    """The tables are those of the reference, and behind them nothing is written."""
    memory = poisoned_tables(sum(piece.rows for piece in pieces) + 64)
    counts = slice_tables(memory).write(pieces, hops_of_a_block, samples=ADDRESS, pcm=12)
    expected = reference.build_tables(pieces, hops_of_a_block)
    assert counts == (len(expected.rows), len(expected.tokens), len(expected.spans))
    assert memory["output"].tolist() == [ADDRESS, 12]
    for name in ("segments", "tokens", "rows", "spans"):
        written, wanted = memory[name].reshape(-1).view(np.uint8), getattr(expected, name)
        np.testing.assert_array_equal(written[: wanted.nbytes], wanted.reshape(-1).view(np.uint8), err_msg=name)
        assert (written[wanted.nbytes :] == POISON).all()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 300), st.sampled_from([64, 100, 509, 4096])), min_size=1, max_size=9),
    st.integers(1, 12),
)
def test_tables_of_whole_voices(voices: list[tuple[int, int]], hops_of_a_block: int) -> None:
    """Voices of a piece and of many."""
    pieces: list[Piece] = []
    output = 0
    for number, (tokens, most_rows) in enumerate(voices):
        found = whole_pieces(ADDRESS + 4096 * number, tokens, output, MARGIN, most_rows)
        assert [piece.output for piece in found[1:]] == [piece.output + piece.hops for piece in found[:-1]]
        pieces += found[:20]
        output += frames_of(tokens) - 1
    check_slice(pieces[:64], hops_of_a_block)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(0, 250), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 9),
)
def test_tables_of_voices_that_go_on(voices: list[tuple[int, int, bool]], hops_of_a_block: int) -> None:
    """From any hop on, to what is final; some have nothing to give yet."""
    pieces: list[Piece] = []
    output = 3
    for number, (count, given_hops, ends) in enumerate(voices):
        found = voice_pieces(
            ADDRESS + number, 500, count, ends=ends, given=given_hops, output=output, margin=MARGIN, most_rows=64
        )
        made = [hop for piece in found for hop in range(piece.first_hop, piece.end_hop)]
        last = frames_of(count) + 1 if ends else frames_of(count) - MARGIN
        assert made == list(range(2 + given_hops, last))
        output += len(made)
        pieces += found
    if pieces:
        check_slice(pieces, hops_of_a_block)


def test_a_piece_without_hops_has_no_span() -> None:
    voice = {"states": 4096, "ring": 9, "frames": 33, "first_token": 0, "end_token": 9, "output": 0}
    empty = Piece(first_frame=0, end_frame=33, first_hop=5, end_hop=5, **voice)
    full = Piece(first_frame=0, end_frame=33, first_hop=2, end_hop=34, **voice)
    check_slice([empty, full, empty], 5)
    memory = poisoned_tables(64)
    assert slice_tables(memory).write([empty], 5) == (33, 9, 0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.booleans()), min_size=1, max_size=8))
def test_tables_of_streams(voices: list[tuple[int, int, bool]]) -> None:
    """Beginning, going on and ending, with states and without."""
    pieces: list[Piece] = []
    output = 0
    for slot, (done, more, ends) in enumerate(voices):
        tokens = max(1, done + more)
        piece = stream_piece(
            states=ADDRESS + slot, ring=32, slot=slot, turn=slot % 2, done=Progress(done, 2 * done), tokens=tokens,
            ends=ends, lag=MARGIN, output=output,
        )  # fmt: skip
        pieces.append(piece)
        output += pieces[-1].hops
    check_slice(pieces, 1)


def test_a_table_of_before_leaves_nothing() -> None:
    """Longer tables, then shorter ones in the same memory."""
    memory = poisoned_tables(512)
    tables = slice_tables(memory)
    tables.write(whole_pieces(1, 100, 0, MARGIN, 512), 3, samples=5)
    pieces = whole_pieces(2, 20, 0, MARGIN, 512)
    counts = tables.write(pieces, 5, pcm=6)
    expected = reference.build_tables(pieces, 5)
    assert memory["output"].tolist() == [0, 6]
    assert counts == (77, 20, len(expected.spans))
    np.testing.assert_array_equal(memory["rows"].reshape(-1).view(np.int32)[: 4 * 77], expected.rows.reshape(-1))
    np.testing.assert_array_equal(memory["segments"][:1].view(SEGMENT)[0], expected.segments)


def test_slices_that_do_not_fit_write_nothing() -> None:
    pieces = whole_pieces(1, 10, 0, MARGIN, 4096)  # 37 frames
    for memory, most in ((poisoned_tables(36), 3), (poisoned_tables(37), 0)):
        with pytest.raises(ParameterError, match="do not fit"):
            slice_tables(memory).write(pieces, most)
        assert all((table.view(np.uint8) == POISON).all() for table in memory.values())
    with pytest.raises(ParameterError, match="do not fit"):
        slice_tables(poisoned_tables(4096)).write(pieces * 65, 50)
    with pytest.raises(TypeError):
        slice_tables(poisoned_tables(64)).write([(1, 2)], 5)  # type: ignore[list-item]
    with pytest.raises(ParameterError, match="takes more rows"):
        voice_pieces(0, 10, 10, ends=True, given=0, output=0, margin=MARGIN, most_rows=2 * MARGIN + 4)


# ---- prompts


def prompt(length: int, seed: int = 0, kind: Any = np.int32) -> np.ndarray:
    ids: np.ndarray = np.random.default_rng([length, seed]).integers(0, SOPRANO_1_1_80M.vocab_size, length).astype(kind)
    return ids


def padded_to(multiple: int) -> Callable[[int], int]:
    return lambda rows: -(-rows // multiple) * multiple


PARAMS = st.builds(
    SamplingParams,
    temperature=st.one_of(st.sampled_from([0, 0.0, 1, 0.7, 1e-320, np.float32(0.7)]), st.floats(0, 1e300)),
    top_p=st.one_of(st.floats(1e-6, 1), st.just(1)),
    repetition_penalty=st.one_of(st.floats(1e-300, 1e300), st.sampled_from([1, 1e300, 1e-320])),
    max_new_tokens=st.one_of(st.integers(1, (1 << 31) - 1), st.integers(1, 900)),
    seed=st.one_of(st.none(), st.integers(0, (1 << 64) - 1)),
)
REQUESTS = st.builds(
    Request,
    ids=st.builds(prompt, st.integers(1, 70), st.integers(0, 9), st.sampled_from([np.int32, np.int64])),
    params=PARAMS,
    stream=st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=200, deadline=None)
@given(REQUESTS, st.booleans(), st.integers(1, 2000))
def test_records_of_slots(wanted: Request, give_up: bool, capacity: int) -> None:
    written = slot_state(wanted, capacity, give_up=give_up)
    assert written.tobytes() == reference.slot_state(wanted, capacity, give_up=give_up).tobytes()


SIZES = CrowdSizes.plan(SOPRANO_1_1_80M, 20, 100)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(REQUESTS, st.booleans()), min_size=1, max_size=12), st.sampled_from([1, 32]), st.randoms())
def test_tables_of_a_prefill(wanted: list[tuple[Request, bool]], multiple: int, random: Any) -> None:
    """What a crowd is told of sequences that enter: the tables as far as they are used, and not a byte behind that."""
    slots = random.sample(range(SIZES.slots), len(wanted))
    rows = random.sample(range(SIZES.slots), len(wanted))
    entries = [Entry(slot, *parts) for slot, parts in zip(slots, wanted, strict=True)]
    specs = staged_specs(SOPRANO_1_1_80M, SIZES)
    tables = {name: np.zeros(shape, dtype) for name, (shape, dtype) in specs.items()}
    for table in tables.values():
        table.view(np.uint8)[...] = POISON
    bucket, padded = SIZES.entry_bucket(len(entries)), padded_to(multiple)
    used = write_entries(tables, entries, rows, bucket, SIZES.capacity, SIZES.tokens, padded)
    for name, expected in expected_tables(entries, rows, bucket, padded).items():
        assert used[name] == len(expected)
        np.testing.assert_array_equal(tables[name][: len(expected)], expected, err_msg=name)
        assert (tables[name][len(expected) :].view(np.uint8) == POISON).all()


def expected_tables(
    entries: list[Entry], rows: list[int], bucket: int, padded: Callable[[int], int]
) -> dict[str, np.ndarray]:
    prompts, empty = [entry.request.ids for entry in entries], bucket - len(entries)
    tables = reference.prompt_tables(prompts, [entry.slot for entry in entries], padded)
    records = np.array([reference.slot_state(e.request, SIZES.capacity, give_up=e.give_up) for e in entries])
    records["limit"] = np.minimum(records["limit"], SIZES.tokens)
    return tables | {
        "starts": np.append(tables["starts"], [sum(map(len, prompts))] * empty),
        "staged_slots": records.view(np.uint64).reshape(len(entries), -1),
        "staged_seen": reference.seen_masks(prompts, -(-SOPRANO_1_1_80M.vocab_size // 32)),
        "entry_slots": np.array([*(entry.slot for entry in entries), *[-1] * empty]),
        "target_rows": np.array([*rows, *[0] * empty]),
    }


def prompt_arrays(rows: int, most: int) -> dict[str, np.ndarray]:
    tables = {name: np.full(rows, -7, np.int32) for name in ("ids", "row_slots", "row_positions")}
    return tables | {"starts": np.full(most + 1, -7, np.int32)}


def test_prompts_that_do_not_fit() -> None:
    """Nothing is written behind a table."""
    for lengths, padding in (([5, 6], 1), ([5, 4], 16), ([1, 2, 3], 1)):
        prompts = [prompt(length) for length in lengths]
        whole = prompt_arrays(14, 6)
        tables = {name: table[:-4] for name, table in whole.items()}
        with pytest.raises(ParameterError):
            write_prompts(tables, prompts, range(len(prompts)), padded_to(padding))
        assert all((table[-4:] == -7).all() for table in whole.values())
    with pytest.raises(ParameterError, match="slots"):
        write_prompts(prompt_arrays(14, 6), [prompt(3)], [], padded_to(1))
    with pytest.raises(ParameterError, match="numbers"):
        write_column(np.zeros(3, np.int32), [1, 2], 4, 0)
    with pytest.raises(ParameterError, match="numbers"):
        write_column(np.zeros(3, np.int32), [1, 2, 3, 4], 2, 0)
    with pytest.raises(ParameterError, match="sequences"):
        write_slot_states(np.zeros(0, SLOT_STATE), [Request(prompt(3), SamplingParams())], [False], 64)


@pytest.mark.parametrize("token", [-1, 64, 1 << 30, -(1 << 31)])
def test_tokens_that_no_mask_holds(token: int) -> None:
    seen = np.full((3, 2), 5, np.uint32)
    with pytest.raises(ParameterError, match=f"token {token}"):
        write_seen_masks(seen[1:2], [np.array([0, token], np.int32)])
    assert (seen[[0, 2]] == 5).all()
    with pytest.raises(ParameterError, match="masks"):
        write_seen_masks(seen, [prompt(1)] * 4)


def test_ids_with_gaps_between_them() -> None:
    ids = prompt(20)[::-3]
    tables = prompt_arrays(9, 2)
    assert write_prompts(tables, [ids], [3], padded_to(9)) == (7, 9)
    assert tables["ids"].tolist() == [*ids, 0, 0]


# ---- their way


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=8), st.integers(0, 20))
def test_parts_that_travel_together(sizes: list[tuple[int, int]], gap: int) -> None:
    """Every byte of a part once, no two copies so near that they could be one, no byte more than those between."""
    parts = []
    end = 0
    for before, nbytes in sizes:
        parts.append((end + before, nbytes))
        end += before + nbytes
    copies = joined(parts, gap)
    copied = [byte for start, nbytes in copies for byte in range(start, start + nbytes)]
    wanted = {byte for start, nbytes in parts for byte in range(start, start + nbytes)}
    assert len(copied) == len(set(copied))
    assert wanted <= set(copied)
    edges = [(start, start + nbytes) for start, nbytes in copies]
    assert all(later - earlier > gap for (_, earlier), (later, _) in itertools.pairwise(edges))
    assert all(start in wanted and stop - 1 in wanted for start, stop in edges)

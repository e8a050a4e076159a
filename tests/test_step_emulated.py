"""A generation step's own kernels, run on the CPU: embedding, head norms and rotation, attention, sampling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import pytest
from step_attention import ELEMENTS, EPSILON, StepCase, filled, rope_table, run_separately, run_step
from step_machine import Emulated
from step_sampling import END_TOKEN, Sampling, Voice, voices_of_all_kinds
from test_decode_emulated import Call, same_bits
from test_decode_emulated import run as run_decode

from soprano_cupy.cuda.module import DeviceFacts
from soprano_cupy.generation import LOOP_LENGTH, Request
from soprano_cupy.gpu import attention_step, slots, step
from soprano_cupy.gpu.launch import Blocks, Symbol
from soprano_cupy.sampling import SamplingParams

Array = np.ndarray[Any, Any]
MANY, NONE = 10_000, 0  # multiprocessors: every split gets a thread block of its own; one block takes all


# ---- parameters


STRUCTS = {
    "SlotState": step.SLOT_STATE, "EmbedParams": step.EMBED_PARAMS, "GatherParams": step.GATHER_PARAMS,
    "FinalNormParams": step.FINAL_NORM_PARAMS, "QkvFinishParams": step.QKV_FINISH_PARAMS,
    "AttentionStepParams": attention_step.ATTENTION_STEP_PARAMS, "SampleParams": step.SAMPLE_PARAMS,
}  # fmt: skip


def test_structs_lie_in_memory_as_the_kernels_have_them(tmp_path: Path) -> None:
    """Offsets of all fields and the sizes, as the kernels' compiler sees them."""
    places = [
        f"offsetof({name}, {field})" for name, s in STRUCTS.items() for field in s.names or () if field != "reserved"
    ]
    places += [f"sizeof({name})" for name in STRUCTS]
    stores = "".join(f"store_global<int>(p.out + {i}, {place});\n" for i, place in enumerate(places))
    probe = tmp_path / "probe.cu"
    probe.write_text(
        '#include <cstddef>\n#include "step_params.cuh"\n'
        "struct Probe { int* out; long long unused[2]; };\n"
        f'extern "C" void probe(Probe p) {{\nif (threadIdx.x != 0) return;\n{stores}}}\n',
        encoding="utf-8",
    )
    out = np.zeros(len(places), np.int32)
    params = np.array([out.ctypes.data, 0, 0], np.uint64).tobytes()
    library = emulation.build(probe, {"DTYPE_BF16": 1})
    library.launch("probe", params, grid=(1, 1, 1), threads=32, shared_bytes=16)
    expected = [offset for s in STRUCTS.values() for name, (_, offset) in s.fields.items() if name != "reserved"]
    assert out.tolist() == [*expected, *(s.itemsize for s in STRUCTS.values())]


def test_the_constants_are_those_of_the_kernels() -> None:
    text = (emulation.KERNELS / "step_params.cuh").read_text(encoding="utf-8")
    for name in ("RUNNING", "STOP", "LENGTH", "STUCK", "FAILED"):
        assert f"STATUS_{name} = {getattr(step, name)};" in text
    for name in ("GREEDY", "GIVE_UP"):
        assert f"OPTION_{name} = {getattr(slots, f'OPTION_{name}')};" in text
    search = (emulation.KERNELS / "sample_search.cuh").read_text(encoding="utf-8")
    assert f"CANDIDATES = {step.CANDIDATES};" in search
    assert "DIGIT_BITS = 6, BINS = 1 << DIGIT_BITS" in search
    assert step.BINS == 1 << 6
    scores = (emulation.KERNELS / "sample_scores.cuh").read_text(encoding="utf-8")
    assert f"MOST_HELD = {step.MOST_HELD};" in scores


def test_symbols_become_fields_and_grids() -> None:
    launch = step.plan_embed(
        dtype="bfloat16", capability=(9, 0), multiprocessors=132, rows=Symbol.ROWS, hidden_size=512, ids=1,
        embeddings=2, gain=3, residual=4, hidden=5, square_sums=6, stride=512,
    )  # fmt: skip
    assert launch.grid == (Blocks(Symbol.ROWS, 1), 1, 1)
    ((offset, symbol),) = launch.fields
    assert symbol is Symbol.ROWS
    assert offset == step.EMBED_PARAMS.fields["rows"][1]
    packed = np.frombuffer(launch.params, step.EMBED_PARAMS)[0]
    assert (packed["ids"], packed["square_sums"], packed["columns"], packed["rows"]) == (1, 6, 512, 0)


def test_records_of_slots() -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.3, max_new_tokens=50, seed=2**63 + 5)
    record = step.slot_state(Request(np.zeros(10, np.int32), params, stream=7 << 32), 40, give_up=True)
    assert (record["seed"], record["stream"], record["top_p"]) == (2**63 + 5, 7 << 32, 0.9)
    scale = float(record["scale_high"]) + float(record["scale_low"])
    assert abs(scale * 0.7 / np.log2(np.e) - 1) < 2**-46
    assert (record["limit"], record["position"], record["options"]) == (31, 9, slots.OPTION_GIVE_UP)
    assert step.slot_state(Request(np.zeros(10, np.int32), params), 60)["limit"] == 50
    coldest = step.slot_state(Request(np.zeros(1, np.int32), SamplingParams(temperature=1e-320, seed=0)), 40)
    assert np.isfinite(coldest["scale_high"])
    greedy = step.slot_state(Request(np.zeros(1, np.int32), SamplingParams(repetition_penalty=1e300)), 40)
    assert greedy["options"] == slots.OPTION_GREEDY
    assert np.isfinite(greedy["penalty"])


# ---- the ends of a prefill


def row_arrays(rows: int, width: int, stride: int, dtype: str) -> dict[str, Array]:
    return {
        "residual": emulation.poisoned((rows, stride), np.float32),
        "hidden": emulation.poisoned((rows, stride), ELEMENTS[dtype]),
        "square_sums": emulation.poisoned((rows, -(-width // 16)), np.float32),
    }


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 72), ("float16", 300), ("bfloat16", 512), ("float16", 1)])
def test_from_ids_to_states(dtype: str, width: int) -> None:
    """embed, gather_rows and final_norm, one after the other."""
    machine, rows, stride = Emulated(), 5, -(-width // 64) * 64
    sizes: dict[str, Any] = {"dtype": dtype, "hidden_size": width, "stride": stride}
    ids = np.array([7, 0, 3, 3, 10], np.int32)
    inputs = {"ids": ids, "embeddings": filled(1, (11, width), ELEMENTS[dtype]), "gain": filled(2, (width,))}
    arrays = row_arrays(rows, width, stride, dtype)
    machine.run(step.plan_embed, {**inputs, **arrays}, set(arrays), rows=rows, **sizes)
    residual = inputs["embeddings"][ids].astype(np.float32)
    np.testing.assert_array_equal(arrays["residual"][:, :width], residual)
    scale = np.float32(1 / 16 if dtype == "float16" else 1)
    expected = (residual * inputs["gain"] * scale).astype(ELEMENTS[dtype])
    assert same_bits(arrays["hidden"][:, :width].copy(), expected)
    padded = np.zeros((rows, arrays["square_sums"].shape[1] * 16))
    padded[:, :width] = residual
    np.testing.assert_allclose(arrays["square_sums"], (padded.reshape(rows, -1, 16) ** 2).sum(-1), rtol=16 * 2**-24)
    for name in ("residual", "hidden"):
        assert np.isnan(arrays[name][:, width:].astype(np.float32)).all()

    last = {f"last_{name}": array for name, array in row_arrays(2, width, stride, dtype).items()}
    starts = np.array([0, 2, 5], np.int32)
    machine.run(step.plan_gather, {**arrays, **last, "starts": starts}, set(last), sequences=2, **sizes)
    for name in arrays:
        assert same_bits(last[f"last_{name}"][:, :width].copy(), arrays[name][[1, 4], :width].copy())

    states = emulation.poisoned((rows, width), np.float32)
    reads = {"residual": arrays["residual"], "square_sums": arrays["square_sums"], "gain": inputs["gain"]}
    machine.run(step.plan_final_norm, {**reads, "states": states}, {"states"}, rows=rows, epsilon=EPSILON, **sizes)
    wide = residual.astype(np.float64)
    norm = wide / np.sqrt((wide**2).mean(1, keepdims=True) + EPSILON) * inputs["gain"]
    np.testing.assert_allclose(states, norm, rtol=2**-20)


# ---- head norms and rotation


@pytest.mark.parametrize(
    ("dtype", "head_dim", "q_heads", "kv_heads"),
    [("bfloat16", 128, 4, 1), ("float16", 64, 6, 2), ("bfloat16", 32, 9, 3)],
)
def test_heads_are_normalised_and_rotated(dtype: str, head_dim: int, q_heads: int, kv_heads: int) -> None:
    rows, capacity, kind = 5, 40, ELEMENTS[dtype]
    slots_of, positions = np.array([2, 2, -1, 0, 1], np.int32), np.array([0, 39, 3, 17, 1], np.int32)
    inputs = {
        "qkv": filled(1, (rows, (q_heads + 2 * kv_heads) * head_dim)), "q_gain": filled(2, (head_dim,)),
        "k_gain": filled(3, (head_dim,)), "rope": rope_table(capacity, head_dim), "row_slots": slots_of,
        "row_positions": positions,
    }  # fmt: skip
    written = {
        "queries": emulation.poisoned((rows, q_heads, head_dim), kind),
        "packed_keys": emulation.poisoned((rows, kv_heads, head_dim), kind),
        "packed_values": emulation.poisoned((rows, kv_heads, head_dim), kind),
        "keys": emulation.poisoned((3, capacity, kv_heads, head_dim), kind),
        "values": emulation.poisoned((3, capacity, kv_heads, head_dim), kind),
    }
    Emulated().run(
        step.plan_qkv_finish, {**inputs, **written}, set(written), dtype=dtype, rows=rows, num_heads=q_heads,
        num_kv_heads=kv_heads, head_dim=head_dim, epsilon=EPSILON, capacity=capacity,
    )  # fmt: skip
    heads = inputs["qkv"].astype(np.float64).reshape(rows, -1, head_dim)
    q, k, v = heads[:, :q_heads], heads[:, q_heads : q_heads + kv_heads], heads[:, q_heads + kv_heads :]
    cos, sin = np.moveaxis(inputs["rope"][positions].astype(np.float64)[:, None], -1, 0)

    def finished(x: Array, gain: Array) -> Array:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * gain
        low, high = x[..., : head_dim // 2], x[..., head_dim // 2 :]
        return np.concatenate((low * cos - high * sin, high * cos + low * sin), -1)

    live = slots_of >= 0
    for name, expected in (("queries", finished(q, inputs["q_gain"])), ("packed_keys", finished(k, inputs["k_gain"]))):
        close(written[name][live], expected[live], kind)
    assert same_bits(written["packed_values"][live], v[live].astype(np.float32).astype(kind))
    for name in ("keys", "values"):
        assert same_bits(written[name][slots_of[live], positions[live]], written[f"packed_{name}"][live])
        untouched = np.ones(written[name].shape[:2], bool)
        untouched[slots_of[live], positions[live]] = False
        assert np.isnan(written[name][untouched].astype(np.float32)).all()
    assert np.isnan(written["queries"][2].astype(np.float32)).all()


def close(values: Array, expected: Array, kind: Any) -> None:
    """Rounded to `kind` once, after a dozen float32 operations on numbers no larger than both parts of a pair."""
    step_of_kind = {np.float16: 2.0**-11, ELEMENTS["bfloat16"]: 2.0**-8}[kind]
    size = np.abs(expected) + np.abs(np.roll(expected, expected.shape[-1] // 2, -1))
    allowed = step_of_kind * np.abs(expected) * (1 + 2**-7) + 2**-20 * size + 2.0**-25
    error = np.abs(values.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{(error / allowed).max():.2f} of the allowed error"


# ---- attention of a decode step


def decoded(case: StepCase, queries: Array, keys: Array, values: Array, row: int, arch: int) -> Array:
    """A row by attention_decode.cu, (q_heads, head_dim)."""
    slot = case.slot_of_row[row]
    lengths = np.array([case.positions[row] + 1], np.int32)
    call = Call(queries[row : row + 1, None], keys[slot : slot + 1], values[slot : slot + 1], kv_lengths=lengths)
    return run_decode(call, NONE, arch)[0][0, 0]


def assert_as_separately(case: StepCase, machines: list[Emulated]) -> None:
    """Bit for bit what qkv_finish and attention_decode give, and nothing else written."""
    queries, keys, values = run_separately(case, machines[0])
    live = [row for row, slot in enumerate(case.slot_of_row) if slot >= 0]
    expected = {row: decoded(case, queries, keys, values, row, machines[0].arch) for row in live}
    for machine in machines:
        attended, new_keys, new_values = run_step(case, machine)
        for row in range(case.rows):
            if row in expected:
                assert same_bits(attended[row].copy(), expected[row]), f"position {case.positions[row]}"
            else:
                assert np.isnan(attended[row].astype(np.float32)).all()
        assert same_bits(new_keys, keys)
        assert same_bits(new_values, values)


POSITIONS, SLOTS = (0, 1, 62, 63, 64, 127, 128, 200, 256), (3, -1, 0, 5, 1, 7, 4, 2, 6)


@pytest.mark.parametrize(
    ("dtype", "arch", "head_dim", "group", "kv_heads"),
    [
        ("bfloat16", 900, 128, 4, 1), ("bfloat16", 800, 64, 3, 2), ("float16", 750, 128, 8, 1),
        ("float16", 900, 32, 40, 1),
    ],
)  # fmt: skip
def test_a_step_has_the_bits_of_its_parts(dtype: str, arch: int, head_dim: int, group: int, kv_heads: int) -> None:
    case = StepCase(POSITIONS, SLOTS, dtype, head_dim, group, kv_heads)
    assert_as_separately(case, [Emulated(arch, MANY), Emulated(arch, NONE)])


def shape_for(**change: Any) -> attention_step.AttentionStepShape:
    return step.attention_step_shape(**{**SHAPE_SIZES, **change})


SHAPE_SIZES: dict[str, Any] = {
    "dtype": "bfloat16", "capability": (9, 0), "multiprocessors": 132, "rows": 1, "num_heads": 4, "num_kv_heads": 1,
    "head_dim": 128, "capacity": 1024,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "splits", "clusters"),
    [
        ({"rows": 2000}, 1, False), ({"capacity": 64}, 1, False), ({"capacity": 130}, 4, True),
        ({"capacity": 30_000}, 118, False),  # more states than shared memory takes
        ({"capability": (8, 0)}, 16, False), ({"capability": (12, 0)}, 8, True),
        ({"capability": (7, 5), "dtype": "float16"}, 16, False),
    ],
)  # fmt: skip
def test_how_many_thread_blocks_take_a_sequence(change: dict[str, Any], splits: int, clusters: bool) -> None:
    shape = shape_for(**change)
    assert (shape.splits, shape.cluster) == (splits, splits if clusters else 1)
    wanted = step.attention_step_workspace_bytes(**{**SHAPE_SIZES, **change})
    assert (wanted > attention_step.decode.ARRIVAL_BYTES) == (splits > 1 and not clusters)
    assert (wanted == 0) == (splits == 1 or clusters)


def test_clusters_shrink_as_rows_come() -> None:
    """Never more blocks than the table allows, and never a smaller cluster where it allows a larger."""
    table = attention_step.CLUSTER_BLOCKS
    for rows in range(1, 400):
        shape = shape_for(rows=rows)
        allowed = [size for size, share in table.items() if rows * size <= share * 132]
        assert shape.cluster == max(allowed, default=1)
        assert shape.shared_bytes <= 227 * 1024


def test_every_way_of_sharing_gives_the_same_bits() -> None:
    """Clusters of 2, 4 and 8, the workspace, one block; one stage and two; threads in the other order."""
    case = StepCase(POSITIONS[5:], SLOTS[5:])
    expected = run_step(case, Emulated(800, NONE))[0]
    tile = attention_step.decode.select_tile((9, 0), "bfloat16", 128, 4)
    for splits, cluster, stages in ((2, 2, 2), (4, 4, 1), (8, 8, 2), (3, 1, 2), (5, 1, 1)):
        staged = replace(tile, stages=stages)
        shape = attention_step.AttentionStepShape(staged, 1, splits, cluster, 4, 5)
        for options in ({}, {"reverse": True}):
            machine = Emulated(900 if cluster > 1 else 800, MANY, **options)
            assert same_bits(run_step(case, machine, shape)[0], expected)


@pytest.mark.parametrize("arch", [800, 900])
def test_weights_are_asked_for_meanwhile(arch: int) -> None:
    """Without another bit of the result, and nothing beyond the weights is asked for."""
    case = StepCase(POSITIONS[5:], SLOTS[5:], head_dim=32, group=4)
    machine = Emulated(arch, MANY)
    for one, other in zip(run_step(case, machine, ahead=True), run_step(case, machine), strict=True):
        assert same_bits(one, other)


def test_when_weights_are_asked_for_meanwhile() -> None:
    """For few rows, and where the second-level cache has room for twice as much."""
    gpu = DeviceFacts(0, "GPU", (9, 0), 132, l2_bytes=50 << 20)
    assert step.fetches_ahead(gpu, 1, 25 << 20)
    assert step.fetches_ahead(gpu, 64, 1 << 20)
    assert not step.fetches_ahead(gpu, 65, 1 << 20)
    assert not step.fetches_ahead(gpu, 1, 26 << 20)
    assert not step.fetches_ahead(replace(gpu, capability=(8, 0)), 1, 1 << 20)
    assert not step.fetches_ahead(replace(gpu, l2_bytes=0), 1, 1)


@pytest.mark.parametrize(("rows", "spare"), [(1, 14), (2, 14), (4, 14), (8, 0), (16, 14), (32, 28), (64, 56)])
def test_spare_blocks_find_room(rows: int, spare: int) -> None:
    """The 80M model on 132 multiprocessors: (splits, heads, rows and spare ones); 8 rows fill half of them alone."""
    plan = step.plan_attention_step(
        dtype="bfloat16", capability=(9, 0), multiprocessors=132, rows=rows, num_heads=4, num_kv_heads=1, head_dim=128,
        epsilon=1e-6, qkv=16, attended=16, attended_stride=512, q_gain=16, k_gain=16, rope=16, keys=16, values=16,
        capacity=1088, slot_of_row=16, slots=16, workspace=16, ahead=[(256, 1 << 16)],
    )  # fmt: skip
    assert plan.grid[2] - rows == spare
    assert plan.grid[0] * plan.grid[1] * spare in (0, 112)


def test_splits_of_several_blocks() -> None:
    """From 2,049 keys on a split has two blocks."""
    case = StepCase((2047, 2048, 2180), (1, 0, 2), head_dim=32, group=4, capacity=2200)
    assert_as_separately(case, [Emulated(900, MANY), Emulated(800, MANY), Emulated(800, NONE)])


@pytest.mark.parametrize("guess", ["{-1, 0}", "{5, 271}", "{0, 100}"])
def test_a_wrong_guess_costs_time_only(tmp_path: Path, guess: str) -> None:
    """Slot and position read before the kernels before are done may be those of an earlier step."""
    text = "    guessed.settle(params, -1);"
    source = (emulation.KERNELS / "attention_step.cu").read_text(encoding="utf-8")
    assert source.count(text) == 1
    mutant = tmp_path / "mutant.cu"
    mutant.write_text(source.replace(text, f"guessed = {guess};"), encoding="utf-8")
    case = StepCase(POSITIONS, SLOTS)
    expected = run_step(case, Emulated(900, MANY))
    machine = Emulated(900, MANY)
    machine.source = mutant
    for array, other in zip(run_step(case, machine), expected, strict=True):
        assert same_bits(array, other)


def test_positions_outside_the_cache_are_left_alone() -> None:
    """A record that nobody has written; and a position at the very end works."""
    case = StepCase((271, 300, -5), (0, 1, 2))
    inside = StepCase((271,), (0,))
    arrays: list[Array] = []
    for c in (case, inside):
        fixed = StepCase(tuple(max(0, min(p, 271)) for p in c.positions), c.slot_of_row)
        object.__setattr__(fixed, "slot_records", c.slot_records)
        arrays.append(run_step(fixed, Emulated(900, MANY))[0])
    assert same_bits(arrays[0][:1], arrays[1])
    assert np.isnan(arrays[0][1:].astype(np.float32)).all()


@pytest.mark.parametrize("fault", [{"skip_barrier": n} for n in (1, 2)] + [{"skip_wait": n} for n in range(3)])
def test_faults_of_a_cluster_are_caught(fault: dict[str, int]) -> None:
    """Barriers behind queries and scores; waits for keys, for values, and for the states that other blocks send."""
    case = StepCase((256,), (0,))
    run_step(case, Emulated(900, MANY))
    with pytest.raises(emulation.EmulationError, match=r"race|in flight"):
        run_step(case, Emulated(900, MANY, **fault))


@pytest.mark.parametrize(
    ("text", "instead", "error"),
    [
        ("states.expect(splits.count)", "states.expect(splits.count + 1)", "deadlock"),
        ("states.expect(splits.count)", "states.expect(splits.count - 1)", "more bytes|race"),
        ("if (has_newest) put_value", "if (false) put_value", None),
        ("if (has_newest) put_key", "if (false) put_key", None),
    ],
)
def test_mistakes_of_a_cluster_are_caught(tmp_path: Path, text: str, instead: str, error: str | None) -> None:
    source = (emulation.KERNELS / "attention_step.cu").read_text(encoding="utf-8")
    assert source.count(text) == 1
    mutant = tmp_path / "mutant.cu"
    mutant.write_text(source.replace(text, instead), encoding="utf-8")
    case = StepCase((256, 30), (0, 1))
    machine = Emulated(900, MANY, reverse=True)
    expected = run_step(case, machine)[0]
    machine.source = mutant
    if error is None:
        assert not same_bits(run_step(case, machine)[0], expected)
        return
    with pytest.raises(emulation.EmulationError, match=error):
        run_step(case, machine)


# ---- sampling


def random_steps(sampling: Sampling, machine: Emulated, steps: int, scale: float = 3.0) -> None:
    rng = np.random.default_rng(5)
    for _ in range(steps):
        for row in range(len(sampling.arrays["logits"])):
            logits = (scale * rng.standard_normal(sampling.vocab)).astype(np.float32)
            sampling.fill(row, logits, rng.standard_normal(sampling.hidden).astype(np.float32))
        sampling.step(machine)


@pytest.mark.parametrize(
    ("vocab", "hidden", "dtype", "rows", "steps", "arch"),
    [
        (700, 48, "bfloat16", 60, 3, 800),
        (301, 300, "float16", 10, 3, 750),  # an odd vocabulary; more columns than threads
        (8192, 512, "bfloat16", 5, 2, 900),
        (20_001, 40, "bfloat16", 3, 2, 900),  # too many scores for registers
    ],
)
def test_steps_are_those_of_the_package(vocab: int, hidden: int, dtype: str, rows: int, steps: int, arch: int) -> None:
    voices = voices_of_all_kinds(rows, seed=vocab)
    order = np.random.default_rng(0).permutation(rows).tolist()
    sampling = Sampling(voices, [*order, -1], vocab=vocab, hidden=hidden, dtype=dtype)
    sampling.fill(rows, np.full(vocab, np.nan, np.float32), np.full(hidden, np.nan, np.float32))
    random_steps(sampling, Emulated(arch), steps)
    assert np.isnan(sampling.arrays["next_residual"][rows]).all()
    assert sampling.arrays["next_slot_of_row"][rows] == 99


@pytest.mark.parametrize("kind", ["rounded", "all equal", "hardly different", "two heaps", "one possible", "huge"])
def test_scores_that_are_hard_to_tell_apart(kind: str) -> None:
    """Equal scores go by their ids; scores that fall into one bin together take more levels of the search."""
    vocab, voices = 700, voices_of_all_kinds(16, seed=3)
    sampling = Sampling(voices, range(16), vocab=vocab)
    rng = np.random.default_rng(1)
    for row in range(16):
        logits = (3 * rng.standard_normal(vocab)).astype(np.float32)
        if kind == "rounded":
            logits = np.round(logits)
        elif kind == "all equal":
            logits[:] = 1.5
        elif kind == "hardly different":
            logits = np.float32(10) + np.float32(1e-5) * rng.integers(0, 40, vocab).astype(np.float32)
            logits[5] = -300
        elif kind == "two heaps":
            logits = np.where(rng.random(vocab) < 0.5, np.float32(8), np.nextafter(np.float32(8), np.float32(9)))
        elif kind == "one possible":
            logits[:] = -np.inf
            logits[13] = -5
        else:
            logits *= np.float32(1e37)
        sampling.fill(row, logits, rng.standard_normal(sampling.hidden).astype(np.float32))
    sampling.step(Emulated())


def test_hundreds_of_draws_are_those_of_the_package() -> None:
    """No mismatch is expected: a boundary comes within 1e-6 of the random number in one case of some 100,000."""
    sampling = Sampling(voices_of_all_kinds(250, seed=11), range(250), vocab=130, hidden=16)
    random_steps(sampling, Emulated(), 1, scale=2.0)


def voice(give_up: bool = False, **changes: Any) -> Voice:
    params = {"repetition_penalty": 1.0, "max_new_tokens": 1000, "seed": 1, **changes}
    return Voice(Request(np.arange(4, dtype=np.int32) + 10, SamplingParams(**params)), 24, give_up)


def test_ends_of_sequences() -> None:
    """By the end token, by the limit, by the cache, by a voice that is stuck; a stuck one that goes on says so."""
    voices = [voice(), voice(max_new_tokens=3), voice(), voice(give_up=True), voice(max_new_tokens=LOOP_LENGTH + 5)]
    sampling = Sampling(voices, [4, 2, 0, 1, 3], hidden=48)
    rng, machine = np.random.default_rng(0), Emulated()
    for count in range(1, 23):
        for row, slot in enumerate((4, 2, 0, 1, 3)):
            logits = rng.standard_normal(sampling.vocab).astype(np.float32)
            logits[END_TOKEN] = 50 if slot == 0 and count == 5 else -50
            still = slot in (3, 4)  # its state hardly changes
            residual = np.ones(48, np.float32) if still else (100 * rng.standard_normal(48)).astype(np.float32)
            sampling.arrays["final_gain"][:] = 100
            sampling.fill(row, logits, residual + np.float32(0.001 * count))
        sampling.step(machine)
    assert [v.status for v in voices] == [step.STOP, step.LENGTH, step.LENGTH, step.STUCK, step.LENGTH]
    assert [len(v.tokens) for v in voices] == [5, 3, 21, LOOP_LENGTH + 2, LOOP_LENGTH + 5]
    assert [v.check.stuck for v in voices] == [False, False, False, True, True]
    assert sampling.arrays["slot_of_row"].tolist() == [-1] * 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, "nothing"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_no_numbers_fail_their_own_row(bad: Any, temperature: float) -> None:
    voices = [voice(temperature=temperature), voice(temperature=temperature)]
    sampling = Sampling(voices, [0, 1])
    rng = np.random.default_rng(0)
    for row in range(2):
        sampling.fill(row, rng.standard_normal(300).astype(np.float32), rng.standard_normal(48).astype(np.float32))
    if bad == "nothing":
        sampling.arrays["logits"][0] = -np.inf
    else:
        sampling.arrays["logits"][0, 299] = -bad if np.isnan(bad) else bad
    voices[0].status = step.FAILED
    seen = sampling.arrays["seen"][0].copy()
    sampling.step(Emulated())
    word = sampling.arrays["progress"][0]
    assert (step.progress_status(word), step.progress_count(word)) == (step.FAILED, 0)
    assert sampling.arrays["slots"][0]["status"] == step.FAILED
    assert sampling.arrays["next_slot_of_row"].tolist() == [-1, 1]
    assert (sampling.arrays["tokens"][0] == -1).all()
    np.testing.assert_array_equal(sampling.arrays["seen"][0], seen)
    assert np.isnan(sampling.arrays["next_residual"][0]).all()


def test_a_slot_that_the_host_has_ended_leaves_its_row() -> None:
    sampling = Sampling([voice(), voice()], [1, 0])
    sampling.arrays["slots"][1]["status"] = step.LENGTH
    for row in range(2):
        sampling.fill(row, filled(row, (300,)), filled(row + 9, (48,)))
    sampling.launch(Emulated())
    assert sampling.arrays["next_slot_of_row"].tolist() == [-1, 0]
    assert sampling.arrays["progress"][1] == 0
    assert np.isnan(sampling.arrays["next_residual"][0]).all()


def test_rows_of_a_prefill_go_to_other_rows_of_the_step() -> None:
    sampling = Sampling([voice(), voice(), voice(max_new_tokens=1)], [2, 0, 1])
    sampling.arrays["target_rows"] = np.array([1, 0, 2], np.int32)
    for row in range(3):
        sampling.fill(row, filled(row, (300,)), filled(row + 9, (48,)))
    sampling.launch(Emulated())
    a = sampling.arrays
    assert a["next_slot_of_row"].tolist() == [0, -1, 1]
    sampling.check_embedded(0, int(a["tokens"][0, 0]))
    sampling.check_embedded(2, int(a["tokens"][1, 0]))
    assert np.isnan(a["next_residual"][1]).all()


def test_the_next_input_may_take_the_place_of_the_present_one() -> None:
    apart, together = (Sampling(voices_of_all_kinds(6), range(6)) for _ in range(2))
    for name in ("residual", "square_sums"):
        together.arrays[f"next_{name}"] = together.arrays[name]
    for sampling in (apart, together):
        for row in range(6):
            sampling.fill(row, filled(row, (300,)), filled(row + 9, (48,)))
        sampling.launch(Emulated())
    for name in ("next_residual", "next_hidden", "next_square_sums", "states", "tokens"):
        columns = slice(None, 48 if name == "next_residual" else None)
        assert same_bits(together.arrays[name][..., columns].copy(), apart.arrays[name][..., columns].copy())


def test_the_order_of_threads_changes_nothing() -> None:
    results = []
    for options in ({}, {"reverse": True}):
        sampling = Sampling(voices_of_all_kinds(20), range(20), vocab=700)
        random_steps(sampling, Emulated(800, **options), 2)
        results.append(b"".join(sampling.arrays[name].tobytes() for name in sorted(sampling.arrays)))
    assert results[0] == results[1]


@pytest.mark.parametrize("barrier", range(6))
def test_missing_barriers_of_the_search_are_caught(barrier: int) -> None:
    """Of the warps' extremes, the cells, the bins, the choice, of a second level, the candidates and the result."""
    drawn = Sampling([voice(temperature=3.0, top_p=0.9)], [0], vocab=2000)
    drawn.fill(0, np.round(filled(0, (2000,)) * 4) / 4, filled(1, (48,)))
    drawn.launch(Emulated())
    with pytest.raises(emulation.EmulationError, match=r"race|outside"):
        drawn.launch(Emulated(skip_barrier=barrier))

"""The kernels beside a step's products, run on the CPU: embedding, last rows, final norm, head norms and rotation."""

from __future__ import annotations

from typing import Any

import emulation
import numpy as np
import pytest
from numerics import same_bits
from step_attention import ELEMENTS, EPSILON, filled, rope_table
from step_machine import Emulated

from soprano_cupy.gpu import step

Array = np.ndarray[Any, Any]

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

"""A model of random weights for `exchange.py`: its reference in float64, and its weights packed for a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from soprano_cupy.gpu import persistent_schedule as schedule


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, as bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, in float64."""
    return (bf16_bits(x).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@dataclass
class Model:
    """Weights of the 80M shape, rounded to bfloat16 and held in float64, of `layers` different layers."""

    qkv: list[np.ndarray]
    o: list[np.ndarray]
    gate: list[np.ndarray]
    up: list[np.ndarray]
    down: list[np.ndarray]
    gains: np.ndarray  # (layers + 1, 2, hidden)
    head_gains: np.ndarray  # (layers, 2, head_dim)
    keys: np.ndarray  # (layers, context, head_dim)
    values: np.ndarray
    input: np.ndarray

    @classmethod
    def random(cls, s: schedule.Shape, layers: int, context: int) -> Model:
        rng = np.random.default_rng(5)

        def matrix(rows: int, columns: int, scale: float) -> np.ndarray:
            return bf16(rng.standard_normal((rows, columns), np.float32) * (scale / columns**0.5))

        q_size, rows = s.heads * s.head_dim, (s.heads + 2 * s.kv_heads) * s.head_dim
        each = range(layers)
        return cls(
            [matrix(rows, s.hidden, 1.0) for _ in each], [matrix(s.hidden, q_size, 1.0) for _ in each],
            [matrix(s.intermediate, s.hidden, 1.0) for _ in each],
            [matrix(s.intermediate, s.hidden, 1.0) for _ in each],
            [matrix(s.hidden, s.intermediate, 1.0) for _ in each],
            rng.uniform(0.5, 1.5, (layers + 1, 2, s.hidden)).astype(np.float32),
            rng.uniform(0.8, 1.6, (layers, 2, s.head_dim)).astype(np.float32),
            bf16(rng.standard_normal((layers, context, s.head_dim))),
            bf16(rng.standard_normal((layers, context, s.head_dim))),
            rng.standard_normal(s.hidden).astype(np.float32),
        )  # fmt: skip

    def reference(self, s: schedule.Shape, position: int, layers: int) -> np.ndarray:
        """The residual stream behind so many layers, float64, with activations rounded where the kernels round."""
        x = self.input.astype(np.float64)
        half = s.head_dim // 2
        angles = position * 10000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angles), np.sin(angles)

        def norm(v: np.ndarray, size: int) -> np.ndarray:
            inverse: np.ndarray = 1 / np.sqrt((v * v).mean(axis=-1, keepdims=True) + 1e-6)
            return inverse

        def turned(v: np.ndarray, gain: np.ndarray) -> np.ndarray:
            v = v * norm(v, s.head_dim) * gain
            low, high = v[..., :half], v[..., half:]
            return np.concatenate((low * cos - high * sin, high * cos + low * sin), -1)

        for i in range(layers):
            qkv = self.qkv[i] @ bf16(x * self.gains[i, 0]) * norm(x, s.hidden)
            q = turned(qkv[: s.heads * s.head_dim].reshape(s.heads, s.head_dim), self.head_gains[i, 0])
            k, v = np.split(qkv[s.heads * s.head_dim :], 2)
            keys = np.concatenate((self.keys[i, :position], bf16(turned(k, self.head_gains[i, 1]))[None]))
            values = np.concatenate((self.values[i, :position], bf16(v)[None]))
            scores = q @ keys.T / s.head_dim**0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            attended = bf16((weights / weights.sum(-1, keepdims=True) @ values).reshape(-1))
            x = x + self.o[i] @ attended
            h = bf16(x * self.gains[i, 1])
            gate, up = (w @ h * norm(x, s.hidden) for w in (self.gate[i], self.up[i]))
            x = x + self.down[i] @ bf16(gate / (1 + np.exp(-gate)) * up)
        return x


def stream_of(model: Model, s: schedule.Shape) -> tuple[Any, int]:
    """The packed weights of every block of the grid on the GPU, one after the other, and the bytes of each."""
    import cupy

    from soprano_cupy.gpu.packing import interleave_gate_up, pack_linear

    matrices: dict[str, list[np.ndarray]] = {
        "qkv": model.qkv, "o": model.o, "down": model.down,
        "gate_up": [
            interleave_gate_up(bf16_bits(g), bf16_bits(u), np) for g, u in zip(model.gate, model.up, strict=True)
        ],
    }  # fmt: skip
    blocks, places = [np.zeros((1, schedule.BLOCK_BYTES), np.uint8)], {}
    for name, (rows, columns) in {
        "qkv": model.qkv[0].shape, "o": model.o[0].shape, "gate_up": (2 * s.intermediate, s.hidden),
        "down": model.down[0].shape,
    }.items():  # fmt: skip
        places[name] = (sum(len(b) for b in blocks), -(-rows // 16), -(-columns // 64) * 4)
        blocks.append(np.empty((places[name][1] * places[name][2], schedule.BLOCK_BYTES), np.uint8))
    orders = [
        np.concatenate([schedule.block_order(p, places[p.matrix][1], places[p.matrix][2], places[p.matrix][0])
                        for p in schedule.layer_products(s, block // s.ranks, block % s.ranks)])
        for block in range(s.blocks)
    ]  # fmt: skip
    longest = max(len(o) for o in orders)
    layers = len(model.qkv)
    stream = cupy.zeros((s.blocks, layers * longest, schedule.BLOCK_BYTES), cupy.uint8)
    for i in range(layers):
        for part, name in zip(blocks[1:], places, strict=True):
            bits = matrices[name][i] if name == "gate_up" else bf16_bits(matrices[name][i])
            part[:] = pack_linear(bits, np).view(np.uint8).reshape(-1, schedule.BLOCK_BYTES)
        whole = cupy.asarray(np.concatenate(blocks))
        for block, order in enumerate(orders):
            index = cupy.asarray(np.where(order == schedule.OUTSIDE, 0, order))
            stream[block, i * len(order) : (i + 1) * len(order)] = whole[index]
    return stream, layers * longest * schedule.BLOCK_BYTES

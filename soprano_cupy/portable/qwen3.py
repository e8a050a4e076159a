"""The Qwen3 forward pass in array code (Qwen3 technical report, 2025; layout of `Qwen3ForCausalLM`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..attention import AttentionChoice
from ..checkpoint import TensorFile
from ..config import ModelConfig
from ..device import array_module
from ..runner import KVCache, LanguageModelRunner
from .ops import linear, rms_norm, rope, rope_tables, silu_gate

Array = Any


@dataclass
class Layer:
    """One decoder layer's weights; matrices are (out, in)."""

    input_norm: Array
    qkv: Array  # query, key and value projections, one under the other
    q_norm: Array
    k_norm: Array
    o: Array
    post_attention_norm: Array
    gate_up: Array
    down: Array


class Weights:
    """All weights of a checkpoint, on one device; norms in float32 or wider."""

    def __init__(self, file: TensorFile, config: ModelConfig, xp: Any, dtype: str) -> None:
        self._file, self._config, self._xp, self._dtype = file, config, xp, dtype
        self._wide = "float64" if dtype == "float64" else "float32"
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embeddings = self._matrices(("model.embed_tokens", vocab, hidden))
        self.layers = [self._layer(f"model.layers.{i}.") for i in range(config.num_layers)]
        self.norm = self._norm("model.norm", hidden)
        if config.tie_embeddings:
            self.head = self.embeddings
            file.discard("lm_head.weight")  # some files store the tied matrix a second time
        else:
            self.head = self._matrices(("lm_head", vocab, hidden))
        file.finish()

    def _layer(self, prefix: str) -> Layer:
        c = self._config
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return Layer(
            input_norm=self._norm(prefix + "input_layernorm", c.hidden_size),
            qkv=self._matrices(
                (attention + "q_proj", c.q_size, c.hidden_size),
                (attention + "k_proj", c.kv_size, c.hidden_size),
                (attention + "v_proj", c.kv_size, c.hidden_size),
            ),
            q_norm=self._norm(attention + "q_norm", c.head_dim),
            k_norm=self._norm(attention + "k_norm", c.head_dim),
            o=self._matrices((attention + "o_proj", c.hidden_size, c.q_size)),
            post_attention_norm=self._norm(prefix + "post_attention_layernorm", c.hidden_size),
            gate_up=self._matrices(
                (mlp + "gate_proj", c.intermediate_size, c.hidden_size),
                (mlp + "up_proj", c.intermediate_size, c.hidden_size),
            ),
            down=self._matrices((mlp + "down_proj", c.hidden_size, c.intermediate_size)),
        )

    def _norm(self, name: str, size: int) -> Array:
        return self._xp.asarray(self._file.pop(name + ".weight", (size,), self._wide))

    def _matrices(self, *parts: tuple[str, int, int]) -> Array:
        """The named matrices stacked by rows in the model's dtype."""
        stacked = self._xp.empty((sum(rows for _, rows, _ in parts), parts[0][2]), dtype=storage_dtype(self._dtype))
        start = 0
        for name, rows, columns in parts:
            values = self._file.pop(name + ".weight", (rows, columns), self._dtype)
            if self._dtype == "bfloat16":  # the file reader hands out bits
                values = values.view(stacked.dtype)
            stacked[start : start + rows] = self._xp.asarray(values)
            start += rows
        return stacked


def storage_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype object for a name; bfloat16 comes from ml_dtypes, which CuPy uses too."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    return np.dtype(name)


class PortableCache(KVCache):
    """Keys and values as (layers, slots, capacity, kv heads, head_dim), in what attention reads."""

    def __init__(self, config: ModelConfig, slots: int, capacity: int, xp: Any, dtype: np.dtype[Any]) -> None:
        self.slots, self.capacity = slots, capacity
        self.lengths = np.zeros(slots, np.int32)
        shape = (config.num_layers, slots, capacity, config.num_kv_heads, config.head_dim)
        self.keys = xp.empty(shape, dtype)
        self.values = xp.empty(shape, dtype)

    def move(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]
        self.lengths[target] = length


class PortableLanguageModel(LanguageModelRunner):
    """Runs in float64, float32 or, on a GPU, with 16-bit weights, keys and values.

    With 16-bit weights the residual stream, norms, softmax and all sums stay in float32.
    """

    def __init__(
        self, file: TensorFile, config: ModelConfig, device: str, dtype: str, choice: AttentionChoice, reason: str
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.attention, self.reason = choice.name, reason
        self._attend = choice.function
        self._xp = array_module(device)
        self._weights = Weights(file, config, self._xp, dtype)
        self._frequencies = config.rope_frequencies()
        self._wide = np.dtype("float64" if dtype == "float64" else "float32")

    def new_cache(self, slots: int, capacity: int) -> PortableCache:
        return PortableCache(self.config, slots, capacity, self._xp, storage_dtype(self.dtype))

    def extend(self, cache: KVCache, ids: np.ndarray, cu_seqlens: np.ndarray, *, last_only: bool = False) -> Array:
        assert isinstance(cache, PortableCache)
        xp, weights = self._xp, self._weights
        rows = Rows.append(cache, cu_seqlens, xp)
        angles = rope_tables(rows.positions, self._frequencies, self._wide)
        cos, sin = xp.asarray(angles[0]), xp.asarray(angles[1])
        x = weights.embeddings[xp.asarray(ids)].astype(self._wide)
        for i, layer in enumerate(weights.layers):
            q, k, v = self._project(layer, x, cos, sin)
            rows.store(cache.keys[i], k)
            rows.store(cache.values[i], v)
            if last_only and i == len(weights.layers) - 1:  # nothing reads the earlier rows any more
                last = xp.asarray(rows.cu_seqlens[1:] - 1)
                x, q, rows = x[last], q[last], rows.only_last()
            x = self._finish_layer(layer, x, rows.attend(self._attend, q, cache.keys[i], cache.values[i]))
        cache.lengths[: len(rows.lengths)] = rows.lengths
        return rms_norm(x, weights.norm, self.config.rms_norm_eps)

    def logits(self, states: Array) -> Array:
        return linear(states, self._weights.head)

    def _project(self, layer: Layer, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Normalised, rotated queries and keys, and values: (N, heads, head_dim) each."""
        c = self.config
        qkv = linear(rms_norm(x, layer.input_norm, c.rms_norm_eps), layer.qkv)
        q, k, v = (part.reshape(len(x), -1, c.head_dim) for part in self._split(qkv))
        q = rope(rms_norm(q, layer.q_norm, c.rms_norm_eps), cos, sin)
        k = rope(rms_norm(k, layer.k_norm, c.rms_norm_eps), cos, sin)
        return q.astype(storage_dtype(self.dtype), copy=False), k, v

    def _split(self, qkv: Array) -> tuple[Array, Array, Array]:
        q_size, kv_size = self.config.q_size, self.config.kv_size
        return qkv[:, :q_size], qkv[:, q_size : q_size + kv_size], qkv[:, q_size + kv_size :]

    def _finish_layer(self, layer: Layer, x: Array, attended: Array) -> Array:
        x = x + linear(attended.reshape(len(x), -1).astype(self._wide, copy=False), layer.o)
        gate_up = linear(rms_norm(x, layer.post_attention_norm, self.config.rms_norm_eps), layer.gate_up)
        size = self.config.intermediate_size
        x += linear(silu_gate(gate_up[:, :size], gate_up[:, size:]), layer.down)
        return x


@dataclass(frozen=True)
class Rows:
    """Where the rows of one ragged `extend` call live in the cache."""

    positions: np.ndarray  # (N,) each row's place in its sequence
    place: tuple[Array, Array]  # (N,) slots and positions again, on the device, to index a cache with
    lengths: np.ndarray  # (n,) int32, tokens of each sequence once the rows are stored
    cu_seqlens: np.ndarray  # (n + 1,) int32, the first row of each sequence

    @classmethod
    def append(cls, cache: PortableCache, cu_seqlens: np.ndarray, xp: Any) -> Rows:
        """Rows that follow what `cache` already holds of the sequences in slots 0..n-1."""
        counts = np.diff(cu_seqlens)
        before = cache.lengths[: len(counts)]
        slots = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1] - before, counts)
        return cls(
            positions=positions,
            place=(xp.asarray(slots), xp.asarray(positions)),
            lengths=(before + counts).astype(np.int32),
            cu_seqlens=np.asarray(cu_seqlens, np.int32),
        )

    def only_last(self) -> Rows:
        """The same sequences with one query row each, their last; these rows attend, but are not stored."""
        return replace(self, cu_seqlens=np.arange(len(self.lengths) + 1, dtype=np.int32))

    def store(self, target: Array, values: Array) -> None:
        """Write values (N, kv heads, head_dim) to their slots and positions of one layer's cache."""
        if len(self.lengths) == 1:
            target[0, int(self.positions[0]) : int(self.lengths[0])] = values
        else:
            target[self.place] = values

    def attend(self, function: Any, q: Array, keys: Array, values: Array) -> Array:
        """Attention of queries (N, heads, head_dim) over their own sequences' part of one layer's cache."""
        count, longest = len(self.lengths), int(self.lengths.max())
        return function(
            q,
            keys[:count, :longest],
            values[:count, :longest],
            kv_lengths=self.lengths,
            cu_seqlens=self.cu_seqlens,
        )

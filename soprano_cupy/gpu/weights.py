"""A language model's weights on the GPU, packed once at load in the order in which the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint import TensorFile
from ..config import ModelConfig
from .packing import interleave_gate_up, pack_linear

Array = Any  # cupy.ndarray


@dataclass
class Layer:
    """One decoder layer: packed matrices, norms in float32."""

    input_norm: Array
    qkv: Array  # query, key and value projections, one under the other
    q_norm: Array
    k_norm: Array
    o: Array
    post_attention_norm: Array
    gate_up: Array  # gate and up channels in alternating groups of eight
    down: Array


class Weights:
    """All weights of a checkpoint on the current device, in bfloat16 or float16."""

    def __init__(self, file: TensorFile, config: ModelConfig, dtype: str) -> None:
        import cupy

        self._file, self._config, self._dtype, self._xp = file, config, dtype, cupy
        hidden, vocab = config.hidden_size, config.vocab_size
        embeddings = self._pop("model.embed_tokens", vocab, hidden)
        self.embeddings = cupy.asarray(embeddings)
        self.layers = [self._layer(f"model.layers.{i}.") for i in range(config.num_layers)]
        self.norm = self._norm("model.norm", hidden)
        if config.tie_embeddings:
            self.head = self._pack(embeddings)
            file.discard("lm_head.weight")  # some files store the tied matrix a second time
        else:
            self.head = self._pack(self._pop("lm_head", vocab, hidden))
        self.rope = cupy.asarray(rope_table(config))
        file.finish()

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices and tables, norms aside."""
        matrices = [m for layer in self.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        return sum(int(array.nbytes) for array in (*matrices, self.head, self.embeddings, self.rope))

    def _layer(self, prefix: str) -> Layer:
        c = self._config
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [
            self._pop(attention + name, rows, c.hidden_size)
            for name, rows in (("q_proj", c.q_size), ("k_proj", c.kv_size), ("v_proj", c.kv_size))
        ]
        gate = self._pop(mlp + "gate_proj", c.intermediate_size, c.hidden_size)
        up = self._pop(mlp + "up_proj", c.intermediate_size, c.hidden_size)
        return Layer(
            input_norm=self._norm(prefix + "input_layernorm", c.hidden_size),
            qkv=self._pack(np.concatenate(qkv)),
            q_norm=self._norm(attention + "q_norm", c.head_dim),
            k_norm=self._norm(attention + "k_norm", c.head_dim),
            o=self._pack(self._pop(attention + "o_proj", c.hidden_size, c.q_size)),
            post_attention_norm=self._norm(prefix + "post_attention_layernorm", c.hidden_size),
            gate_up=self._pack(interleave_gate_up(gate, up, np)),
            down=self._pack(self._pop(mlp + "down_proj", c.hidden_size, c.intermediate_size)),
        )

    def _pop(self, name: str, rows: int, columns: int) -> np.ndarray:
        """A matrix on the host: bits of bfloat16, or float16."""
        return self._file.pop(name + ".weight", (rows, columns), self._dtype)

    def _norm(self, name: str, size: int) -> Array:
        return self._xp.asarray(self._file.pop(name + ".weight", (size,), "float32"))

    def _pack(self, matrix: np.ndarray) -> Array:
        return self._xp.asarray(pack_linear(matrix, np))


def rope_table(config: ModelConfig) -> np.ndarray:
    """(max_positions, head_dim / 2, 2) float32: cosine and sine of every position's angles, formed in float64."""
    angles = np.arange(config.max_positions, dtype=np.float64)[:, None] * config.rope_frequencies()
    return np.stack((np.cos(angles), np.sin(angles)), axis=-1).astype(np.float32)

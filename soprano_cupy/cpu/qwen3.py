"""The Qwen3 forward pass on packed weights: `csrc/forward.c` behind the language model's interface."""

from __future__ import annotations

import logging

import numpy as np

from ..checkpoint import TensorFile
from ..config import ModelConfig
from ..errors import ParameterError
from ..portable.ops import rope_tables
from ..runner import KVCache, LanguageModelRunner
from . import _engine
from .features import choose_isa
from .threads import use_wanted_threads

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "int8")


class CpuCache(KVCache):
    """Keys and values in the engine's own layout, float32 or, beside 16-bit and 8-bit weights, bfloat16."""

    def __init__(self, model: _engine.Model, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.lengths = np.zeros(slots, np.int32)
        self.values = _engine.Cache(model, slots, capacity)

    def move(self, source: int, target: int) -> None:
        self.values.move(source, target, int(self.lengths[source]))
        self.lengths[target] = self.lengths[source]


class CpuLanguageModel(LanguageModelRunner):
    """Runs a checkpoint with its matrices packed as float32, bfloat16 or int8 (a scale for every 64 weights).

    Norms, attention's sums, the residual stream and all accumulation are float32. Results do not depend on the
    number of threads, on the batch or on how a sequence is cut into calls.
    """

    def __init__(
        self, file: TensorFile, config: ModelConfig, dtype: str = "float32", reason: str = "", isa: str | None = None
    ) -> None:
        if dtype not in DTYPES:
            raise ParameterError(f"dtype = {dtype!r} is not available on the CPU; use one of {', '.join(DTYPES)}")
        isa, isa_reason = choose_isa(isa)
        threads = use_wanted_threads()
        self.config, self.device, self.dtype, self.attention = config, "cpu", dtype, "flash"
        self.reason = f"{reason or 'asked for'}; {isa} kernels ({isa_reason}), {threads} thread(s)"
        self._model = _pack(file, config, dtype, isa)

    def new_cache(self, slots: int, capacity: int) -> CpuCache:
        self._cover_positions(capacity)
        return CpuCache(self._model, slots, capacity)

    def extend(self, cache: KVCache, ids: np.ndarray, cu_seqlens: np.ndarray, *, last_only: bool = False) -> np.ndarray:
        assert isinstance(cache, CpuCache)
        states: np.ndarray = self._model.extend(cache.values, ids, cu_seqlens, cache.lengths, last_only=last_only)
        return states

    def logits(self, states: np.ndarray) -> np.ndarray:
        scores: np.ndarray = self._model.logits(states)
        return scores

    @property
    def weight_bytes(self) -> int:
        """Memory of all packed weights."""
        return int(self._model.weight_bytes)

    def _cover_positions(self, count: int) -> None:
        """Tabulate rotary angles for at least `count` positions."""
        if count <= self._model.positions:
            return
        positions = np.arange(max(count, min(2 * count, self.config.max_positions)))
        tables = rope_tables(positions, self.config.rope_frequencies(), np.float32)
        self._model.set_angles(np.concatenate([table[:, 0] for table in tables], axis=1))


def _pack(file: TensorFile, config: ModelConfig, dtype: str, isa: str) -> _engine.Model:
    """Read and pack tensor after tensor, so that little more than the packed weights is in memory at a time."""
    vocab, hidden, inner = config.vocab_size, config.hidden_size, config.intermediate_size
    name = "model.embed_tokens.weight"
    keep_float32 = dtype == "float32" and file.dtype(name) != "bfloat16"
    model = _engine.Model(config, dtype, "float32" if keep_float32 else "bfloat16", isa)
    embeddings = file.view(name, (vocab, hidden), "float32" if keep_float32 else "bfloat16")
    head = embeddings
    if not config.tie_embeddings:
        head = _matrix(file, "lm_head.weight", vocab, hidden)
    else:
        file.discard("lm_head.weight")  # a tied head may be stored all the same
    model.set_ends(embeddings, file.pop("model.norm.weight", (hidden,)), head)
    del embeddings, head
    file.release_views()
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        model.set_norms(
            layer,
            file.pop(prefix + "input_layernorm.weight", (hidden,)),
            file.pop(attention + "q_norm.weight", (config.head_dim,)),
            file.pop(attention + "k_norm.weight", (config.head_dim,)),
            file.pop(prefix + "post_attention_layernorm.weight", (hidden,)),
        )
        model.set_attention(
            layer,
            _matrix(file, attention + "q_proj.weight", config.q_size, hidden),
            _matrix(file, attention + "k_proj.weight", config.kv_size, hidden),
            _matrix(file, attention + "v_proj.weight", config.kv_size, hidden),
            _matrix(file, attention + "o_proj.weight", hidden, config.q_size),
        )
        model.set_mlp(
            layer,
            _matrix(file, mlp + "gate_proj.weight", inner, hidden),
            _matrix(file, mlp + "up_proj.weight", inner, hidden),
            _matrix(file, mlp + "down_proj.weight", hidden, inner),
        )
        file.release_views()
    file.finish()
    _engine.trim_memory()
    return model


def _matrix(file: TensorFile, name: str, outputs: int, inputs: int) -> np.ndarray:
    """A weight matrix as it is packed from: the file's bfloat16 bits, or float32."""
    return file.view(name, (outputs, inputs), "bfloat16" if file.dtype(name) == "bfloat16" else "float32")

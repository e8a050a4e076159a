"""The persistent decode kernel on the emulated machine, beside the readable reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import emulation
import numpy as np
from slot_records import slot_state

from soprano_cupy.attention import select_attention
from soprano_cupy.checkpoint import open_language_model
from soprano_cupy.config import ModelConfig
from soprano_cupy.generation import Generation, Loop, Request
from soprano_cupy.gpu import persistent, step
from soprano_cupy.gpu.persistent_schedule import BLOCK_BYTES, THREADS, Shape
from soprano_cupy.gpu.persistent_weights import pack_persistent
from soprano_cupy.gpu.weights import Weights, rope_table
from soprano_cupy.portable.qwen3 import PortableLanguageModel

Array = Any
SOURCE = Path(__file__).with_name("persistent_decode_emulated.cu")
SPIN_LIMIT = 3_000_000  # turns of all waiting threads together
CAPACITY = 96
MOST_TOKENS = 40


def bits(values: Array) -> Array:
    """Nearest bfloat16, ties to even, as bits."""
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)


def portable(folder: Path, dtype: str = "float64") -> PortableLanguageModel:
    with open_language_model(folder) as file:
        choice = select_attention("standard", dtype=dtype)
        return PortableLanguageModel(file, ModelConfig.from_folder(folder), "cpu", dtype, choice, "test")


def packed_weights(folder: Path, config: ModelConfig) -> Weights:
    """The GPU engine's weights as NumPy arrays."""
    weights = Weights.__new__(Weights)
    with open_language_model(folder) as file:
        weights._file, weights._config, weights._dtype, weights._xp = file, config, "bfloat16", np
        weights.embeddings = weights._pop("model.embed_tokens", config.vocab_size, config.hidden_size)
        weights.layers = [weights._layer(f"model.layers.{i}.") for i in range(config.num_layers)]
        weights.norm = weights._norm("model.norm", config.hidden_size)
        weights.head = weights._pack(weights._pop("lm_head", config.vocab_size, config.hidden_size))
        weights.rope = rope_table(config)
    return weights


def gather_on_host(matrices: Sequence[Array], order: Array) -> Array:
    """`persistent_weights.gather_blocks` in NumPy."""
    blocks = [np.zeros((1, BLOCK_BYTES // 4), np.uint32), *(m.view(np.uint32).reshape(-1, 128) for m in matrices)]
    return np.concatenate(blocks)[order + 1]


@dataclass
class Outcome:
    tokens: Array
    states: Array
    record: Array
    progress: int
    error: int
    report: int
    slot_of_row: int
    residual: Array


class Host:
    """One model, one grid; `run` generates a request behind what the reference has drawn first."""

    def __init__(self, folder: Path, clusters: int, ranks: int, dim_parts: int = 1, voices: int = 1) -> None:
        self.reference = portable(folder)
        self.config = self.reference.config
        self.shape = Shape.of(self.config, clusters, ranks, dim_parts, voices)
        assert self.shape.problem() is None
        self.source = packed_weights(folder, self.config)
        w = self.source
        self.weights = pack_persistent(self.shape, w.layers, w.head, w.norm, np, gather_on_host)
        defines = dict(persistent.kernel_defines(self.shape, "bfloat16"))
        defines["SPIN_LIMIT_CYCLES"] = SPIN_LIMIT
        self.library = emulation.build(SOURCE, defines, arch=900)

    def expected(self, request: Request, *, give_up: bool = False) -> Generation:
        return Loop(self.reference, [request], give_up=give_up).results()[0]

    def prepare(self, request: Request) -> dict[str, Array]:
        """Memory as the graph path leaves it behind the first token, which the reference draws."""
        c = self.config
        first = Loop(self.reference, [replace(request, params=replace(request.params, max_new_tokens=1))]).results()[0]
        token = int(first.tokens[0])
        cache = self.reference.new_cache(1, CAPACITY)
        length = len(request.ids)
        self.reference.extend(cache, request.ids, np.array([0, length], np.int32))
        kv = [np.full((c.num_layers, CAPACITY, c.num_kv_heads, c.head_dim), 0xFFFF, np.uint16) for _ in range(2)]
        for array, source in zip(kv, (cache.keys, cache.values), strict=True):
            array[:, :length] = bits(source[:, 0, :length])
        record = np.zeros(1, step.SLOT_STATE)
        record[0] = slot_state(request, CAPACITY)
        record["count"], record["position"] = 1, length
        held = np.zeros(-(-c.vocab_size // 32) * 32, np.uint8)
        held[[*request.ids, token]] = 1
        states = np.full((MOST_TOKENS, c.hidden_size), np.nan, np.float32)
        tokens = np.full(MOST_TOKENS, -7, np.int32)
        states[0], tokens[0] = first.states[0], token
        width = -(-c.hidden_size // 64) * 64
        residual = np.zeros(width, np.float32)
        embedding = self.source.embeddings[token].astype(np.uint32) << 16
        residual[: c.hidden_size] = embedding.view(np.float32)
        return {
            "keys": kv[0], "values": kv[1], "slot": record, "tokens": tokens, "states": states, "residual": residual,
            "seen": np.packbits(held, bitorder="little").view(np.uint32), "progress": np.zeros(1, np.uint64),
            "hidden": np.zeros(width, np.uint16),
            "square_sums": np.zeros(-(-c.hidden_size // 16), np.float32), "slot_of_row": np.array([5], np.int32),
        }  # fmt: skip

    def run(self, memory: dict[str, Array], **options: Any) -> Outcome:
        """Launch one sequence on this memory, which `prepare` made or an earlier launch has left."""
        return self.run_together([memory], **options)[0]

    def run_together(
        self, memories: Sequence[dict[str, Array]], *, budget: int = 1000, cancelled: bool = False, stall_at: int = 0,
        **options: Any,
    ) -> list[Outcome]:  # fmt: skip
        """Launch several sequences."""
        w = self.weights
        constants = {
            "stream": w.stream, "gains": w.gains, "head_gains": w.head_gains, "rope": self.source.rope,
            "embeddings": self.source.embeddings,
        }  # fmt: skip
        shared = {
            "words": np.zeros(persistent.scratch_words(self.shape), np.uint64), "error": np.zeros(8, np.uint32),
            "report": np.zeros(1, np.uint64),
        }  # fmt: skip
        cancel = np.array([int(cancelled)], np.uint32)
        names = [name for name in persistent.Places.__dataclass_fields__ if name != "slot_index"]
        places = [
            persistent.Places(**{name: memory[name].ctypes.data for name in names}, slot_index=5) for memory in memories
        ]
        common = persistent.Common(
            layer_elements=memories[0]["keys"][0].size, most_tokens=MOST_TOKENS, budget=budget, stall_at=stall_at,
            cancel=cancel.ctypes.data, report=shared["report"].ctypes.data,
        )  # fmt: skip
        tables = {name: array.ctypes.data for name, array in constants.items()}
        tables |= {name: shared[name].ctypes.data for name in ("words", "error")}
        tables["stream_bytes"] = w.stream_bytes
        launch = persistent.plan_persistent(self.config, self.shape, "bfloat16", places, common, tables)
        buffers = [emulation.Buffer(array) for array in (*constants.values(), cancel)]
        buffers += [emulation.Buffer(array, True) for array in shared.values()]
        buffers += [emulation.Buffer(array, True) for memory in memories for array in memory.values()]
        self.library.launch(
            "decode_persistent", launch.params, grid=launch.grid, threads=THREADS, cluster=self.shape.blocks,
            shared_bytes=-(-launch.shared_bytes // 16) * 16, buffers=buffers, **options,
        )  # fmt: skip
        return [
            Outcome(m["tokens"], m["states"], m["slot"][0], int(m["progress"][0]), int(shared["error"][0]),
                    int(shared["report"][0]), int(m["slot_of_row"][0]), m["residual"])
            for m in memories
        ]  # fmt: skip


def request(prompt: Sequence[int], **params: Any) -> Request:
    from soprano_cupy.sampling import SamplingParams

    return Request(np.array(prompt, np.int32), SamplingParams(**params))

"""The Qwen3 forward pass as launches: which kernels run in which order, on which buffers.

A layer is five launches in a decode step (QKV product, attention, O product, gate and up product, down product) and
six in a prefill, where head norms and rotation are a launch of their own. Nothing runs here: the launches become
programs, which Cython replays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attention import prefill as prefill_attention
from ..attention.problem import LOG2_E, PARAMS_DTYPE
from ..config import ModelConfig
from ..cuda.module import DeviceFacts
from ..errors import DeviceError
from . import step
from .arena import Buffers
from .launch import Blocks, Field, Launch, RowRange, Symbol
from .linear import TILE_FEATURES, End, LinearRequest, padded, plan_linear
from .weights import Layer, Weights

ITEM_BYTES = 2  # of an Element


def activation_specs(config: ModelConfig, rows: int, element: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the activations of `rows` tokens, for an arena: the fields of `Activations`."""
    c = config
    return {
        "residual": ((rows, padded(c.hidden_size)), "float32"),
        "hidden": ((rows, padded(c.hidden_size)), element),
        "square_sums": ((rows, -(-c.hidden_size // TILE_FEATURES)), "float32"),
        "qkv": ((rows, c.q_size + 2 * c.kv_size), "float32"),
        "attended": ((rows, padded(c.q_size)), element),
        "gated": ((rows, padded(c.intermediate_size)), element),
    }


@dataclass(frozen=True)
class Activations:
    """Device addresses of one set of activations."""

    residual: int
    hidden: int
    square_sums: int
    qkv: int
    attended: int
    gated: int

    @classmethod
    def of(cls, arena: Buffers, prefix: str = "") -> Activations:
        """Those that lie in an arena under their own names, behind `prefix`."""
        return cls(**{field: arena.pointer(prefix + field) for field in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Cache:
    """Device addresses of keys and values (layers, slots, capacity, kv_heads, head_dim)."""

    keys: int
    values: int
    slots: int
    capacity: int


@dataclass(frozen=True)
class PromptTables:
    """Device addresses of what says where the rows of a prefill belong (int32), and of their queries."""

    ids: int  # (rows,)
    row_slots: int  # (rows,)
    row_positions: int  # (rows,)
    starts: int  # (sequences + 1,) first row of each sequence
    lengths: int  # (sequences,) keys of each sequence once its rows are stored
    queries: int  # (rows, q_heads, head_dim) Element, normalised and rotated
    # (rows, kv_heads, head_dim) Element, or 0. Where they are given, rows are whole prompts, in any slots, which see
    # these beside the cache's copies; else the sequences are those of slots `first_slot`, `first_slot` + 1, ...
    new_keys: int = 0
    new_values: int = 0


@dataclass(frozen=True)
class SamplePlaces:
    """Device addresses that a step's end reads and writes beside the activations; see `step.plan_sample`."""

    slots: int
    seen: int
    slot_of_row: int
    logits: int
    tokens: int
    states: int
    most_tokens: int  # of `tokens` and `states`, for each slot
    progress: int


@dataclass(frozen=True)
class EntryPlaces:
    """Where sequences that enter a running decode step get their rows of it."""

    step: Activations
    target_rows: int  # (rows,) int32: of the step, for each that enters
    slot_of_row: int  # of the step


@dataclass(frozen=True)
class PromptSizes:
    """What a prefill program's attention must know beside the rows."""

    sequences: int
    first_slot: int
    longest: int  # rows of the longest sequence, about: decides the tiles
    tiles_of: int = 0  # another number of sequences that decides the tiles


class Forward:
    """Plans the launches of one model on one GPU."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: str, facts: DeviceFacts) -> None:
        self.config, self.weights, self.dtype, self.facts = config, weights, dtype, facts

    def decode_layers(
        self, a: Activations, cache: Cache, rows: int, slots: int, slot_of_row: int, workspace: int, kernels_of: int = 0
    ) -> Iterator[Launch]:
        """All layers for one new token in each of `rows` rows; row r is the sequence of slot slot_of_row[r].

        slots: address of the `SlotState` records. kernels_of: another number of rows, at least `rows`, whose kernels
        these are to be, so that they add up in the same order; the program is run with `rows`.
        """
        count = RowRange(1, kernels_of) if kernels_of else RowRange(rows, rows)
        shape = self._attention_shape(kernels_of, cache.capacity) if kernels_of else None
        for i, layer in enumerate(self.weights.layers):
            yield self._qkv(a, layer, count)
            yield step.plan_attention_step(
                **self._facts(), rows=rows, num_heads=self.config.num_heads, num_kv_heads=self.config.num_kv_heads,
                head_dim=self.config.head_dim, epsilon=self.config.rms_norm_eps, qkv=a.qkv, attended=a.attended,
                attended_stride=padded(self.config.q_size), q_gain=_address(layer.q_norm),
                k_gain=_address(layer.k_norm), rope=_address(self.weights.rope),
                keys=self._of_layer(cache.keys, cache, i), values=self._of_layer(cache.values, cache, i),
                capacity=cache.capacity, slot_of_row=slot_of_row, slots=slots, workspace=workspace, shape=shape,
                ahead=self._ahead(i, count.most),
            )  # fmt: skip
            yield from self._rest_of_layer(a, layer, i, count)

    def _ahead(self, layer: int, rows: int) -> list[tuple[int, int]]:
        """Addresses and bytes of the weights between this layer's attention and the next one's."""
        this, layers = self.weights.layers[layer], self.weights.layers
        following = layers[layer + 1].qkv if layer + 1 < len(layers) else self.weights.head
        ranges = [(_address(array), int(array.nbytes)) for array in (this.o, this.gate_up, this.down, following)]
        return ranges if step.fetches_ahead(self.facts, rows, sum(nbytes for _, nbytes in ranges)) else []

    def prompt_layers(
        self, a: Activations, cache: Cache, tables: PromptTables, rows: RowRange, sizes: PromptSizes
    ) -> Iterator[Launch]:
        """Embedding and all layers for the rows of prompts, or of what continues them."""
        c = self.config
        yield step.plan_embed(
            **self._facts(), rows=rows.symbol, hidden_size=c.hidden_size, ids=tables.ids,
            embeddings=_address(self.weights.embeddings), gain=_address(self.weights.layers[0].input_norm),
            residual=a.residual, hidden=a.hidden, square_sums=a.square_sums, stride=padded(c.hidden_size),
        )  # fmt: skip
        for i, layer in enumerate(self.weights.layers):
            yield self._qkv(a, layer, rows)
            yield step.plan_qkv_finish(
                **self._facts(), rows=rows.symbol, num_heads=c.num_heads, num_kv_heads=c.num_kv_heads,
                head_dim=c.head_dim, epsilon=c.rms_norm_eps, qkv=a.qkv, q_gain=_address(layer.q_norm),
                k_gain=_address(layer.k_norm), rope=_address(self.weights.rope), queries=tables.queries,
                keys=self._of_layer(cache.keys, cache, i), values=self._of_layer(cache.values, cache, i),
                capacity=cache.capacity, row_slots=tables.row_slots, row_positions=tables.row_positions,
                packed_keys=tables.new_keys, packed_values=tables.new_values,
            )  # fmt: skip
            yield self._prompt_attention(a, i, cache, tables, rows, sizes)
            yield from self._rest_of_layer(a, layer, i, rows)

    def head(self, a: Activations, rows: int | RowRange, logits: int) -> Launch:
        """Logits (rows, vocab) float32 of the residual stream, the final norm included."""
        c = self.config
        count = RowRange(rows, rows) if isinstance(rows, int) else rows
        return self._linear(
            End.STORE, count, c.vocab_size, c.hidden_size, self.weights.head, a.hidden,
            square_sums=a.square_sums, output=logits, output_stride=c.vocab_size,
        )  # fmt: skip

    def gather(self, source: Activations, target: Activations, starts: int, sequences: int, first: int) -> Launch:
        """The last row of each prompt, to rows `first`, `first` + 1, ... of a decode step's input."""
        c = self.config
        width = padded(c.hidden_size)
        return step.plan_gather(
            **self._facts(), sequences=sequences, hidden_size=c.hidden_size, starts=starts, residual=source.residual,
            hidden=source.hidden, square_sums=source.square_sums, last_residual=target.residual + first * width * 4,
            last_hidden=target.hidden + first * width * ITEM_BYTES,
            last_square_sums=target.square_sums + first * -(-c.hidden_size // TILE_FEATURES) * 4, stride=width,
        )  # fmt: skip

    def sample(self, a: Activations, rows: int, places: SamplePlaces, entry: EntryPlaces | None = None) -> Launch:
        """The next token of each row, its state, and the next step's input in the same activations, or at `entry`."""
        c, w = self.config, self.weights
        after = a if entry is None else entry.step
        return step.plan_sample(
            **self._facts(), rows=rows, hidden_size=c.hidden_size, vocab_size=c.vocab_size, end_token=c.eos_token_id,
            epsilon=c.rms_norm_eps, logits=places.logits, residual=a.residual, square_sums=a.square_sums,
            final_gain=_address(w.norm), embeddings=_address(w.embeddings), next_gain=_address(w.layers[0].input_norm),
            next_residual=after.residual, next_hidden=after.hidden, next_square_sums=after.square_sums,
            stride=padded(c.hidden_size), slot_of_row=places.slot_of_row,
            next_slot_of_row=places.slot_of_row if entry is None else entry.slot_of_row,
            target_rows=0 if entry is None else entry.target_rows,
            slots=places.slots, seen=places.seen, tokens=places.tokens, states=places.states,
            most_tokens=places.most_tokens, progress=places.progress,
        )  # fmt: skip

    def final_norm(self, a: Activations, rows: int, states: int) -> Launch:
        """States (rows, hidden) float32 of the residual stream behind the last layer."""
        c = self.config
        return step.plan_final_norm(
            **self._facts(), rows=rows, hidden_size=c.hidden_size, epsilon=c.rms_norm_eps, residual=a.residual,
            square_sums=a.square_sums, gain=_address(self.weights.norm), states=states, stride=padded(c.hidden_size),
        )  # fmt: skip

    def _attention_shape(self, rows: int, capacity: int) -> step.AttentionStepShape:
        """The thread blocks of a decode step's attention for so many rows."""
        c = self.config
        return step.attention_step_shape(
            **self._facts(), rows=rows, num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
            capacity=capacity,
        )  # fmt: skip

    def workspace_bytes(self, rows: int, capacity: int) -> int:
        """Scratch of a decode step's attention."""
        c = self.config
        return step.attention_step_workspace_bytes(
            **self._facts(), rows=rows, num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
            capacity=capacity,
        )  # fmt: skip

    def logits_of_states(self, states: int, rows: int, logits: int) -> Launch:
        """Logits of states (rows, hidden padded) Element that a final norm has been through already."""
        c = self.config
        return self._linear(
            End.STORE, RowRange(rows, rows), c.vocab_size, c.hidden_size, self.weights.head, states,
            output=logits, output_stride=c.vocab_size,
        )  # fmt: skip

    def _qkv(self, a: Activations, layer: Layer, rows: RowRange) -> Launch:
        size = self.config.q_size + 2 * self.config.kv_size
        return self._linear(
            End.STORE, rows, size, self.config.hidden_size, layer.qkv, a.hidden,
            square_sums=a.square_sums, output=a.qkv, output_stride=size,
        )  # fmt: skip

    def _rest_of_layer(self, a: Activations, layer: Layer, index: int, rows: RowRange) -> Iterator[Launch]:
        """O product, gate and up, down: from the attention's output to the next layer's input."""
        c, layers = self.config, self.weights.layers
        next_norm = layers[index + 1].input_norm if index + 1 < len(layers) else self.weights.norm
        yield self._residual_product(rows, c.q_size, layer.o, a.attended, layer.post_attention_norm, a)
        yield self._linear(
            End.SWIGLU, rows, 2 * c.intermediate_size, c.hidden_size, layer.gate_up, a.hidden,
            square_sums=a.square_sums, output=a.gated, output_stride=padded(c.intermediate_size),
        )  # fmt: skip
        yield self._residual_product(rows, c.intermediate_size, layer.down, a.gated, next_norm, a)

    def _residual_product(
        self, rows: RowRange, depth: int, weights: object, source: int, next_norm: object, a: Activations
    ) -> Launch:
        stride = padded(self.config.hidden_size)
        return self._linear(
            End.RESIDUAL, rows, self.config.hidden_size, depth, weights, source, residual=a.residual,
            residual_stride=stride, next_gain=_address(next_norm), next_square_sums=a.square_sums,
            output=a.hidden, output_stride=stride,
        )  # fmt: skip

    def _linear(
        self, end: End, rows: RowRange, features: int, depth: int, weights: object, source: int, **others: Any
    ) -> Launch:
        return plan_linear(
            LinearRequest(
                end=end,
                **self._facts(),
                rows=rows.symbol,
                rows_min=rows.least,
                rows_max=rows.most,
                features=features,
                depth=depth,
                weights=_address(weights),
                input=source,
                input_stride=padded(depth),
                epsilon=self.config.rms_norm_eps,
                **others,
            )
        )

    def _prompt_attention(
        self, a: Activations, layer: int, cache: Cache, tables: PromptTables, rows: RowRange, sizes: PromptSizes
    ) -> Launch:
        """Queries packed by `starts` against the cache, from `first_slot` on."""
        c = self.config
        group = c.num_heads // c.num_kv_heads
        problem = _PromptProblem(
            sizes.tiles_of or sizes.sequences, sizes.longest, sizes.longest, c.num_heads, c.num_kv_heads
        )
        plan = prefill_attention.plan(
            compute_capability=self.facts.capability, dtype=self.dtype, head_dim=c.head_dim, group=group, causal=True,
            params_info=problem, multiprocessors=self.facts.multiprocessors,
        )  # fmt: skip
        if plan is None:
            raise DeviceError(f"no prefill attention kernel takes {c.head_dim} dimensions in {self.dtype}")
        tile_rows = plan.tile_rows
        pairs = sizes.sequences * c.num_kv_heads
        together = min(pairs, prefill_attention.PAIRS_TOGETHER)
        token = c.num_kv_heads * c.head_dim
        first = sizes.first_slot * cache.capacity * token * ITEM_BYTES
        keys_of = {
            "k": self._of_layer(cache.keys, cache, layer) + first,
            "v": self._of_layer(cache.values, cache, layer) + first, "kv_lengths": tables.lengths,
        }  # fmt: skip
        fields = [Field(_offset("total_q"), Symbol.ROWS), Field(_offset("seqlen_q"), Symbol.LONGEST)]
        if tables.new_keys:
            keys_of = {"k": tables.new_keys, "v": tables.new_values, "cu_seqlens_k": tables.starts}
            fields.append(Field(_offset("seqlen_k"), Symbol.LONGEST))
        params = np.zeros(1, PARAMS_DTYPE)
        for name, value in {
            "q": tables.queries, **keys_of, "out": a.attended, "cu_seqlens_q": tables.starts,
            "q_token_stride": c.q_size, "q_head_stride": c.head_dim,
            "k_batch_stride": cache.capacity * token, "k_token_stride": token, "k_head_stride": c.head_dim,
            "v_batch_stride": cache.capacity * token, "v_token_stride": token, "v_head_stride": c.head_dim,
            "out_token_stride": padded(c.q_size), "out_head_stride": c.head_dim,
            "batch": sizes.sequences, "total_q": rows.most, "seqlen_k": cache.capacity,
            "num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads, "splits": 1,
            "scale_log2": LOG2_E / math.sqrt(c.head_dim),
        }.items():  # fmt: skip
            params[name] = value
        return Launch(
            source=plan.source,
            kernel=plan.kernel,
            defines=plan.defines,
            grid=(Blocks(Symbol.LONGEST, tile_rows, group, together), -(-pairs // together), 1),
            threads=plan.threads,
            shared_bytes=plan.shared_memory_bytes,
            params=params.tobytes(),
            fields=tuple(fields),
            programmatic=False,  # the kernel does not wait by itself
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "capability": self.facts.capability,
            "multiprocessors": self.facts.multiprocessors,
        }

    def _of_layer(self, base: int, cache: Cache, layer: int) -> int:
        slot = cache.capacity * self.config.num_kv_heads * self.config.head_dim * ITEM_BYTES
        return base + layer * cache.slots * slot


@dataclass(frozen=True)
class _PromptProblem:
    """The sizes that choose a prefill kernel's tiles (`attention.launch.ProblemSizes`)."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_kv_heads: int


def _offset(field: str) -> int:
    """Bytes before a field of AttentionParams."""
    assert PARAMS_DTYPE.fields is not None
    return int(PARAMS_DTYPE.fields[field][1])


def _address(array: object) -> int:
    return int(array.data.ptr)  # type: ignore[attr-defined]

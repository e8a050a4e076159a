"""Plans of the language model's kernels other than products: embedding, head norms and rotation, a decode step's
attention, sampling.

Every function takes device addresses (0: none) and sizes and returns a `Launch`. `rows` and `sequences` are numbers, or
symbols that a program is given at each run. `kernels/step_params.cuh` explains the parameters.
"""

from __future__ import annotations

from ..generation import LOOP_DISTANCE, LOOP_LENGTH
from .attention_step import (
    AttentionStepShape,
    attention_step_shape,
    attention_step_workspace_bytes,
    fetches_ahead,
    plan_attention_step,
)
from .launch import Launch, Symbol
from .slots import (
    FAILED,
    LENGTH,
    RUNNING,
    SLOT_STATE,
    STOP,
    STUCK,
    progress_count,
    progress_status,
    progress_stuck,
    progress_token,
)
from .step_launch import WARP, block_for_each, dtype_define, floats, ints, make_launch, param_struct

__all__ = [
    "FAILED", "LENGTH", "RUNNING", "SLOT_STATE", "STOP", "STUCK", "AttentionStepShape", "attention_step_shape",
    "attention_step_workspace_bytes", "fetches_ahead", "plan_attention_step", "plan_embed", "plan_final_norm",
    "plan_gather", "plan_qkv_finish", "plan_sample", "progress_count", "progress_status", "progress_stuck",
    "progress_token",
]  # fmt: skip

ROW_THREADS = 256  # of a block that copies or embeds a row, at most
HEAD_WARPS = 8  # of a block that finishes a row's heads, at most

# Threads of the sampling kernel's block, by the size of the vocabulary: 8 scores each of 8,192.
SAMPLE_THREADS = ((4096, 1024), (1024, 512), (0, 256))
MOST_HELD = 8192  # scores that stay in shared memory, as in kernels/sample_scores.cuh
BINS, CANDIDATES = 64, 128  # as in kernels/sample_search.cuh
SEARCH_BYTES = 3 * BINS * WARP * 4 + 2 * BINS * 12 + 32 + 16 + 16 + CANDIDATES * 16


# kernels/step_params.cuh, field by field
EMBED_PARAMS = param_struct("ids embeddings gain residual hidden square_sums", *ints("rows columns stride reserved"))
GATHER_PARAMS = param_struct(
    "starts residual hidden square_sums last_residual last_hidden last_square_sums",
    *ints("sequences columns stride reserved"),
)
FINAL_NORM_PARAMS = param_struct(
    "residual square_sums gain states",
    *ints("rows columns stride"), *floats("inverse_width epsilon"), *ints("reserved"),
)  # fmt: skip
QKV_FINISH_PARAMS = param_struct(
    "qkv q_gain k_gain rope row_slots row_positions queries packed_keys packed_values keys values",
    *ints("rows q_heads kv_heads capacity"), *floats("epsilon"), *ints("reserved"),
)  # fmt: skip
SAMPLE_PARAMS = param_struct(
    "logits residual square_sums final_gain embeddings next_gain next_residual next_hidden next_square_sums "
    "target_rows slot_of_row next_slot_of_row slots seen tokens states progress",
    *ints("most_tokens stride end_token loop_length"), *floats("inverse_width epsilon loop_distance"),
    *ints("reserved"),
)  # fmt: skip


def _row_threads(columns: int) -> int:
    return min(ROW_THREADS, -(-columns // WARP) * WARP)


def plan_embed(
    *,
    dtype: str,
    capability: tuple[int, int],
    multiprocessors: int,
    rows: int | Symbol,
    hidden_size: int,
    ids: int,
    embeddings: int,
    gain: int,
    residual: int,
    hidden: int,
    square_sums: int,
    stride: int,
) -> Launch:
    """The residual stream of tokens `ids` (rows,) int32, with the first layer's input.

    embeddings: (vocab, hidden_size) Element. gain: (hidden_size,) of the first input norm. stride: elements from row to
    row of `residual` and `hidden`, whose further columns are left alone.
    """
    values = {
        "ids": ids, "embeddings": embeddings, "gain": gain, "residual": residual, "hidden": hidden,
        "square_sums": square_sums, "rows": rows, "columns": hidden_size, "stride": stride,
    }  # fmt: skip
    return make_launch(
        "embed.cu", "embed", EMBED_PARAMS, values, defines=(dtype_define(dtype),), blocks=(block_for_each(rows), 1, 1),
        threads=_row_threads(hidden_size),
    )  # fmt: skip


def plan_gather(
    *,
    dtype: str,
    capability: tuple[int, int],
    multiprocessors: int,
    sequences: int | Symbol,
    hidden_size: int,
    starts: int,
    residual: int,
    hidden: int,
    square_sums: int,
    last_residual: int,
    last_hidden: int,
    last_square_sums: int,
    stride: int,
) -> Launch:
    """The last row of each sequence, starts[i + 1] - 1, to rows 0, 1, ... of other buffers with the same stride."""
    values = {
        "starts": starts, "residual": residual, "hidden": hidden, "square_sums": square_sums,
        "last_residual": last_residual, "last_hidden": last_hidden, "last_square_sums": last_square_sums,
        "sequences": sequences, "columns": hidden_size, "stride": stride,
    }  # fmt: skip
    return make_launch(
        "embed.cu", "gather_rows", GATHER_PARAMS, values, defines=(dtype_define(dtype),),
        blocks=(block_for_each(sequences), 1, 1), threads=_row_threads(hidden_size),
    )  # fmt: skip


def plan_final_norm(
    *,
    dtype: str,
    capability: tuple[int, int],
    multiprocessors: int,
    rows: int | Symbol,
    hidden_size: int,
    epsilon: float,
    residual: int,
    square_sums: int,
    gain: int,
    states: int,
    stride: int,
) -> Launch:
    """States (rows, hidden_size) float32: the residual stream behind the last layer through the final norm."""
    values = {
        "residual": residual, "square_sums": square_sums, "gain": gain, "states": states, "rows": rows,
        "columns": hidden_size, "stride": stride, "inverse_width": 1 / hidden_size, "epsilon": epsilon,
    }  # fmt: skip
    return make_launch(
        "embed.cu", "final_norm", FINAL_NORM_PARAMS, values, defines=(dtype_define(dtype),),
        blocks=(block_for_each(rows), 1, 1), threads=_row_threads(hidden_size),
    )  # fmt: skip


def plan_qkv_finish(
    *,
    dtype: str,
    capability: tuple[int, int],
    multiprocessors: int,
    rows: int | Symbol,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    epsilon: float,
    qkv: int,
    q_gain: int,
    k_gain: int,
    rope: int,
    queries: int,
    keys: int,
    values: int,
    capacity: int,
    row_slots: int,
    row_positions: int,
    packed_keys: int = 0,
    packed_values: int = 0,
) -> Launch:
    """Head norms and rotation of raw products qkv (rows, (num_heads + 2 num_kv_heads) head_dim) float32.

    Queries go to `queries` (rows, num_heads, head_dim) Element; keys and values to this layer's cache `keys` and
    `values` (slots, capacity, num_kv_heads, head_dim) at each row's slot and position (int32; slot -1: no row), and,
    where these are given, to packed_keys and packed_values (rows, num_kv_heads, head_dim). rope: float32 (positions,
    head_dim / 2, 2), cosines and sines.
    """
    fields = {
        "qkv": qkv, "q_gain": q_gain, "k_gain": k_gain, "rope": rope, "row_slots": row_slots,
        "row_positions": row_positions, "queries": queries, "packed_keys": packed_keys, "packed_values": packed_values,
        "keys": keys, "values": values, "rows": rows, "q_heads": num_heads, "kv_heads": num_kv_heads,
        "capacity": capacity, "epsilon": epsilon,
    }  # fmt: skip
    return make_launch(
        "qkv_finish.cu", "qkv_finish", QKV_FINISH_PARAMS, fields,
        defines=(("HEAD_DIM", head_dim), dtype_define(dtype)), blocks=(block_for_each(rows), 1, 1),
        threads=WARP * min(HEAD_WARPS, num_heads + 2 * num_kv_heads),
    )  # fmt: skip


def plan_sample(
    *,
    dtype: str,
    capability: tuple[int, int],
    multiprocessors: int,
    rows: int,
    hidden_size: int,
    vocab_size: int,
    end_token: int,
    epsilon: float,
    logits: int,
    residual: int,
    square_sums: int,
    final_gain: int,
    embeddings: int,
    next_gain: int,
    next_residual: int,
    next_hidden: int,
    next_square_sums: int,
    stride: int,
    slot_of_row: int,
    next_slot_of_row: int,
    slots: int,
    seen: int,
    tokens: int,
    states: int,
    most_tokens: int,
    progress: int,
    target_rows: int = 0,
) -> Launch:
    """The next token of each row, with all that a step does besides (`kernels/sample.cu`).

    logits: (rows, vocab_size) float32. residual, square_sums: behind the last layer. final_gain: of the final norm;
    next_gain: of the first layer's input norm. next_residual, next_hidden, next_square_sums: the next step's input,
    rows `stride` elements apart as in `residual`; with `target_rows` (rows,) int32, row r of it is target_rows[r], and
    the buffers must be others than those read. slot_of_row, next_slot_of_row: (rows,) int32, may be the same. slots:
    `SLOT_STATE` records. seen: (slots, ceil(vocab_size / 32)) uint32. tokens: (slots, most_tokens) int32, states
    (slots, most_tokens, hidden_size) float32. progress: (slots,) uint64 in mapped host memory.
    """
    threads = next(count for least, count in SAMPLE_THREADS if vocab_size >= least)
    scores_bytes = -(-4 * vocab_size // 16) * 16 if vocab_size <= MOST_HELD else 0
    gain_bytes = -(-4 * hidden_size // 16) * 16
    fields = {
        "logits": logits, "residual": residual, "square_sums": square_sums, "final_gain": final_gain,
        "embeddings": embeddings, "next_gain": next_gain, "next_residual": next_residual, "next_hidden": next_hidden,
        "next_square_sums": next_square_sums, "target_rows": target_rows, "slot_of_row": slot_of_row,
        "next_slot_of_row": next_slot_of_row, "slots": slots, "seen": seen, "tokens": tokens, "states": states,
        "progress": progress, "most_tokens": most_tokens, "stride": stride, "end_token": end_token,
        "loop_length": LOOP_LENGTH, "inverse_width": 1 / hidden_size, "epsilon": epsilon,
        "loop_distance": LOOP_DISTANCE,
    }  # fmt: skip
    return make_launch(
        "sample.cu", "sample", SAMPLE_PARAMS, fields,
        defines=(("VOCAB", vocab_size), ("HIDDEN", hidden_size), ("THREADS", threads), dtype_define(dtype)),
        blocks=(rows, 1, 1), threads=threads,
        shared_bytes=threads // WARP * 16 + SLOT_STATE.itemsize + SEARCH_BYTES + scores_bytes + gain_bytes,
    )  # fmt: skip

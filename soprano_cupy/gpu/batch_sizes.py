"""What a batch of sequences is planned for: how many, how long, and the buffers that follow from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import MAX_NEW_TOKENS, ModelConfig
from ..generation import Request
from . import step
from .forward import activation_specs

Specs = dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype of each buffer

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # rows of a decode step
PROMPT_ROWS = 8192  # of one prefill, at most
CAPACITY_STEP = 1024  # tokens; capacities are multiples of it, or what the model allows


@dataclass(frozen=True)
class BatchSizes:
    """What a batch is planned for."""

    slots: int
    capacity: int  # tokens of a slot, prompt and speech together
    tokens: int  # new tokens of a slot

    def serves(self, other: BatchSizes) -> bool:
        """Whether a batch of these sizes can do what `other` asks for."""
        return self.slots >= other.slots and self.capacity >= other.capacity and self.tokens >= other.tokens


def one_voice(config: ModelConfig) -> BatchSizes:
    """The sizes that a call for one sentence takes unless it asks for more."""
    return BatchSizes(1, min(CAPACITY_STEP, config.max_positions), min(MAX_NEW_TOKENS, config.max_positions))


def sizes_for(requests: Sequence[Request], max_positions: int) -> BatchSizes:
    """The sizes for these requests, rounded up so that similar calls share a batch."""
    tokens = max(MAX_NEW_TOKENS, *(r.params.max_new_tokens for r in requests))
    longest = max(len(r.ids) + r.params.max_new_tokens for r in requests)
    capacity = min(-(-longest // CAPACITY_STEP) * CAPACITY_STEP, max_positions)
    return BatchSizes(bucket_of(len(requests)), capacity, min(tokens, max_positions))


def bucket_of(rows: int) -> int:
    """The rows of the decode step that serves `rows` sequences."""
    return next(size for size in BUCKETS if size >= rows)


def batch_specs(config: ModelConfig, sizes: BatchSizes) -> Specs:
    """Every buffer of a batch, for its arena; 16-bit numbers as their bits."""
    c, slots = config, sizes.slots
    prompt_rows = prompt_capacity(sizes)
    kv = (c.num_layers, slots, sizes.capacity, c.num_kv_heads, c.head_dim)
    specs: Specs = {"keys": (kv, np.uint16), "values": (kv, np.uint16)}
    specs |= {f"prompt.{k}": v for k, v in activation_specs(c, prompt_rows, "uint16").items()}
    specs |= {f"step.{k}": v for k, v in activation_specs(c, slots, "uint16").items()}
    specs["queries"] = ((prompt_rows, c.num_heads, c.head_dim), np.uint16)
    specs["logits"] = ((slots, c.vocab_size), np.float32)
    specs["states"] = ((slots, sizes.tokens, c.hidden_size), np.float32)
    return specs | upload_specs(config, sizes)


def prompt_capacity(sizes: BatchSizes) -> int:
    """Rows that one prefill takes: a whole prompt at least."""
    return max(sizes.capacity, min(64 * sizes.slots, PROMPT_ROWS))


def upload_specs(config: ModelConfig, sizes: BatchSizes) -> Specs:
    """What the host writes before a prefill, in the order in which it lies in memory."""
    rows, slots = prompt_capacity(sizes), sizes.slots
    return {
        "slots": ((slots,), step.SLOT_STATE),
        "seen": ((slots, -(-config.vocab_size // 32)), np.uint32),
        "slot_of_row": ((slots,), np.int32),
        "starts": ((slots + 1,), np.int32),
        "lengths": ((slots,), np.int32),
        "ids": ((rows,), np.int32),
        "row_slots": ((rows,), np.int32),
        "row_positions": ((rows,), np.int32),
    }


def prompt_groups(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Indices of consecutive prompts that fit `rows` together."""
    groups: list[list[int]] = [[]]
    used = 0
    for index, length in enumerate(lengths):
        if groups[-1] and used + length > rows:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += length
    return groups

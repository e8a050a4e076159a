"""What a crowd on a GPU is planned for, the buffers that follow from that, and how many voices fit a memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..config import MAX_NEW_TOKENS, ModelConfig
from .batch_sizes import Specs
from .crowd_rows import BUCKETS
from .forward import activation_specs
from .slots import SLOT_STATE

DEFAULT_SLOTS = 256
CAPACITY_STEP = 64  # tokens
PROMPT_ROWS = 4096  # of one prefill, beside which those who speak wait
MOST_ENTRIES = 128  # prompts of one prefill
ENTRY_BUCKETS = (1, 4, 16, 64, MOST_ENTRIES)  # prompts that a prefill program is planned for; further ones are empty
PROMPT_CLASSES = (64, 256, 1024)  # most rows of a prefill program; beyond, what the buffers hold
GRAPH_ROWS = (32, 64, 96, 128, 192, 256, 384, 512, 768, *range(1024, PROMPT_ROWS + 1, 256))  # of prefills
SLOT_WORDS = SLOT_STATE.itemsize // 8


@dataclass(frozen=True)
class CrowdSizes:
    """The numbers that everything is planned for."""

    slots: int
    capacity: int  # tokens of a slot, prompt and speech together
    tokens: int  # new tokens of a slot
    most_prompt: int  # tokens of a prompt
    prompt_rows: int  # of one prefill
    entries: int  # prompts of one prefill

    @classmethod
    def plan(cls, config: ModelConfig, slots: int, most_prompt: int) -> CrowdSizes:
        """For prompts of up to `most_prompt` tokens and as many new ones as a sentence may have."""
        most_prompt = min(most_prompt, config.max_positions)
        wanted = -(-(most_prompt + MAX_NEW_TOKENS) // CAPACITY_STEP) * CAPACITY_STEP
        return cls(
            slots=slots,
            capacity=min(wanted, config.max_positions),
            tokens=min(MAX_NEW_TOKENS, config.max_positions),
            most_prompt=most_prompt,
            prompt_rows=max(most_prompt, min(PROMPT_ROWS, most_prompt * slots)),
            entries=min(MOST_ENTRIES, slots),
        )

    @property
    def entry_buckets(self) -> list[int]:
        """The numbers of prompts that programs are planned for."""
        return [size for size in ENTRY_BUCKETS if size < self.entries] + [self.entry_bucket(self.entries)]

    @property
    def prompt_classes(self) -> list[int]:
        """The most rows of each prefill program."""
        return [end for end in PROMPT_CLASSES if end < self.prompt_rows] + [self.prompt_rows]

    @property
    def entry_graphs(self) -> list[tuple[int, int]]:
        """Rows and prompts of the prefills that are graphs."""
        fewest = [1, *(size + 1 for size in self.entry_buckets)]
        fewer = dict(zip(GRAPH_ROWS[1:], GRAPH_ROWS, strict=False))
        return [
            (rows, bucket)
            for rows in GRAPH_ROWS
            for bucket, least in zip(self.entry_buckets, fewest, strict=False)
            if least <= rows <= self.prompt_rows and fewer.get(rows, 0) < bucket * self.most_prompt
        ]

    def entry_bucket(self, count: int) -> int:
        return next(size for size in ENTRY_BUCKETS if size >= count)

    def padded_rows(self, rows: int) -> int:
        """The rows that a prefill of so many takes: those of the next graph, or just as many."""
        return next((size for size in GRAPH_ROWS if rows <= size <= self.prompt_rows), rows)


def staged_specs(config: ModelConfig, sizes: CrowdSizes) -> Specs:
    """What the host writes for a prefill, in the order in which it lies in memory."""
    entries, rows = sizes.entry_bucket(sizes.entries), sizes.prompt_rows
    return {
        "staged_slots": ((entries, SLOT_WORDS), np.uint64),
        "staged_seen": ((entries, seen_words(config)), np.uint32),
        "entry_slots": ((entries,), np.int32),
        "target_rows": ((entries,), np.int32),
        "starts": ((entries + 1,), np.int32),
        "ids": ((rows,), np.int32),
        "row_slots": ((rows,), np.int32),
        "row_positions": ((rows,), np.int32),
    }


def packed_specs(sizes: CrowdSizes) -> Specs:
    """What the host writes to pack rows."""
    return {"packed_starts": ((sizes.slots + 1,), np.int32), "packed_slots": ((sizes.slots,), np.int32)}


def crowd_specs(config: ModelConfig, sizes: CrowdSizes) -> Specs:
    """Every buffer, for the arena; 16-bit numbers as their bits. Those that the host writes come last."""
    c, slots, entries = config, sizes.slots, sizes.entry_bucket(sizes.entries)
    rows, step_rows = sizes.prompt_rows, step_rows_of(sizes)
    kv = (c.num_layers, slots, sizes.capacity, c.num_kv_heads, c.head_dim)
    packed = (rows, c.num_kv_heads, c.head_dim)
    specs: Specs = {"keys": (kv, np.uint16), "values": (kv, np.uint16)}
    for name, count in (("prompt", max(rows, step_rows)), ("step", step_rows), ("entry", entries)):
        specs |= {f"{name}.{field}": spec for field, spec in activation_specs(c, count, "uint16").items()}
    return specs | {
        "queries": ((rows, c.num_heads, c.head_dim), np.uint16),
        "new_keys": (packed, np.uint16),
        "new_values": (packed, np.uint16),
        "logits": ((step_rows, c.vocab_size), np.float32),
        "entry_logits": ((entries, c.vocab_size), np.float32),
        "states": ((slots, sizes.tokens, c.hidden_size), np.float32),
        "slots": ((slots, SLOT_WORDS), np.uint64),
        "seen": ((slots, seen_words(c)), np.uint32),
        "slot_of_row": ((step_rows,), np.int32),
        **staged_specs(c, sizes),
        **packed_specs(sizes),
    }


def step_rows_of(sizes: CrowdSizes) -> int:
    """Rows of the largest decode step."""
    return next(size for size in BUCKETS if size >= sizes.slots)


def seen_words(config: ModelConfig) -> int:
    """Words of a slot's mask of tokens seen."""
    return -(-config.vocab_size // 32)


def crowd_bytes(config: ModelConfig, sizes: CrowdSizes) -> int:
    """GPU memory of all buffers, weights and decoder aside."""
    specs = crowd_specs(config, sizes).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in specs)


def slots_that_fit(config: ModelConfig, most: int, most_prompt: int, max_memory: int | None) -> int:
    """The largest number of slots, `most` or a bucket below it, whose buffers fit `max_memory` bytes; 0: none does."""
    for slots in (most, *(size for size in reversed(BUCKETS) if size < most)):
        if max_memory is None or crowd_bytes(config, CrowdSizes.plan(config, slots, most_prompt)) <= max_memory:
            return slots
    return 0

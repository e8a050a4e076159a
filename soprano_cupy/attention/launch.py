"""What a planner hands to the dispatch: which kernel to compile, with which constants, and how to launch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class ProblemSizes(Protocol):
    """The sizes of one attention call; `problem.Problem` has them all."""

    @property
    def batch(self) -> int: ...
    @property
    def seqlen_q(self) -> int:
        """Queries of the longest sequence."""

    @property
    def seqlen_k(self) -> int:
        """Keys of the longest sequence: the capacity of a cache."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...


class Grid(Protocol):
    """Blocks along x, y and z for one call."""

    def __call__(self, *, batch: int, seqlen_q: int, num_heads: int, num_kv_heads: int) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class LaunchPlan:
    """One compiled variant of a kernel, for a class of shapes."""

    source: str  # file name in kernels/
    kernel: str  # its extern "C" function, which takes one AttentionParams by value
    defines: tuple[tuple[str, int], ...]  # -D constants, in the order that keys the compile cache
    threads: int  # of a block, along x
    shared_memory_bytes: int  # dynamic, of a block; above 48 KB the launcher raises the kernel's limit first
    grid: Grid
    description: str  # one line for -v and doctor
    tile_rows: int = 0  # query rows (tokens times heads of the group) of a block; prefill kernels
    splits: int = 1  # AttentionParams.splits
    # AttentionParams.workspace: zeroed when it is allocated, left fit for the next launch; one launch at a time uses it
    workspace_bytes: int = 0

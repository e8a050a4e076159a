"""What a planner hands to the launcher: a kernel, its constants, and a launch whose sizes may follow a few symbols.

A symbol is a number known only when a program runs, such as the rows of a prompt. Grids are derived from it and
parameter fields are patched with it, so that one program, packed once, serves every size of its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

ANY_ADDRESS = 1 << 20  # stands for a pointer where only the kernel is asked for


class Symbol(IntEnum):
    """Numbers that a program is given at each run."""

    ROWS = 0  # rows of the activations
    SEQUENCES = 1  # sequences these rows belong to
    LONGEST = 2  # rows of the longest of them
    SPARE = 3


@dataclass(frozen=True)
class RowRange:
    """The numbers of rows that one program serves."""

    least: int
    most: int
    given_as: Symbol = Symbol.ROWS  # at each run, where there are several

    @property
    def symbol(self) -> int | Symbol:
        return self.most if self.least == self.most else self.given_as


def row_class(rows: int, capacity: int, classes: Sequence[int]) -> RowRange:
    """The range of rows that one program serves, among which `rows` is.

    classes: the most rows of each program but the last, which serves up to `capacity`; ascending.
    """
    ends = (*(end for end in classes if end < capacity), capacity)
    most = next(end for end in ends if end >= rows)
    return RowRange(max((end + 1 for end in ends if end < most), default=1), most)


class Blocks(NamedTuple):
    """A grid dimension that follows a symbol: repeat * ceil(symbol * times / of_each)."""

    symbol: Symbol
    of_each: int
    times: int = 1
    repeat: int = 1


class Field(NamedTuple):
    """A 32-bit integer in the parameters that is a symbol."""

    offset: int  # bytes from the start of the parameters
    symbol: Symbol


Dimension = int | Blocks


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a program."""

    source: str  # file name in kernels/
    kernel: str  # its extern "C" function, which takes one struct by value
    defines: tuple[tuple[str, int], ...]  # -D constants, in the order that keys the compile cache
    grid: tuple[Dimension, Dimension, Dimension]
    threads: int  # of a block, along x
    shared_bytes: int  # dynamic shared memory of a block
    params: bytes  # the struct
    fields: tuple[Field, ...] = ()
    specific: bool = False  # compiled for exactly this architecture, with its own instructions ("sm_90a")
    cluster: int = 1  # blocks of a cluster along x
    # Programmatic dependent launch: may begin while the kernel before still runs (compute capability 9.0 and newer);
    # the kernel waits itself (grid_dependency_wait) before it touches what others write.
    programmatic: bool = True
    cooperative: bool = False  # all blocks run at once; the launch fails where they do not fit

"""How the plans of a step's kernels are made: parameter structs, and launches whose sizes may be symbols."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..attention import decode
from .launch import Blocks, Dimension, Field, Launch, Symbol

WARP = 32
ELEMENT_BYTES = 2


def param_struct(pointers: str, *numbers: tuple[str, type] | tuple[str, type, tuple[int]]) -> np.dtype[Any]:
    """A parameter struct: addresses, then 32-bit numbers, or arrays of either."""
    return np.dtype([*((name, np.uint64) for name in pointers.split()), *numbers])


def ints(names: str) -> list[tuple[str, type]]:
    return [(name, np.int32) for name in names.split()]


def floats(names: str) -> list[tuple[str, type]]:
    return [(name, np.float32) for name in names.split()]


def make_launch(
    source: str,
    kernel: str,
    struct: np.dtype[Any],
    values: dict[str, Any],
    *,
    defines: tuple[tuple[str, int], ...],
    blocks: tuple[Dimension, Dimension, Dimension],
    threads: int,
    shared_bytes: int = 0,
    cluster: int = 1,
) -> Launch:
    """The launch whose parameters are `values`, of which symbols become fields; names that are missing are 0."""
    params = np.zeros((), struct)
    fields = []
    for name, value in values.items():
        if isinstance(value, Symbol):
            assert struct.fields is not None
            fields.append(Field(int(struct.fields[name][1]), value))
        else:
            params[name] = value
    return Launch(
        source=source,
        kernel=kernel,
        defines=defines,
        grid=blocks,
        threads=threads,
        shared_bytes=shared_bytes,
        params=params.tobytes(),
        fields=tuple(fields),
        cluster=cluster,
    )


def block_for_each(count: int | Symbol) -> Dimension:
    """A thread block for each row or sequence."""
    return Blocks(count, 1) if isinstance(count, Symbol) else count


def dtype_define(dtype: str) -> tuple[str, int]:
    return decode.DTYPE_DEFINES[dtype], 1

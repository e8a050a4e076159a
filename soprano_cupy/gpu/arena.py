"""One allocation that holds every buffer of an engine, so that nothing is allocated while it works."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Array = Any  # cupy.ndarray

ALIGNMENT = 256  # bytes; more than any kernel asks for
GUARD = 4096  # bytes behind the last buffer: a tile that is loaded whole may reach past its rows


class Buffers(Protocol):
    """Where buffers lie; an `Arena`, for one."""

    def pointer(self, name: str, offset: int = 0) -> int:
        """Device address of a buffer, or of the element `offset` along its first axis."""


class Arena:
    """Named device arrays in one zeroed allocation on the current device, zeroed in the current stream.

    specs: name -> (shape, dtype). Raises `MemoryError` (CuPy's OutOfMemoryError is one) where it does not fit.
    """

    def __init__(self, specs: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        import cupy

        places: dict[str, int] = {}
        end = 0
        for name, (shape, dtype) in specs.items():
            places[name] = end
            size = math.prod(shape) * np.dtype(dtype).itemsize
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.nbytes = end + GUARD
        self._memory = cupy.cuda.alloc(self.nbytes)
        self._memory.memset_async(0, self.nbytes)
        self._arrays = {
            name: cupy.ndarray(shape, dtype, self._memory + places[name]) for name, (shape, dtype) in specs.items()
        }

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def pointer(self, name: str, offset: int = 0) -> int:
        """Device address of a buffer, or of the element `offset` along its first axis."""
        array = self._arrays[name]
        return int(array.data.ptr) + offset * int(array.strides[0])

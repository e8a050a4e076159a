"""A planned launch with numbers for its symbols, as a program makes it when it runs."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from soprano_cupy.gpu.launch import Blocks, Launch, Symbol


def at_sizes(launch: Launch, symbols: Mapping[Symbol, int]) -> tuple[bytes, list[int]]:
    """Its parameters and its grid."""
    params = bytearray(launch.params)
    for field in launch.fields:
        struct.pack_into("<i", params, field.offset, symbols[field.symbol])
    grid = [
        size.repeat * -(-symbols[size.symbol] * size.times // size.of_each) if isinstance(size, Blocks) else size
        for size in launch.grid
    ]
    return bytes(params), grid

"""Weights in the order in which the linear kernels read them (`kernels/linear_params.cuh`), packed once at load.

A lane of a warp holds four words of each 16 x 16 tile of W (features x depth): with g = lane / 4 and t = lane % 4 these
are rows g and g + 8 of columns 2t, 2t + 1, then both rows of columns 2t + 8, 2t + 9. Reshapes and one transposition, so
it runs where the array is: NumPy on the host or CuPy on the device.
"""

from __future__ import annotations

from typing import Any

from ..errors import ParameterError
from .linear import DEPTH_STEP, TILE_FEATURES

Array = Any  # numpy.ndarray or cupy.ndarray

_GATE_CHANNELS = TILE_FEATURES // 2  # of gate, then as many of up, in one tile
_TILE_SHAPE = (2, 8, 2, 4, 2)  # half of the features, g, half of the depth, t, pair


def packed_shape(features: int, depth: int) -> tuple[int, int]:
    """Features and depth after padding: a packed array has this many elements."""
    return -(-features // TILE_FEATURES) * TILE_FEATURES, -(-depth // DEPTH_STEP) * DEPTH_STEP


def pack_linear(weights: Array, xp: Any) -> Array:
    """(features, depth) of any 2-byte type, packed and zero-padded: flat, contiguous, of the same type.

    xp: `numpy` or `cupy`, whichever the array belongs to. Raises `ParameterError` for another shape or item size.
    """
    _check(weights)
    features, depth = weights.shape
    rows, columns = packed_shape(features, depth)
    bits = weights.view(xp.uint16)
    if (rows, columns) != (features, depth):
        padded = xp.zeros((rows, columns), dtype=xp.uint16)
        padded[:features, :depth] = bits
        bits = padded
    half, g, depth_half, t, _ = _TILE_SHAPE  # pairs stay together: they are moved as one word
    words = xp.ascontiguousarray(bits).view(xp.uint32)
    tiles = words.reshape(rows // TILE_FEATURES, half, g, columns // 16, depth_half, t)
    packed = tiles.transpose(0, 3, 2, 5, 4, 1)
    return xp.ascontiguousarray(packed).reshape(-1).view(weights.dtype)


def unpack_linear(packed: Array, features: int, depth: int, xp: Any) -> Array:
    """The (features, depth) weights again, without their padding."""
    rows, columns = packed_shape(features, depth)
    if packed.size != rows * columns or packed.dtype.itemsize != 2:
        raise ParameterError(
            f"{packed.size} elements of {packed.dtype} are no packed weights of {features} x {depth}; "
            f"pass the {rows * columns} elements of 2 bytes that pack_linear returned"
        )
    half, g, depth_half, t, pair = _TILE_SHAPE
    tiles = packed.reshape(rows // TILE_FEATURES, columns // 16, g, t, depth_half, half, pair)
    weights = xp.ascontiguousarray(tiles.transpose(0, 5, 2, 1, 4, 3, 6)).reshape(rows, columns)
    return weights[:features, :depth]


def interleave_gate_up(gate: Array, up: Array, xp: Any) -> Array:
    """One matrix of gate (channels, depth) and up (channels, depth) for the SwiGLU end, before packing.

    Of each 16 features the first 8 are gate channels 8n to 8n + 7, the last 8 the same channels of up. Channels are
    padded to a multiple of 8 with zeros, so the result has 2 * ceil(channels / 8) * 8 features.
    """
    _check(gate)
    _check(up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ParameterError(
            f"gate {gate.shape} {gate.dtype} and up {up.shape} {up.dtype} differ; pass both of one shape and type"
        )
    channels, depth = gate.shape
    groups = -(-channels // _GATE_CHANNELS)
    both = xp.zeros((groups, 2, _GATE_CHANNELS, depth), dtype=xp.uint16)
    for i, half in enumerate((gate, up)):
        bits = half.view(xp.uint16)
        whole = channels // _GATE_CHANNELS
        both[:whole, i] = bits[: whole * _GATE_CHANNELS].reshape(whole, _GATE_CHANNELS, depth)
        if whole < groups:
            both[whole, i, : channels - whole * _GATE_CHANNELS] = bits[whole * _GATE_CHANNELS :]
    return both.reshape(groups * TILE_FEATURES, depth).view(gate.dtype)


def _check(weights: Array) -> None:
    if weights.ndim != 2 or weights.dtype.itemsize != 2 or 0 in weights.shape:
        raise ParameterError(
            f"weights of shape {tuple(weights.shape)} and type {weights.dtype} cannot be packed; "
            "pass a (features, depth) matrix of bfloat16 or float16"
        )

"""The weights of a language model once more, in the order in which the blocks of the persistent kernel read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .packing import packed_shape
from .persistent_schedule import BLOCK_BYTES, OUTSIDE, TILE, Product, Shape, block_order, head_products, layer_products
from .weights import Layer

Array = Any  # numpy.ndarray or cupy.ndarray

MATRICES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class PersistentWeights:
    """What `kernels/decode_persistent.cu` reads: streams and gains, where the packed matrices were.

    stream: (blocks of the grid, stream_bytes) bytes. gains: (layers + 1, 2, hidden) float32: input norm and
    post-attention norm of each layer, then the final norm. head_gains: (layers, 2, head_dim) float32: queries, keys.
    """

    stream: Array
    gains: Array
    head_gains: Array

    @property
    def stream_bytes(self) -> int:
        return int(self.stream.shape[1])

    @property
    def nbytes(self) -> int:
        return int(self.stream.nbytes + self.gains.nbytes + self.head_gains.nbytes)


def pack_persistent(
    shape: Shape, layers: Sequence[Layer], head: Array, final_norm: Array, xp: Any
) -> PersistentWeights:
    """Streams for every block of the grid, from matrices that `pack_linear` packed and norms in float32.

    xp: `numpy` or `cupy`, where the arrays are and the result will be.
    """
    sizes = matrix_sizes(shape)
    places, end = {}, 1  # block 0 is zeros
    for name in MATRICES:
        tiles, steps = sizes[name]
        places[name] = (tiles, steps, end)
        end += tiles * steps
    places["head"] = (*sizes["head"], 1)
    blocks = range(shape.blocks)
    layer_orders = [_order(layer_products(shape, b // shape.ranks, b % shape.ranks), places) for b in blocks]
    head_orders = [_order(head_products(shape, b), places) for b in blocks]
    of_layer, of_head = (np.array([len(order) for order in orders]) for orders in (layer_orders, head_orders))
    longest = int((len(layers) * of_layer + of_head).max())
    begins = np.arange(shape.blocks) * longest
    stream = xp.zeros((shape.blocks * longest, BLOCK_BYTES // 4), np.uint32)
    sources = xp.asarray(np.concatenate(layer_orders))  # a few operations for each layer, not for each of its blocks
    for index, layer in enumerate(layers):
        targets = xp.asarray(_runs(begins + index * of_layer, of_layer))
        stream[targets] = _with_zeros([getattr(layer, name) for name in MATRICES], xp)[sources]
    targets = xp.asarray(_runs(begins + len(layers) * of_layer, of_head))
    stream[targets] = _with_zeros([head], xp)[xp.asarray(np.concatenate(head_orders))]
    norms = [norm for layer in layers for norm in (layer.input_norm, layer.post_attention_norm)]
    return PersistentWeights(
        stream=stream.view(np.uint8).reshape(shape.blocks, longest * BLOCK_BYTES),
        gains=xp.stack([*norms, final_norm, xp.zeros_like(final_norm)]).astype(np.float32).reshape(-1, 2, shape.hidden),
        head_gains=xp.stack([gain for layer in layers for gain in (layer.q_norm, layer.k_norm)])
        .astype(np.float32)
        .reshape(-1, 2, shape.head_dim),
    )


def matrix_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Tiles of 16 features and steps of 16 of depth, padding included, of each packed matrix."""
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    gated = -(-shape.intermediate // 8) * TILE
    sizes = {
        "qkv": (qkv, shape.hidden), "o": (shape.hidden, shape.heads * shape.head_dim), "gate_up": (gated, shape.hidden),
        "down": (shape.hidden, shape.intermediate), "head": (shape.vocab, shape.hidden),
    }  # fmt: skip
    packed = {name: packed_shape(*size) for name, size in sizes.items()}
    return {name: (features // TILE, depth // TILE) for name, (features, depth) in packed.items()}


def _order(products: Sequence[Product], places: dict[str, tuple[int, int, int]]) -> np.ndarray:
    """Indices, into the matrices behind a block of zeros, of all blocks that a thread block reads."""
    orders = [block_order(product, *places[product.matrix]) for product in products]
    order = np.concatenate(orders) if orders else np.zeros(0, np.int64)
    return np.where(order == OUTSIDE, 0, order)


def _runs(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[0], begins[0] + 1, ... so many of each."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1])


def _with_zeros(matrices: Sequence[Array], xp: Any) -> Array:
    """(1 + blocks, 128) words: a block of zeros, then the matrices' blocks one behind the other."""
    parts = [xp.zeros((1, BLOCK_BYTES // 4), np.uint32)]
    parts += [matrix.view(np.uint32).reshape(-1, BLOCK_BYTES // 4) for matrix in matrices]
    return xp.concatenate(parts)

"""The weights of a language model once more, in the order in which the blocks of the persistent kernel read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..device import to_host
from .launch import Launch
from .packing import packed_shape
from .persistent_schedule import BLOCK_BYTES, OUTSIDE, TILE, Product, Shape, block_order, head_products, layer_products
from .step_launch import dtype_define, make_launch, param_struct
from .weights import Layer

Array = Any  # numpy.ndarray or cupy.ndarray

MATRICES = ("qkv", "o", "gate_up", "down")
Gather = Callable[[Sequence[Array], np.ndarray], Array]
GATHER_THREADS = 256
GATHER_PARAMS = param_struct("sources target", ("count", np.int64))


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
    shape: Shape, layers: Sequence[Layer], head: Array, final_norm: Array, xp: Any, gather: Gather
) -> PersistentWeights:
    """Streams for every block of the grid, from matrices that `pack_linear` packed and norms in float32.

    xp: `numpy` or `cupy`, where the arrays are and the result will be; gather: `gather_blocks`, or what does the same.
    """
    order = stream_order(shape, len(layers))
    matrices = [getattr(layer, name) for layer in layers for name in MATRICES]
    norms = [norm for layer in layers for norm in (layer.input_norm, layer.post_attention_norm)]
    head_norms = [norm for layer in layers for norm in (layer.q_norm, layer.k_norm)]
    gains = np.stack([*map(to_host, (*norms, final_norm)), np.zeros(shape.hidden)]).astype(np.float32)
    head_gains = np.stack([*map(to_host, head_norms)]).astype(np.float32)
    return PersistentWeights(
        stream=gather([*matrices, head], order.reshape(-1)).view(np.uint8).reshape(shape.blocks, -1),
        gains=xp.asarray(gains.reshape(-1, 2, shape.hidden)),
        head_gains=xp.asarray(head_gains.reshape(-1, 2, shape.head_dim)),
    )


def stream_order(shape: Shape, layers: int) -> np.ndarray:
    """(blocks of the grid, longest): which blocks of 16 x 16 weights each reads, one after the other.

    They are counted through all layers' `MATRICES` and then the head, each as `pack_linear` packs it. OUTSIDE: zeros.
    """
    sizes = matrix_sizes(shape)
    places, end = {}, 0
    for name in MATRICES:
        tiles, steps = sizes[name]
        places[name] = (tiles, steps, end)
        end += tiles * steps
    places["head"] = (*sizes["head"], layers * end)
    blocks = range(shape.blocks)
    of_layer = [_order(layer_products(shape, b // shape.ranks, b % shape.ranks), places) for b in blocks]
    of_head = [_order(head_products(shape, b), places) for b in blocks]
    longest = max(layers * len(layer) + len(last) for layer, last in zip(of_layer, of_head, strict=True))
    order = np.full((shape.blocks, longest), OUTSIDE, np.int64)
    for row, layer, last in zip(order, of_layer, of_head, strict=True):
        used = layers * len(layer)
        every = np.arange(layers)[:, None] * end + layer
        row[:used] = np.where(layer == OUTSIDE, OUTSIDE, every).reshape(-1)
        row[used : used + len(last)] = last
    return order


def gather_blocks(matrices: Sequence[Array], order: np.ndarray, dtype: str, device: int) -> Array:
    """(len(order), 128) words on a CUDA device: the blocks of packed matrices that `order` names, OUTSIDE as zeros.

    In the order of CuPy's current stream. dtype: of the weights, which are not looked at.
    """
    import cupy

    from .program import load_program

    addresses = [int(m.data.ptr) + BLOCK_BYTES * np.arange(m.nbytes // BLOCK_BYTES, dtype=np.uint64) for m in matrices]
    sources = cupy.asarray(np.concatenate([*addresses, np.zeros(1, np.uint64)])[order])  # OUTSIDE is the last
    target = cupy.empty((len(order), BLOCK_BYTES // 4), np.uint32)
    stream = cupy.cuda.get_current_stream()
    load_program([plan_gather(sources.data.ptr, target.data.ptr, len(order), dtype)], device).run(stream.ptr)
    stream.synchronize()  # the table of addresses is given up here
    return target


def plan_gather(sources: int, target: int, count: int, dtype: str) -> Launch:
    """The launch of `kernels/gather_blocks.cu`."""
    values = {"sources": sources, "target": target, "count": count}
    return make_launch(
        "gather_blocks.cu", "gather_blocks", GATHER_PARAMS, values, defines=(dtype_define(dtype),),
        blocks=(-(-count // (GATHER_THREADS // 32)), 1, 1), threads=GATHER_THREADS,
    )  # fmt: skip


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
    """All blocks that a thread block reads, counted as in `stream_order`."""
    orders = [block_order(product, *places[product.matrix]) for product in products]
    return np.concatenate(orders) if orders else np.zeros(0, np.int64)

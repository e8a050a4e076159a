"""Who computes what in the kernel that stays on the GPU for a whole sentence, and the order in which weights are read.

The same arithmetic as `kernels/persistent_sizes.cuh` and `persistent_stream.cuh`, in Python: it packs the weights into
one stream for each thread block, and tests hold the two against each other.

A grid is `clusters` clusters of `ranks` blocks. A cluster holds its share of the query heads, with their keys and
values, and its share of the MLP's channels; inside it each rank computes whole tiles of 16 features of every product.
The residual stream is summed over the clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import ModelConfig

WARPS = 8  # that compute, of a block
THREADS = (WARPS + 2) * 32  # two more warps: one streams the weights, one tells the host
TILE = 16
BLOCK_BYTES = 512  # 16 x 16 weights
GROUPS = WARPS * 4  # groups of eight lanes, each with keys of its own
OUTSIDE = -1  # a block of zeros: padding

Array = Any


def share(count: int, rank: int, ranks: int) -> range:
    """The part of `count` things that belongs to a rank."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def ceil(value: int, divisor: int) -> int:
    """value / divisor, rounded up."""
    return -(-value // divisor)


@dataclass(frozen=True)
class Shape:
    """A model's sizes and the grid that serves it; the constants of `persistent_sizes.cuh`."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    clusters: int
    ranks: int
    dim_parts: int = 1
    voices: int = 1

    @classmethod
    def of(cls, config: ModelConfig, clusters: int, ranks: int, dim_parts: int = 1, voices: int = 1) -> Shape:
        """The shape of a model on a grid."""
        return cls(
            hidden=config.hidden_size, heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            intermediate=config.intermediate_size, vocab=config.vocab_size, clusters=clusters, ranks=ranks,
            dim_parts=dim_parts, voices=voices,
        )  # fmt: skip

    @property
    def channels(self) -> int:
        """The MLP's channels, padded so that every cluster has whole steps of the product after them."""
        return ceil(self.intermediate, TILE * self.clusters) * TILE * self.clusters

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def local_heads(self) -> int:
        return self.heads // self.clusters

    @property
    def local_kv(self) -> int:
        return 1 if self.local_heads < self.group else self.local_heads // self.group

    @property
    def q_rows(self) -> int:
        return self.local_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.local_kv * self.head_dim

    @property
    def qkv_tiles(self) -> int:
        return (self.q_rows + 2 * self.kv_rows) // TILE

    @property
    def hidden_tiles(self) -> int:
        return self.hidden // TILE

    @property
    def gated_tiles(self) -> int:
        return self.channels // self.clusters // 8

    @property
    def gated_steps(self) -> int:
        return self.channels // self.clusters // TILE

    @property
    def attended_steps(self) -> int:
        return self.q_rows // TILE

    @property
    def head_tiles(self) -> int:
        return ceil(self.vocab, TILE)

    @property
    def ranks_of_head(self) -> int:
        return self.ranks // self.local_heads

    @property
    def parts(self) -> int:
        """Shares of the keys of a head."""
        return self.ranks_of_head // self.dim_parts // self.voices

    @property
    def owners(self) -> int:
        """Warps of a block that own rows of one voice's residual stream."""
        return (ceil(self.hidden_tiles, self.ranks) + 1) // 2

    @property
    def out_dims(self) -> int:
        return self.head_dim // self.dim_parts

    @property
    def blocks(self) -> int:
        """Thread blocks of the grid."""
        return self.clusters * self.ranks

    def problem(self) -> str | None:
        """Why the kernel does not take this shape; None when it does."""
        if self.heads % self.clusters:
            return f"{self.heads} query heads are no multiple of {self.clusters} clusters"
        if self.local_heads % self.group and self.group % self.local_heads:
            return f"{self.local_heads} heads of a cluster fall across groups of {self.group}"
        if self.ranks % self.local_heads or self.ranks_of_head % (self.dim_parts * self.voices):
            return (
                f"{self.ranks} ranks do not divide by {self.local_heads} heads, {self.dim_parts} parts, "
                f"{self.voices} voices"
            )
        if self.owners * self.voices > WARPS:
            return f"{self.voices} voices have more than 32 rows for each warp of {self.blocks} blocks"
        if self.hidden % TILE:
            return f"the hidden size {self.hidden} is no multiple of {TILE}"
        if self.head_dim not in (32, 64, 128) or self.out_dims % 32:
            return f"heads of {self.head_dim} dimensions are not served"
        if self.gated_tiles < self.ranks:
            return f"{self.intermediate} channels are too few for {self.blocks} blocks"
        return None

    # ---- shared memory, as in persistent_sizes.cuh ----

    def exchange_bytes(self) -> list[int]:
        """Bytes of each exchange's buffer, in their order."""
        v, hidden = self.voices, self.voices * (self.hidden * 2 + 16)
        sums = self.voices * ceil(self.hidden_tiles, 4) * 16
        attended = self.ranks * (self.out_dims + 4) * 4
        gated = v * (self.channels // self.clusters * 2 + 16)
        return [v * self.qkv_tiles * TILE * 4, attended, hidden, hidden, gated, sums, sums]

    def room_bytes(self) -> list[int]:
        """Bytes of the rooms for a block's weights of QKV, O, gate and up, down."""
        qkv, hidden, gated = (ceil(n, self.ranks) for n in (self.qkv_tiles, self.hidden_tiles, self.gated_tiles))
        blocks = qkv * self.hidden_tiles, hidden * self.attended_steps, gated * self.hidden_tiles
        return [n * BLOCK_BYTES for n in (*blocks, hidden * self.gated_steps)]

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, without the sampler's."""
        most = max(ceil(n, self.ranks) for n in (self.qkv_tiles, self.hidden_tiles, self.gated_tiles))
        most = max(most, ceil(self.head_tiles, self.blocks))
        total = sum(self.room_bytes()) + sum(ceil(n, 16) * 16 for n in self.exchange_bytes())
        total += WARPS * self.voices * most * TILE * 4 + WARPS * (self.out_dims + 4) * 4
        total += self.voices * (self.q_rows * 2 + 16) + (3 + 2 * WARPS) * self.head_dim * 4
        return total + 8 * (2 * len(self.room_bytes()) + len(self.exchange_bytes())) + 16

    def defines(self) -> tuple[tuple[str, int], ...]:
        """The constants that the kernel is compiled with, but for its type."""
        return (
            ("HIDDEN", self.hidden), ("HEADS", self.heads), ("KV_HEADS", self.kv_heads), ("HEAD_DIM", self.head_dim),
            ("CHANNELS", self.channels), ("VOCAB", self.vocab), ("CLUSTERS", self.clusters), ("RANKS", self.ranks),
            ("DIM_PARTS", self.dim_parts), ("VOICES", self.voices),
        )  # fmt: skip


@dataclass(frozen=True)
class Product:
    """A block's part of one product: these tiles of features, these steps of depth, of one of a layer's matrices."""

    matrix: str  # qkv, o, gate_up, down, head
    tiles: tuple[int, ...]  # of the whole matrix, or OUTSIDE
    steps: range  # of the whole matrix

    @property
    def blocks(self) -> int:
        return len(self.tiles) * len(self.steps)


def layer_products(shape: Shape, cluster: int, rank: int) -> list[Product]:
    """What a block computes in a layer, in its order."""
    s = shape
    hidden = tuple(share(s.hidden_tiles, rank, s.ranks))
    every = range(s.hidden_tiles)
    attended = range(cluster * s.attended_steps, (cluster + 1) * s.attended_steps)
    channels = range(cluster * s.gated_steps, (cluster + 1) * s.gated_steps)
    gated = share(s.gated_tiles, rank, s.ranks)
    products = [Product("qkv", tuple(qkv_tile(s, cluster, t) for t in share(s.qkv_tiles, rank, s.ranks)), every)]
    products.append(Product("o", hidden, attended))
    products.append(Product("gate_up", tuple(cluster * s.gated_tiles + t for t in gated), every))
    products.append(Product("down", hidden, channels))
    return products


def qkv_tile(shape: Shape, cluster: int, tile: int) -> int:
    """The tile of the whole QKV matrix that a cluster calls `tile`."""
    s = shape
    row = tile * TILE
    first_kv = cluster * s.local_heads // s.group * s.head_dim
    if row < s.q_rows:
        return (cluster * s.q_rows + row) // TILE
    row -= s.q_rows
    if row < s.kv_rows:
        return (s.heads * s.head_dim + first_kv + row) // TILE
    return ((s.heads + s.kv_heads) * s.head_dim + first_kv + row - s.kv_rows) // TILE


def head_products(shape: Shape, block: int) -> list[Product]:
    """What a block of the grid computes of the output head, behind the last layer."""
    tiles = share(shape.head_tiles, block, shape.blocks)
    return [Product("head", tuple(tiles), range(shape.hidden_tiles))]


def block_order(product: Product, tile_count: int, step_count: int, first: int) -> np.ndarray:
    """Index of every 512-byte block of a product in its packed matrix: tile by tile, step by step.

    tile_count, step_count: of the packed matrix; first: index of its first block.
    """
    steps, tiles = np.array(product.steps, int), np.array(product.tiles, int)
    index = first + tiles[:, None] * step_count + steps[None, :]
    outside = (tiles[:, None] < 0) | (tiles[:, None] >= tile_count) | (steps[None, :] >= step_count)
    return np.where(outside, OUTSIDE, index).reshape(-1)

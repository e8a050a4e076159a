"""The shapes in which the two mma.sync kernels of y = x Wᵀ come, and what each is predicted to take.

`linear_rows.cu` divides the depth over the warps of a block and is made for latency; `linear_tiles.cu` walks the depth
with a block's tile of outputs and is made for throughput. Which is better follows from a rough model in clocks of one
multiprocessor, whose constants stand here, in one place, to be set from measurements (`benchmarks/linear.py --sweep`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

KIB = 1024
MAX_SHARED_BYTES = {  # that one block may have
    (7, 5): 64 * KIB, (8, 0): 163 * KIB, (8, 6): 99 * KIB, (8, 7): 163 * KIB, (8, 9): 99 * KIB,
    (9, 0): 227 * KIB, (10, 0): 227 * KIB, (10, 3): 227 * KIB, (11, 0): 227 * KIB, (12, 0): 99 * KIB, (12, 1): 99 * KIB,
}  # fmt: skip
UNKNOWN_SHARED_BYTES = 99 * KIB  # a GPU newer than this table: what the smallest of its predecessors had
RESERVED_SHARED_BYTES = KIB  # of each block, besides

STEP = 64  # of the depth that a tile takes at a time
WARP_LANES = 32

# The model's constants, in clocks and bytes of one multiprocessor.
MMA_CLOCKS = 2.0  # of one m16n8k16, four warp schedulers together
SHARED_LOAD_BYTES = 40.0  # a clock, from the second-level cache with all multiprocessors asking
ROWS_LATENCY = 900.0  # linear_rows: activations, products, barrier, sum, end
TILES_LATENCY = 1700.0  # linear_tiles: first stage, end
STEP_LATENCY = 190.0  # of one step of a tile: barrier, fragments, four products that wait for one another
WEIGHTS_EXPOSED = 0.5  # share of the weights' way that the wait for the kernel before does not hide


class Problem(NamedTuple):
    """What the prediction depends on."""

    capability: tuple[int, int]
    multiprocessors: int
    rows: int
    feature_tiles: int  # of 16 features
    depth: int  # padded

    @property
    def max_shared_bytes(self) -> int:
        return MAX_SHARED_BYTES.get(self.capability, UNKNOWN_SHARED_BYTES)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class RowsShape:
    """One form of `linear_rows.cu`; the fields are its compile-time constants."""

    depth: int
    warps: int
    columns: int  # groups of 8 rows
    feature_tiles: int  # of a block
    staged: bool  # activations come through shared memory

    source = "linear_rows.cu"
    kernel = "linear_rows"

    @property
    def held(self) -> int:
        """Packed tiles of the depth that a warp has in registers."""
        return ceil_div(self.depth // 16, self.warps)

    @property
    def rows(self) -> int:
        return 8 * self.columns

    @property
    def features(self) -> int:
        return 16 * self.feature_tiles

    @property
    def threads(self) -> int:
        return WARP_LANES * self.warps

    @property
    def shared_bytes(self) -> int:
        staged = self.warps * self.rows * (2 * self.held + 1) * 16 if self.staged else 0
        return staged + self.warps * self.feature_tiles * self.columns * 640

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        return (
            ("DEPTH", self.depth),
            ("WARPS", self.warps),
            ("COLUMNS", self.columns),
            ("FEATURE_TILES", self.feature_tiles),
            ("STAGED", int(self.staged)),
        )

    def fits(self, problem: Problem) -> bool:
        held, units = self.held * self.feature_tiles, self.columns * self.feature_tiles
        return held <= MOST_HELD and units <= self.warps and self.shared_bytes <= problem.max_shared_bytes

    def clocks(self, problem: Problem) -> float:
        """Predicted time of the whole launch."""
        blocks = ceil_div(problem.feature_tiles, self.feature_tiles) * ceil_div(problem.rows, self.rows)
        each = ceil_div(blocks, problem.multiprocessors)
        row_bytes = self.depth * 2 * (1 if self.staged else 2)  # straight loads use half of each sector
        loads = min(problem.rows, self.rows) * row_bytes + self.features * self.depth * 2 * WEIGHTS_EXPOSED
        products = self.feature_tiles * self.columns * (self.depth // 16) * MMA_CLOCKS
        return ROWS_LATENCY + each * (loads / SHARED_LOAD_BYTES + products)


@dataclass(frozen=True)
class TilesShape:
    """One form of `linear_tiles.cu`; the fields are its compile-time constants."""

    block_features: int
    block_rows: int
    feature_warps: int
    row_warps: int
    stages: int
    min_blocks: int

    source = "linear_tiles.cu"
    kernel = "linear_tiles"

    @property
    def rows(self) -> int:
        return self.block_rows

    @property
    def features(self) -> int:
        return self.block_features

    @property
    def threads(self) -> int:
        return WARP_LANES * self.feature_warps * self.row_warps

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.block_features + self.block_rows) * STEP * 2 + self.block_rows * 4

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        return (
            ("BLOCK_FEATURES", self.block_features),
            ("BLOCK_ROWS", self.block_rows),
            ("FEATURE_WARPS", self.feature_warps),
            ("ROW_WARPS", self.row_warps),
            ("STAGES", self.stages),
            ("MIN_BLOCKS", self.min_blocks),
        )

    def fits(self, problem: Problem) -> bool:
        return self.shared_bytes <= problem.max_shared_bytes

    def clocks(self, problem: Problem) -> float:
        """Predicted time of the whole launch."""
        blocks = ceil_div(problem.feature_tiles * 16, self.features) * ceil_div(problem.rows, self.rows)
        each = ceil_div(blocks, problem.multiprocessors)
        held = problem.max_shared_bytes + RESERVED_SHARED_BYTES  # by a multiprocessor
        together = max(1, min(self.min_blocks, each, held // (self.shared_bytes + RESERVED_SHARED_BYTES)))
        products = self.features * self.rows * STEP / 2048 * MMA_CLOCKS
        step = max(products, (self.features + self.rows) * STEP * 2 / SHARED_LOAD_BYTES)
        alone = STEP_LATENCY + products / 2
        return TILES_LATENCY + ceil_div(each, together) * problem.depth / STEP * max(alone, together * step)


Shape = RowsShape | TilesShape

# The tiles, largest first. A warp of the first three has 64 x 64 outputs, for which it reads 4 KB of shared memory for
# every 32 products, half as much as those of 32 x 32; the small ones have blocks for every multiprocessor when rows are
# few, and stages for whole depths at once.
TILES = (
    TilesShape(256, 128, 4, 2, stages=4, min_blocks=1),
    TilesShape(128, 128, 2, 2, stages=3, min_blocks=2),
    TilesShape(128, 64, 2, 2, stages=4, min_blocks=2),
    TilesShape(64, 64, 2, 2, stages=4, min_blocks=3),
    TilesShape(64, 32, 2, 2, stages=6, min_blocks=3),
)
SMALL_STAGES = 3  # where there is less shared memory
TURING_STAGES = 2  # without asynchronous copies a third stage hides nothing
TURING_TILES = ((128, 64), (64, 64), (64, 32))

COLUMNS = (1, 2, 4)
MOST_GROUPS = 32  # blocks of linear_rows along the rows
FEATURE_TILES = (1, 2)  # of a block of linear_rows
MOST_HELD = 18  # packed tiles in the registers of a lane, 4 registers each


def rows_warps(depth: int) -> int:
    """Warps over which `linear_rows.cu` divides the depth, by it alone so that results do not vary with rows."""
    fragments = depth // 16
    return 4 if fragments <= 8 else 8 if fragments <= 64 else 16


def shapes(problem: Problem) -> Iterator[Shape]:
    """Every shape that can serve the problem on its GPU."""
    for columns in COLUMNS:
        if ceil_div(problem.rows, 8 * columns) > MOST_GROUPS:
            continue
        for feature_tiles in FEATURE_TILES:
            shape = RowsShape(problem.depth, rows_warps(problem.depth), columns, feature_tiles, columns > 1)
            if shape.fits(problem):
                yield shape
    yield from tiles_of(problem)


def tiles_of(problem: Problem) -> Iterator[TilesShape]:
    """The tiles of this GPU."""
    turing = problem.capability < (8, 0)
    for tile in TILES:
        stages = (TURING_STAGES,) if turing else (tile.stages, SMALL_STAGES)
        for count in stages:
            fitting = TilesShape(tile.block_features, tile.block_rows, tile.feature_warps, tile.row_warps, count,
                                 tile.min_blocks)  # fmt: skip
            if fitting.fits(problem) and (not turing or (tile.block_features, tile.block_rows) in TURING_TILES):
                yield fitting
                break


# What an H200 measured for few rows (benchmarks/linear.py --sweep), in microseconds, as columns x feature tiles of
# `linear_rows.cu`, or the tile of 64 features x 32 rows. Straight loads, with one column, are good while few blocks
# ask for the same row of activations: 4.5 where two staged columns take 2.1 for one row of 4,608 x 512.
#
#     features x depth   rows   1 x 2   2 x 1   2 x 2   4 x 2   tile
#     768 x 512          1      1.20    1.08    1.27            2.9
#     512 x 512          8      1.43    1.48    1.43    1.97    2.96
#     512 x 2304         1      1.54    2.10    2.46            9.9
#     512 x 2304         32     3.54    3.06    3.21            9.8
#     4608 x 512         1      3.11    2.17    2.12    2.82    3.91
#     4608 x 512         16     6.40    5.42    3.28    3.65    4.00
#     4608 x 512         32     8.66    7.89    5.45    6.74    4.11
#     8192 x 512         64                     9.5     9.5     6.52
#     768 x 2304         64             7.31    4.84            9.57
#
# and for more rows of few features, where `linear_hopper.cu` takes:
#
#     768 x 512          256                    3.62    3.96    4.07
#     512 x 512          256                    2.93    3.62    4.64
#     512 x 2304         128    6.08 (4 x 1)                    6.3 (clusters of four)
#     512 x 2304         256                    10.1            6.9
#
# and of many features, 4608 x 512: 4.67 for 128 rows where the tile takes 5.46 for 64.
MEASURED_ROWS, MOST_MEASURED_ROWS = 64, 256
WGMMA_CAPABILITY = (9, 0)
FEW_TILES, SOME_TILES, MANY_TILES = 32, 64, 256  # of 16 features
LONG_DEPTH = 1024


def measured_shape(problem: Problem) -> Shape | None:
    """The shape that the table above says is best for so few rows; None where it says nothing."""
    rows, tiles, long = problem.rows, problem.feature_tiles, problem.depth > LONG_DEPTH
    if rows > MEASURED_ROWS:
        clusters = long and problem.capability == WGMMA_CAPABILITY  # linear_hopper.cu divides the depth over them
        if rows > MOST_MEASURED_ROWS or tiles > SOME_TILES or clusters:
            return None
        columns, feature_tiles = (
            (4, 1) if long and rows <= 2 * MEASURED_ROWS else (2, 2 if long or tiles > FEW_TILES else 4)
        )
    elif rows > 32 and tiles >= MANY_TILES and problem.capability == WGMMA_CAPABILITY:
        return None
    elif rows > 16 and tiles >= MANY_TILES:
        return next((tile for tile in tiles_of(problem) if (tile.features, tile.rows) == (64, 32)), None)
    elif rows <= 8 and tiles <= FEW_TILES:
        columns, feature_tiles = 1, 2
    elif (rows <= 8 and tiles <= SOME_TILES) or (rows <= 32 and long):
        columns, feature_tiles = 2, 1
    else:
        columns, feature_tiles = 2, 2
    shape = RowsShape(problem.depth, rows_warps(problem.depth), columns, feature_tiles, columns > 1)
    return shape if shape.fits(problem) else None


def best_shape(problem: Problem, rows_min: int, rows_max: int) -> Shape:
    """The shape for a range of rows: a measured one, or the one that is predicted to serve it best.

    At the least, the middle and the largest number of rows its predicted time is compared with that of the best there.
    """
    measured = measured_shape(problem._replace(rows=rows_max))
    if measured is not None:
        return measured
    samples = sorted({rows_min, int((rows_min * rows_max) ** 0.5), rows_max})
    problems = [problem._replace(rows=rows) for rows in samples]
    candidates = list(shapes(problem._replace(rows=rows_max)))
    least = [min(shape.clocks(p) for shape in candidates) for p in problems]
    return min(candidates, key=lambda s: sum(s.clocks(p) / best for p, best in zip(problems, least, strict=True)))

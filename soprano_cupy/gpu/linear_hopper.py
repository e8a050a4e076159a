"""Plans of linear products of many rows on Hopper: `kernels/linear_hopper.cu`, its tiles, and its tensor maps.

A variant is a compile-time shape of the kernel. `plan` takes the one with the shortest estimated time; the constants
of that estimate and the table stand here, to be tuned from measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..attention.hopper import driver_encodes, encode
from .launch import Launch
from .linear import DEPTH_STEP, DTYPE_DEFINES, TILE_FEATURES, End, LinearRequest

SOURCE = "linear_hopper.cu"
KERNEL = "linear_hopper"
CAPABILITY = (9, 0)  # wgmma and setmaxnreg exist on this architecture alone
LEAST_ROWS = 33  # below this the kernels without wgmma serve as well; linear_shapes.py knows where they are better

PRODUCT_FEATURES = 64  # of one wgmma
WARPGROUP = 128  # threads
FRAGMENT_DEPTH = 16
FRAGMENT_ELEMENTS = 256  # packed weights of 16 features and 16 columns, contiguous
ELEMENT_BYTES = 2
SUM_BYTES = 4
STAGING_BYTES = 10240  # of a warpgroup
FACTOR_SLOTS = 2
ALIGNMENT_BYTES = 1024
MAP_BYTES = 128
PARAMS_HEAD_BYTES = 128  # LinearParams, up to the first tensor map


@dataclass(frozen=True)
class Variant:
    """Compile-time shape of the kernel. A tile is `features` x `rows`."""

    groups: int  # tiles under way in a block, each in the hands of its own warpgroups
    warpgroups: int  # of a group
    products: int  # of 64 features, side by side in a warpgroup
    rows: int
    stages: int  # of the ring, 64 deep
    blocks: int = 1  # of a multiprocessor
    consumer_registers: int = 0  # 0: as launched
    producer_registers: int = 0
    splits: int = 1  # blocks of a cluster that divide the depth of one tile

    @property
    def features(self) -> int:
        return self.warpgroups * self.products * PRODUCT_FEATURES

    @property
    def consumers(self) -> int:
        return self.groups * self.warpgroups

    @property
    def threads(self) -> int:
        return (self.consumers + 1) * WARPGROUP

    @property
    def stage_bytes(self) -> int:
        return (self.features + self.rows) * DEPTH_STEP * ELEMENT_BYTES

    @property
    def landing_bytes(self) -> int:
        """Sums that a block gets from the others of its cluster."""
        return (self.splits - 1) * self.features * self.rows // self.splits * SUM_BYTES

    @property
    def shared_bytes(self) -> int:
        """Room to align, the ring, the staging areas, other blocks' sums, the norm's factors, the barriers."""
        ring = self.stages * self.stage_bytes + self.consumers * STAGING_BYTES
        barriers = 8 * (2 * self.stages + 2 * FACTOR_SLOTS + 1)
        return ALIGNMENT_BYTES + ring + self.landing_bytes + FACTOR_SLOTS * self.rows * SUM_BYTES + barriers

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold sums."""
        return self.products * self.rows // 2

    def __str__(self) -> str:
        parts = {"g": self.groups, "w": self.warpgroups, "s": self.stages, "b": self.blocks, "c": self.splits}
        return f"{self.features}x{self.rows} " + " ".join(f"{name}{count}" for name, count in parts.items())

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        return (
            ("GROUPS", self.groups),
            ("WARPGROUPS", self.warpgroups),
            ("PRODUCTS", self.products),
            ("TILE_ROWS", self.rows),
            ("STAGES", self.stages),
            ("BLOCKS", self.blocks),
            ("SPLITS", self.splits),
            ("CONSUMER_REGISTERS", self.consumer_registers),
            ("PRODUCER_REGISTERS", self.producer_registers),
        )


# Two warpgroups with 128 sums a thread take 224 registers each and leave 56; three take 152. One or two warpgroups with
# fewer sums fit twice into a multiprocessor: one block's ends and first loads then hide behind the other's products.
CANDIDATES = (
    Variant(1, 1, 1, 64, 6, 2),  # 64 x 64
    Variant(1, 1, 1, 64, 5, 2, 184, 56, splits=2),  # the same, the depth divided
    Variant(1, 1, 1, 64, 5, 2, splits=4),
    Variant(1, 1, 1, 128, 3, 2, 184, 56, splits=2),
    Variant(1, 1, 1, 128, 3, 2, 184, 56, splits=4),
    Variant(1, 1, 2, 64, 4, 2, 184, 56),  # 128 x 64
    Variant(1, 1, 1, 128, 4, 2, 184, 56),  # 64 x 128
    Variant(1, 2, 1, 64, 6, 1, 224, 56),  # 128 x 64, four stages and more for long depths
    Variant(1, 2, 1, 128, 6, 1, 224, 56),  # 128 x 128
    Variant(1, 3, 1, 128, 4, 1, 152, 56),  # 192 x 128
    Variant(2, 1, 1, 128, 7, 1, 224, 56),  # 64 x 128, two tiles
    Variant(2, 1, 2, 128, 6, 1, 224, 56),  # 128 x 128, two tiles
    Variant(2, 1, 1, 256, 4, 1, 224, 56),  # 64 x 256, two tiles
    Variant(1, 2, 1, 256, 4, 1, 224, 56),  # 128 x 256
    Variant(1, 3, 1, 192, 3, 1, 152, 56),  # 192 x 192
    # Long depths with few tiles: the larger the tile and the more blocks share its depth, the fewer bytes each of them
    # fetches, and the more sums it sends.
    Variant(1, 1, 1, 64, 5, 2, splits=8),  # 64 x 64
    Variant(1, 2, 1, 64, 7, 1, splits=2),  # 128 x 64
    Variant(1, 2, 1, 64, 7, 1, splits=4),
    Variant(1, 2, 1, 128, 5, 1, 224, 56, splits=2),  # 128 x 128
    Variant(1, 2, 1, 128, 4, 1, 224, 56, splits=4),
    Variant(1, 2, 1, 128, 4, 1, 224, 56, splits=8),
    # With room for more stages, where one block a multiprocessor is enough: what is on its way bounds what arrives.
    Variant(1, 1, 1, 64, 8, 1),  # 64 x 64
    Variant(1, 1, 1, 64, 10, 1, splits=2),
    Variant(1, 1, 1, 64, 9, 1, splits=4),
)

# The estimate, in cycles of a multiprocessor.
PRODUCTS_A_CYCLE = 2048  # multiply-adds, 16-bit
SHARED_BYTES_A_CYCLE = 128.0  # read by products and written by copies
LOADED_BYTES_A_CYCLE = 48.0  # from the L2 cache into shared memory
USABLE = {1: 1.0, 2: 1.0, 4: 0.97, 8: 0.85}  # share of the multiprocessors: a cluster lies within one of their groups
ROUND_CYCLES = 1700.0  # from a stage's release to the next bytes in it
START_CYCLES = 1800.0  # until the first product: barriers, the first copies
TURN_CYCLES = 300.0  # between the tiles of a block
MERGE_CYCLES = 700.0  # until the last of a cluster's sums is there
SENT_BYTES_A_CYCLE = 32.0  # between the blocks of a cluster
CYCLES_A_MICROSECOND = 1600.0
END_CYCLES = {End.STORE: 0.10, End.SWIGLU: 0.10, End.RESIDUAL: 0.20, End.GELU: 0.15, End.ADD: 0.15}  # of one element
END_LATENCY_CYCLES = 800.0


def refusal(request: LinearRequest) -> str | None:
    """Why this kernel cannot serve the request, as one line; None when it can."""
    if request.capability != CAPABILITY:
        return f"wgmma needs compute capability 9.0, not {request.capability[0]}.{request.capability[1]}"
    if request.dtype not in DTYPE_DEFINES:
        return f"the Hopper product takes float16 and bfloat16, not {request.dtype}"
    if request.most_rows < LEAST_ROWS:
        return f"{request.most_rows} rows are fewer than the {LEAST_ROWS} that pay"
    if request.weights % 16 or request.input % 16 or request.input_stride % 8:
        return "weights, input and the input's rows must begin at multiples of 16 bytes"
    if request.end in (End.RESIDUAL, End.ADD) and (request.residual % 16 or request.residual_stride % 4):
        return "the residual's rows must begin at multiples of 16 bytes"
    step = {End.GELU: 8, End.SWIGLU: 8, End.RESIDUAL: 4}.get(request.end, 1)
    if request.output % 16 or request.output_stride % step:
        return f"the output's rows must begin at multiples of {step} elements"
    return None


def serves(variant: Variant, request: LinearRequest) -> bool:
    """Whether the variant has registers enough for the end, and the depth something for every block of a cluster."""
    many, wide = variant.consumers > 2, variant.accumulators > 64
    if request.end == End.RESIDUAL and (many or wide or variant.products > 1):
        return False
    if request.end in (End.GELU, End.ADD) and many and wide:
        return False
    halves = variant.splits == 2 and variant.accumulators > 32  # what is sent, what is kept, and the stream before
    if halves and (request.end == End.ADD or (request.end == End.RESIDUAL and variant.consumers < 2)):
        return False
    matrices_rows = {End.GELU: 16, End.SWIGLU: 32}.get(request.end, 8)  # that the end takes at a time
    return request.padded_depth // DEPTH_STEP >= variant.splits and variant.rows // variant.splits >= matrices_rows


def stage_cycles(variant: Variant) -> float:
    """What 64 of the depth take: the products, their shared memory, or the way there. Each product of 64 features reads
    all rows of the stage again, and its own weights."""
    multiply = variant.features * variant.rows * DEPTH_STEP / PRODUCTS_A_CYCLE
    products = variant.features // PRODUCT_FEATURES
    read = products * (variant.rows + PRODUCT_FEATURES) * DEPTH_STEP * ELEMENT_BYTES
    shared = (read + variant.stage_bytes) / SHARED_BYTES_A_CYCLE
    return max(multiply, shared, variant.stage_bytes / LOADED_BYTES_A_CYCLE)


def estimate(variant: Variant, request: LinearRequest) -> float:
    """Microseconds, roughly: what the table is ordered by."""
    columns, rows = -(-request.features // variant.features), -(-request.most_rows // variant.rows)
    blocks = columns * rows * variant.splits
    usable = int(request.multiprocessors * USABLE[variant.splits])
    turns = -(-blocks // (usable * variant.blocks))
    sharing = min(variant.blocks, -(-blocks // request.multiprocessors))  # blocks at work on a multiprocessor
    steps = -(-request.padded_depth // DEPTH_STEP // variant.splits)
    waited = ROUND_CYCLES / variant.stages if steps > variant.stages else 0.0
    main = steps * max(stage_cycles(variant) * sharing, waited)
    end = variant.features * variant.rows * END_CYCLES[request.end] / variant.splits + END_LATENCY_CYCLES
    hidden = variant.groups > 1 or sharing > 1
    body = turns * (max(main, end) if hidden else main + end) + (end if hidden else 0.0)
    merge = MERGE_CYCLES + sharing * variant.landing_bytes / SENT_BYTES_A_CYCLE if variant.splits > 1 else 0.0
    again = TURN_CYCLES if variant.splits == 1 else START_CYCLES  # a cluster ends behind its tile, and another starts
    return (START_CYCLES + body + merge + (turns - 1) * again) / CYCLES_A_MICROSECOND


# Where the estimate is off, by what an H200 took, in microseconds, with cuBLAS beside it:
#
#     RESIDUAL   128 x 512 x 512     64x64 c4 2.50    64x64 c2 2.64     cuBLAS 3.14
#     RESIDUAL   256 x 512 x 512     64x64 c2 2.87    64x64 c4 4.64     cuBLAS 3.19
#     RESIDUAL   512 x 512 x 512     64x64 c2 3.24    64x64 3.50        cuBLAS 3.42
#     RESIDUAL   1024 x 512 x 512    64x64 4.05       64x64 b2 c2 4.46  cuBLAS 3.54
#     RESIDUAL   128 x 512 x 2304    64x64 c4 3.91    64x64 c8 4.04     cuBLAS 5.90
#     RESIDUAL   256 x 512 x 2304    64x64 c2 4.95    64x64 c4 7.62     cuBLAS 5.92
#     RESIDUAL   512 x 512 x 2304    64x64 c2 5.94    64x64 c8 7.21     cuBLAS 6.80
#     RESIDUAL   1024 x 512 x 2304   128x64 c2 8.32   64x64 8.49        cuBLAS 6.95
#     RESIDUAL   2048 x 512 x 2304   64x128 g2 11.7   128x64 11.8       cuBLAS 10.0
#     RESIDUAL   4096 x 512 x 512    64x128 g2 9.14   128x64 10.3       cuBLAS 5.84
#     RESIDUAL   4096 x 512 x 2304   128x128 19.6     64x128 g2 22.4    cuBLAS 14.6
#     SWIGLU     128 x 4608 x 512    64x64 4.24       128x64 4.49       cuBLAS 4.67
#     SWIGLU     1024 x 4608 x 512   192x128 13.2     128x128 g2 13.9   cuBLAS 9.47
#     SWIGLU     2048 x 4608 x 512   192x192 18.2     192x128 19.2      cuBLAS 17.7
#     SWIGLU     4096 x 4608 x 512   192x192 35.5     192x128 38.5      cuBLAS 34.2
#     GELU       8448 x 2304 x 768   64x256 g2 60.6   192x128 62.2      cuBLAS 46.6
#     STORE      128 x 768 x 512     64x64 c2 2.59    64x64 2.72        cuBLAS 3.10
#     STORE      512 x 768 x 512     64x64 3.32       128x64 3.77       cuBLAS 3.41
#     STORE      1024 x 768 x 512    64x64 b2 4.14    128x64 4.29       cuBLAS 3.81
#     STORE      128 x 8192 x 512    64x128 g2 6.17   128x64 6.24       cuBLAS 5.52
#     STORE      8192 x 2050 x 768   64x128 g2 57.3   64x256 g2 64.6    cuBLAS 151
#
# So for an end, features and rows from and to, and a least depth; the first line that fits:
FEW, MORE, MANY, ANY = (1, 768), (769, 4095), (4096, 1 << 30), 1 << 30
MEASURED = (
    (End.RESIDUAL, FEW, (1, 128), 0, "64x64 g1 w1 s9 b1 c4"),
    (End.RESIDUAL, FEW, (129, 512), 0, "64x64 g1 w1 s10 b1 c2"),
    (End.RESIDUAL, FEW, (513, 1024), 0, "64x64 g1 w1 s8 b1 c1"),
    (End.RESIDUAL, FEW, (3072, ANY), 1024, "128x128 g1 w2 s6 b1 c1"),
    (End.RESIDUAL, FEW, (1025, ANY), 0, "64x128 g2 w1 s7 b1 c1"),
    (End.STORE, FEW, (1, 256), 0, "64x64 g1 w1 s10 b1 c2"),
    (End.STORE, FEW, (257, 512), 0, "64x64 g1 w1 s8 b1 c1"),
    (End.STORE, FEW, (513, 1024), 0, "64x64 g1 w1 s6 b2 c1"),
    (End.STORE, MORE, (4096, ANY), 0, "64x128 g2 w1 s7 b1 c1"),
    (End.STORE, MANY, (65, 128), 0, "64x128 g2 w1 s7 b1 c1"),
    (End.SWIGLU, MANY, (1, 128), 0, "64x64 g1 w1 s6 b2 c1"),
    (End.SWIGLU, MANY, (513, 1024), 0, "192x128 g1 w3 s4 b1 c1"),
    (End.SWIGLU, MANY, (1025, ANY), 0, "192x192 g1 w3 s3 b1 c1"),
    (End.GELU, MORE, (4096, ANY), 0, "64x256 g2 w1 s4 b1 c1"),
)


def measured(request: LinearRequest) -> str | None:
    """The name of the variant that the table above says is best; None where it says nothing."""
    for end, features, rows, depth, name in MEASURED:
        fits = features[0] <= request.features <= features[1] and rows[0] <= request.most_rows <= rows[1]
        if end is request.end and fits and request.depth >= depth:
            return name
    return None


def choose(request: LinearRequest) -> Variant:
    """The variant that was measured to be best, else that with the shortest estimated time."""
    name = measured(request)
    found = [variant for variant in CANDIDATES if str(variant) == name and serves(variant, request)]
    return found[0] if found else min((v for v in CANDIDATES if serves(v, request)), key=lambda v: estimate(v, request))


def plan(request: LinearRequest, variant: Variant | None = None) -> Launch | None:
    """The launch of a product; None where `refusal` names a reason.

    variant: instead of the chosen one. The input's map covers `request.most_rows` rows: the buffer must have them,
    whatever they hold. Where there is no CUDA driver the maps are blank, and the launch is fit for compiling only.
    """
    if refusal(request) is not None:
        return None
    variant = variant or choose(request)
    tiles = -(-request.features // variant.features) * -(-request.most_rows // variant.rows)
    most = request.multiprocessors * variant.blocks if variant.splits == 1 else tiles
    blocks = min(tiles, most) * variant.splits
    return Launch(
        source=SOURCE,
        kernel=KERNEL,
        defines=(*request.defines, *variant.defines),
        grid=(blocks, 1, 1),
        threads=variant.threads,
        shared_bytes=variant.shared_bytes,
        params=request.params().ljust(PARAMS_HEAD_BYTES, b"\0") + b"".join(_maps(request, variant)),
        fields=request.fields(),
        specific=True,
        cluster=variant.splits,
    )


def _maps(request: LinearRequest, variant: Variant) -> tuple[bytes, bytes]:
    """Records of the tensor maps of the input and of the weights. Columns past the true depth arrive as zeros."""
    if not driver_encodes():
        return bytes(MAP_BYTES), bytes(MAP_BYTES)
    fragments, run_bytes = request.padded_depth // FRAGMENT_DEPTH, FRAGMENT_ELEMENTS * ELEMENT_BYTES
    rows = encode(
        request.input,
        request.dtype,
        (request.depth, request.most_rows),
        (request.input_stride * ELEMENT_BYTES,),
        (DEPTH_STEP, variant.rows),
    )
    weights = encode(
        request.weights,
        request.dtype,
        (FRAGMENT_ELEMENTS, fragments, request.feature_tiles),
        (run_bytes, fragments * run_bytes),
        (FRAGMENT_ELEMENTS, DEPTH_STEP // FRAGMENT_DEPTH, variant.features // TILE_FEATURES),
        swizzled=False,
    )
    return rows.tobytes(), weights.tobytes()

"""Linear products with their fused ends on one GPU, against cuBLAS in the same run.

    python benchmarks/linear.py [--rows 1,8,64,...] [--only qkv,down,...] [--sweep] [--dtype float16] [--out FILE]

Each product is checked against CuPy in float32, then timed: microseconds of one launch inside a replayed CUDA graph
whose launches follow each other as in a decode step (programmatic dependent launches where the GPU has them) and rotate
through copies of the weights that together exceed the L2 cache. TFLOP/s and GB/s come with their share of what this GPU
reaches with a large cuBLAS product and a large copy. `peer` is cupy.matmul alone, without norm, bias or end, launched
from Python: at few rows its time is Python's.

--sweep times every shape that could serve and prints, for each product and number of rows, the best one beside the one
that the planner takes; from it the constants of soprano_cupy/gpu/linear_shapes.py are set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Row, Timing, free_memory, gpu_limits, machine_facts, time_eager, write_results
from soprano_cupy.cuda.module import device_facts
from soprano_cupy.gpu.launch import Launch
from soprano_cupy.gpu.linear import End, LinearRequest, plan_linear, plan_shape, problem_of
from soprano_cupy.gpu.linear_shapes import shapes
from soprano_cupy.gpu.packing import interleave_gate_up, pack_linear
from soprano_cupy.gpu.program import Graph, load_program

L2_BYTES = 128 << 20  # weights of one rotation: more than any GPU's L2 cache
MOST_COPIES, FEWEST_LAUNCHES = 256, 16
EPSILON = 1e-6
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
MAX_RELATIVE_ERROR = 1e-2


@dataclass(frozen=True)
class Product:
    end: End
    features: int
    depth: int
    norm: bool = False

    @property
    def columns(self) -> int:
        return self.features // 2 if self.end is End.SWIGLU else self.features


PRODUCTS = {
    "qkv": Product(End.STORE, 768, 512, norm=True),
    "o": Product(End.RESIDUAL, 512, 512),
    "gate_up": Product(End.SWIGLU, 4608, 512, norm=True),
    "down": Product(End.RESIDUAL, 512, 2304),
    "head": Product(End.STORE, 8192, 512, norm=True),
    "widen": Product(End.GELU, 2304, 768),
    "narrow": Product(End.ADD, 768, 2304),
    "spectrum": Product(End.STORE, 2050, 768),
}


@dataclass
class Arrays:
    """One product's data on the device: `copies` of its packed weights, one set of activations."""

    product: Product
    rows: int
    dtype: Any
    most_copies: int = MOST_COPIES
    weights: Any = field(init=False)  # (features, depth), gate and up one after the other
    packed: Any = field(init=False)  # (copies, elements)

    def __post_init__(self) -> None:
        import cupy as cp

        p, rows = self.product, self.rows

        def normal(*shape: int) -> Any:
            return cp.random.standard_normal(shape, dtype=cp.float32)

        self.weights = (normal(p.features, p.depth) / np.sqrt(p.depth)).astype(self.dtype)
        merged = self.weights
        if p.end is End.SWIGLU:
            merged = interleave_gate_up(merged[: p.columns], merged[p.columns :], cp)
        one = pack_linear(merged, cp)
        copies = max(2, min(self.most_copies, -(-L2_BYTES // one.nbytes)))
        self.packed = cp.repeat(one[None], copies, axis=0)
        self.input = normal(rows, p.depth).astype(self.dtype)
        self.square_sums = cp.abs(normal(rows, p.depth // 16)) * 16
        self.residual = normal(rows, p.columns)
        self.gain, self.next_sums = normal(p.columns), cp.empty((rows, -(-p.features // 16)), cp.float32)
        self.stride = -(-p.columns // 4) * 4
        kind = cp.float32 if p.end in (End.STORE, End.ADD) else self.dtype
        self.output = cp.zeros((rows, self.stride), kind)

    def request(self, copy: int) -> LinearRequest:
        p, facts = self.product, device_facts(0)
        residual = p.end in (End.RESIDUAL, End.ADD)
        return LinearRequest(
            end=p.end, dtype=np.dtype(self.dtype).name, capability=facts.capability,
            multiprocessors=facts.multiprocessors, rows=self.rows, features=p.features, depth=p.depth,
            weights=self.packed[copy].data.ptr, input=self.input.data.ptr, input_stride=p.depth,
            output=self.output.data.ptr, output_stride=self.stride, epsilon=EPSILON,
            square_sums=self.square_sums.data.ptr if p.norm else 0,
            residual=self.residual.data.ptr if residual else 0, residual_stride=p.columns if residual else 0,
            next_gain=self.gain.data.ptr if p.end is End.RESIDUAL else 0,
            next_square_sums=self.next_sums.data.ptr if p.end is End.RESIDUAL else 0,
        )  # fmt: skip

    def expected(self, rows: slice) -> Any:
        """The output of some rows in float32, by CuPy."""
        import cupy as cp

        p = self.product
        y = self.input[rows].astype(cp.float32) @ self.weights.astype(cp.float32).T
        scale = 0.0625 if np.dtype(self.dtype) == np.float16 else 1.0
        if p.norm:
            y /= scale * cp.sqrt(self.square_sums[rows].sum(1, keepdims=True) / p.depth + EPSILON)
        if p.end is End.SWIGLU:
            gate, up = y[:, : p.columns], y[:, p.columns :]
            return gate / (1 + cp.exp(-gate)) * up
        if p.end is End.GELU:
            gelu = cp.ElementwiseKernel(
                "float32 x", "float32 y", "y = 0.5f * x * (1.0f + erff(x * 0.70710678f))", "gelu"
            )
            return gelu(y)
        if p.end is End.STORE:
            return y
        y += self.residual[rows]
        return y * self.gain * scale if p.end is End.RESIDUAL else y

    def check(self, launch: Launch) -> None:
        """Ends the run where the kernel's first or last rows are wrong: a wrong result's time means nothing."""
        import cupy as cp

        rows = slice(max(0, self.rows - 300), self.rows)
        expected, stream = self.expected(rows), cp.cuda.Stream(non_blocking=True)
        cp.cuda.get_current_stream().synchronize()
        before = self.residual.copy()
        load_program([launch], 0).run(stream.ptr)
        stream.synchronize()
        ours = self.output[rows, : self.product.columns].astype(cp.float32)
        error = float(cp.linalg.norm(ours - expected) / cp.linalg.norm(expected))
        self.residual[...] = before
        if not error < MAX_RELATIVE_ERROR:
            raise SystemExit(f"{launch.kernel} {launch.defines}: WRONG RESULT, relative error {error:.3g}")

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.product.features * self.product.depth

    @property
    def moved_bytes(self) -> float:
        """Weights, input and output once; the residual stream twice."""
        streams = 2 * self.residual.nbytes if self.product.end is End.RESIDUAL else 0
        streams += self.residual.nbytes if self.product.end is End.ADD else 0
        return float(self.packed[0].nbytes + self.input.nbytes + self.output.nbytes + streams)


def time_launches(launches: Sequence[Launch]) -> Timing:
    """Microseconds of one launch among those of a replayed graph."""
    import cupy as cp

    many = list(launches) * max(1, -(-FEWEST_LAUNCHES // len(launches)))
    stream = cp.cuda.Stream(non_blocking=True)
    program = load_program(many, 0)
    with Graph(stream.ptr) as graph:
        program.run(stream.ptr)
    with stream:
        graph.upload(stream.ptr)
        total = time_eager(lambda: graph.launch(stream.ptr), milliseconds=20.0)
    n = len(many)
    return Timing(total.median / n, total.p99 / n, total.repeats, total.best / n)


def time_cublas(arrays: Arrays) -> Timing:
    """cupy.matmul of the same input and weights, twenty calls between two events."""
    import cupy as cp

    transposed = arrays.weights.T
    out = cp.empty((arrays.rows, arrays.product.features), arrays.dtype)

    def twenty() -> None:
        for _ in range(20):
            cp.matmul(arrays.input, transposed, out=out)

    total = time_eager(twenty, milliseconds=20.0)
    return Timing(total.median / 20, total.p99 / 20, total.repeats, total.best / 20)


def candidates(request: LinearRequest) -> Iterator[tuple[str, Launch]]:
    """Every launch that could serve, by a name."""
    for shape in shapes(problem_of(request)):
        yield f"{shape.kernel} {'x'.join(str(value) for _, value in shape.defines)}", plan_shape(request, shape)
    if request.capability == (9, 0):
        from soprano_cupy.gpu import linear_hopper

        launch = linear_hopper.plan(request)
        if launch is not None:
            yield f"linear_hopper {'x'.join(str(value) for _, value in launch.defines[4:])}", launch


def launch_name(launch: Launch) -> str:
    return f"{launch.kernel} {'x'.join(str(value) for _, value in launch.defines[4:])}"


class Benchmark:
    """The run: rows of the result in the order measured, printed as they come."""

    def __init__(self, dtype: Any, limits: dict[str, float]) -> None:
        self.dtype, self.limits = dtype, limits
        self.rows: list[Row] = []
        self.checks = 0

    def measure(self, name: str, product: Product, rows: int) -> None:
        arrays = Arrays(product, rows, self.dtype)
        launches = [plan_linear(arrays.request(i)) for i in range(len(arrays.packed))]
        arrays.check(launches[0])
        self.checks += 1
        ours, peer = time_launches(launches), time_cublas(arrays)
        limit = max(
            arrays.flops / self.limits["matmul_tflop_s"], arrays.moved_bytes / self.limits["copy_tb_s"]
        ) / 1e6  # fmt: skip
        self.rows.append(
            Row(
                f"{name}/R{rows}",
                ours.median,
                "us",
                ours.repeats,
                ours.p99,
                limit,
                limit / ours.median,
                {"cublas": peer.median},
            )
        )
        tflops, gigabytes = arrays.flops / ours.median / 1e6, arrays.moved_bytes / ours.median / 1e3
        show(
            f"{name:9} {rows:6} rows {ours.median:9.2f} us {tflops:7.1f} TFLOP/s {gigabytes:7.0f} GB/s "
            f"{100 * limit / ours.median:5.1f} % of the limit; cuBLAS {peer.median:9.2f} us; {launch_name(launches[0])}"
        )

    def sweep(self, name: str, product: Product, rows: int) -> None:
        arrays = Arrays(product, rows, self.dtype, most_copies=64)
        planned = plan_linear(arrays.request(0))
        times = {}
        for shape_name, launch in candidates(arrays.request(0)):
            arrays.check(launch)
            self.checks += 1
            launches = [dict(candidates(arrays.request(i)))[shape_name] for i in range(len(arrays.packed))]
            times[shape_name] = time_launches(launches).median
        ordered = sorted(times, key=lambda key: times[key])
        chosen = times.get(launch_name(planned), float("nan"))
        show(f"{name:9} {rows:6} rows; planned {launch_name(planned)} {chosen:.2f} us")
        for shape_name in ordered:
            tflops = arrays.flops / times[shape_name] / 1e6
            show(f"    {times[shape_name]:9.2f} us {tflops:7.1f} TFLOP/s  {shape_name}")


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of rows")
    parser.add_argument("--only", default=",".join(PRODUCTS), help="products")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--sweep", action="store_true", help="time every shape instead of the planned one")
    parser.add_argument("--out", type=Path, help="write a result file")
    options = parser.parse_args()

    import ml_dtypes

    limits = gpu_limits()
    show(" ".join(f"{name} {value:.3g}" for name, value in limits.items()))
    benchmark = Benchmark(np.float16 if options.dtype == "float16" else ml_dtypes.bfloat16, limits)
    for name in options.only.split(","):
        for rows in map(int, options.rows.split(",")):
            (benchmark.sweep if options.sweep else benchmark.measure)(name, PRODUCTS[name], rows)
            free_memory()
    if options.out:
        write_results(options.out, "linear", machine_facts(gpu=True), limits, benchmark.rows, benchmark.checks)


if __name__ == "__main__":
    main()

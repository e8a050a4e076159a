"""What every benchmark shares: facts of the machine, its limits, timing, and the result file.

A result file is `benchmarks/results/<machine>-<what>.json`; one run writes one file. Rows hold microseconds (or the
unit they name), medians over `repeats`, next to the machine's limit and to peers measured in the same run.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """One line of a result file; fields that are None are left out. `limit` is in the row's own unit."""

    case: str
    value: float
    unit: str
    repeats: int
    p99: float | None = None
    limit: float | None = None
    share_of_limit: float | None = None
    peer: dict[str, float] = field(default_factory=dict)
    peak_extra_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: _rounded(value) for name, value in asdict(self).items() if value is not None and value != {}}


def _rounded(value: Any) -> Any:
    """Numbers to five digits, those of peers too."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    median: float
    p99: float
    repeats: int
    best: float


def timing(samples: Sequence[float]) -> Timing:
    """Median and 99th percentile (nearest rank) of samples."""
    ordered = sorted(samples)
    count = len(ordered)
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return Timing(middle, ordered[min(count - 1, -(-99 * count // 100) - 1)], count, ordered[0])


def time_host(call: Callable[[], object], *, seconds: float = 1.0, least: int = 5) -> Timing:
    """Wall-clock microseconds of a call that runs on the CPU, after one warm-up."""
    call()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return timing(samples)


# ---- the GPU ----


def time_graph(calls: Sequence[Callable[[], object]], *, milliseconds: float = 20.0) -> Timing:
    """GPU microseconds of one call: the calls, run once and then captured in one CUDA graph, replayed and divided.

    The calls run one after the other on one stream; each may use inputs of its own, so that the L2 cache does not
    serve what memory should.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for call in calls:
            call()
        stream.synchronize()
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()
        graph.upload()
        return _time_events(graph.launch, len(calls), milliseconds)


def time_eager(call: Callable[[], object], *, milliseconds: float = 50.0) -> Timing:
    """GPU microseconds from one call's start to the next one's, launched from Python."""
    return _time_events(call, 1, milliseconds)


def _time_events(launch: Callable[[], object], calls: int, milliseconds: float) -> Timing:
    """Events around single launches, as many as fill the time."""
    import cupy

    first = _elapsed([_timed(launch) for _ in range(3)])[-1]
    repeats = max(10, min(200, int(milliseconds * 1000 / max(first, 1.0))))
    samples = _elapsed([_timed(launch) for _ in range(repeats)])
    cupy.cuda.get_current_stream().synchronize()
    return timing([sample / calls for sample in samples])


def _timed(launch: Callable[[], object]) -> tuple[Any, Any]:
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    launch()
    end.record()
    return start, end


def _elapsed(events: list[tuple[Any, Any]]) -> list[float]:
    """Microseconds between pairs of events, once the last has happened."""
    import cupy

    events[-1][1].synchronize()
    return [cupy.cuda.get_elapsed_time(start, end) * 1000 for start, end in events]


def foreign_stream(pointer: int) -> Any:
    """CuPy's view of a stream made by another library."""
    import cupy

    if not hasattr(cupy.cuda.Stream, "from_external"):  # before CuPy 14
        return cupy.cuda.ExternalStream(pointer)

    class Foreign:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, pointer  # version of the protocol, handle

    return cupy.cuda.Stream.from_external(Foreign())


def gpu_limits() -> dict[str, float]:
    """What this GPU reaches at best: a large copy (bytes read and written), a bfloat16 product of random numbers."""
    limits = {"copy_tb_s": _copy_tb_s(), "matmul_tflop_s": _matmul_tflop_s()}
    free_memory()
    return limits


def _copy_tb_s() -> float:
    import cupy

    size_bytes = min(4 << 30, int(cupy.cuda.runtime.memGetInfo()[0]) // 4)
    source, target = cupy.zeros(size_bytes, cupy.uint8), cupy.zeros(size_bytes, cupy.uint8)
    copy = time_eager(lambda: target.data.copy_from_device_async(source.data, size_bytes), milliseconds=100)
    return 2 * size_bytes / copy.best / 1e6


def _matmul_tflop_s(n: int = 8192) -> float:
    import cupy
    import ml_dtypes

    a, b = (cupy.random.standard_normal((n, n), dtype=cupy.float32).astype(ml_dtypes.bfloat16) for _ in range(2))
    product = time_eager(lambda: cupy.matmul(a, b), milliseconds=100)
    return float(2 * n**3 / product.best / 1e6)  # under a lasting load its clocks fall, a kernel's alone would not


def free_memory() -> None:
    """Hand the memory that CuPy keeps back to the GPU."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Device memory that a call takes beyond its inputs and its result, by a memory pool of its own."""
    import cupy

    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        result = call()
        cupy.cuda.get_current_stream().synchronize()
        peak = int(pool.total_bytes())
        return max(0, peak - int(result.nbytes))


# ---- the machine and the result file ----


def machine_facts(*, gpu: bool) -> dict[str, Any]:
    """The head of a result file."""
    facts: dict[str, Any] = {"machine": cpu_name(), "gpu": None, "driver": None, "cuda": None, "cupy": None}
    if gpu:
        import cupy

        index = cupy.cuda.runtime.getDevice()
        name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
        runtime = cupy.cuda.runtime.runtimeGetVersion()
        facts |= {
            "machine": gpu_label(name),
            "gpu": name,
            "driver": _output("nvidia-smi", f"--id={index}", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": f"{runtime // 1000}.{runtime % 1000 // 10}",
            "cupy": cupy.__version__,
        }
    # a copy of the files without their history can be told where it comes from
    commit = os.environ.get("SOPRANO_COMMIT") or _output(
        "git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude=*"
    )
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return facts | {"python": platform.python_version(), "commit": commit, "date": today}


def gpu_label(name: str) -> str:
    """A short file-name part: "NVIDIA H200" -> "h200", "NVIDIA GeForce RTX 4090" -> "rtx-4090"."""
    words = re.sub(r"nvidia|geforce|\b\d+gb\b|hbm\w*|pcie|sxm\w*", " ", name.lower())
    return "-".join(re.findall(r"[a-z0-9]+", words)) or "gpu"


def cpu_name() -> str:
    """The processor's model and how many cores this process may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"model name\s*:\s*(.+)", text)
    return f"{match[1] if match else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def _output(*command: str) -> str | None:
    """The first line that a command prints; None when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)


def write_results(
    path: Path, what: str, facts: dict[str, Any], limits: dict[str, float], rows: Sequence[Row], checks: int
) -> None:
    """Write a result file whole or not at all."""
    result = {
        "what": what,
        **facts,
        "checks": f"passed {checks}",
        "limits": _rounded(limits),
        "rows": [row.as_json() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sys.stdout.write(f"wrote {path}\n")

"""Runs the CUDA kernels' own source on the CPU.

The source is compiled by the host's C++ compiler against `kernels/emulation/device.cuh`, which turns every thread
into a fiber and checks what a GPU would only sometimes show: races, accesses out of bounds, lanes that diverge,
barriers that are never reached, copies read before they landed (`kernels/emulation/machine.hpp`).

    library = emulation.build("attention_prefill.cu", {"HEAD_DIM": 64, "GROUP": 4, "CAUSAL": 1, "DTYPE_BF16": 1})
    params, buffers = emulation.attention_params(q, k, v, out, lse, ...)
    library.launch("attention_prefill", params, grid=(4, 1, 1), threads=128, shared_bytes=49152, buffers=buffers)
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
EMULATION = KERNELS / "emulation"
# Contraction off: a fused multiply-add happens where the source asks for one, as the tests' derivations assume.
COMPILE_FLAGS = (
    "-std=c++17",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-unused-const-variable",
)


class EmulationError(AssertionError):
    """The emulated machine stopped the kernel: a race, a bad address, divergence or a deadlock."""


class AttentionParams(ctypes.Structure):
    """`kernels/attention_params.cuh`, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse")]
        + [(name, ctypes.c_void_p) for name in ("cu_seqlens_q", "cu_seqlens_k", "kv_lengths")]
        + [
            (f"{array}_{axis}_stride", ctypes.c_longlong)
            for array in ("q", "k", "v", "out")
            for axis in ("batch", "token", "head")
        ]
        + [("workspace", ctypes.c_void_p)]
        + [
            (name, ctypes.c_int)
            for name in ("batch", "total_q", "seqlen_q", "seqlen_k", "num_heads", "num_kv_heads", "splits")
        ]
        + [("scale_log2", ctypes.c_float)]
    )


class _Buffer(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("writable", ctypes.c_int)]


class _Options(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("cluster", ctypes.c_uint),
        ("reverse", ctypes.c_int),
        ("skip_barrier", ctypes.c_int),
        ("skip_wait", ctypes.c_int),
        ("skip_warp_barrier", ctypes.c_int),
        ("num_buffers", ctypes.c_int),
        ("buffers", ctypes.POINTER(_Buffer)),
    ]


@dataclass(frozen=True)
class Buffer:
    """Global memory that a kernel may read, and write where `writable`."""

    array: np.ndarray[Any, Any]
    writable: bool = False


@dataclass(frozen=True)
class KernelLibrary:
    """One kernel source built for the host with one set of compile-time constants."""

    library: ctypes.CDLL

    def launch(
        self,
        kernel: str,
        params: ctypes.Structure | bytes,
        *,
        grid: Sequence[int],
        threads: int,
        shared_bytes: int,
        buffers: Sequence[Buffer] = (),
        cluster: int = 1,
        reverse: bool = False,
        skip_barrier: int = -1,
        skip_wait: int = -1,
        skip_warp_barrier: int = -1,
    ) -> None:
        """Run a grid to its end; EmulationError where the kernel does what it must not.

        params: the kernel's one struct. `skip_*` = n makes every thread ignore its n-th barrier, wait for copies, or
        warp barrier: sabotage, to show that the fault is caught. Without `buffers`, global accesses are not checked.
        """
        table = (_Buffer * max(1, len(buffers)))(
            *[_Buffer(b.array.ctypes.data, b.array.nbytes, int(b.writable)) for b in buffers]
        )
        options = _Options(
            (ctypes.c_uint * 3)(*grid),
            threads,
            shared_bytes,
            cluster,
            int(reverse),
            skip_barrier,
            skip_wait,
            skip_warp_barrier,
            len(buffers),
            table,
        )
        block, message = bytes(params), ctypes.create_string_buffer(1024)
        entry = ctypes.cast(getattr(self.library, kernel), ctypes.c_void_p)
        if self.library.emulation_launch(
            entry,
            block,
            ctypes.c_size_t(len(block)),
            ctypes.byref(options),
            message,
            ctypes.c_size_t(len(message)),
        ):
            raise EmulationError(message.value.decode())


@functools.cache
def _build_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="soprano-emulation-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _compile(arguments: Sequence[str]) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed, so the kernels cannot be built for the host")
    done = subprocess.run([compiler, *COMPILE_FLAGS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EmulationError(f"g++ {' '.join(arguments)} failed:\n{done.stderr}")


@functools.cache
def _machine_object() -> Path:
    """The emulated machine itself, compiled once for the session: its parts linked into one object."""
    target = _build_folder() / "machine.o"
    _compile(["-O2", "-r", *map(str, sorted(EMULATION.glob("machine*.cpp"))), "-o", str(target)])
    return target


def build(source: str | Path, defines: Mapping[str, int | str], arch: int = 800) -> KernelLibrary:
    """Build a kernel source (a name in kernels/, or a path) as `__CUDA_ARCH__ == arch`; kept for the session."""
    return _build(str(source), tuple(sorted((name, str(value)) for name, value in defines.items())), arch)


@functools.cache
def _build(source: str, defines: tuple[tuple[str, str], ...], arch: int) -> KernelLibrary:
    digest = hashlib.sha256(repr((source, defines, arch)).encode()).hexdigest()[:16]
    target = _build_folder() / f"{Path(source).stem}-{digest}.so"
    _compile(
        [
            "-O1",
            "-shared",
            "-include",
            str(EMULATION / "device.cuh"),
            f"-I{KERNELS}",
            f"-D__CUDA_ARCH__={arch}",
            *(f"-D{name}={value}" for name, value in defines),
            "-x",
            "c++",
            str(KERNELS / source),
            "-x",
            "none",
            str(_machine_object()),
            "-o",
            str(target),
        ]
    )
    return KernelLibrary(ctypes.CDLL(str(target)))


def poisoned(shape: Sequence[int], dtype: Any, guard: int = 64) -> np.ndarray[Any, Any]:
    """A NaN-filled array inside a larger NaN-filled one: neighbours in memory are NaN too. Aligned to 16 bytes.

    Bytes are all ones, which is NaN in every floating-point type.
    """
    count = math.prod(shape)
    itemsize = np.dtype(dtype).itemsize
    filling = 255 if np.dtype(dtype) == np.uint8 else np.nan
    storage = np.full(count + 2 * guard + 16 // itemsize, filling, dtype=dtype)
    start = guard + (-(storage.ctypes.data // itemsize + guard)) % (16 // itemsize)
    return storage[start : start + count].reshape(shape)


def attention_params(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    out: np.ndarray[Any, Any],
    *,
    lse: np.ndarray[Any, Any] | None = None,
    cu_seqlens_q: np.ndarray[Any, Any] | None = None,
    cu_seqlens_k: np.ndarray[Any, Any] | None = None,
    kv_lengths: np.ndarray[Any, Any] | None = None,
    workspace: np.ndarray[Any, Any] | None = None,
    scale: float | None = None,
    splits: int = 1,
) -> tuple[AttentionParams, list[Buffer]]:
    """Parameters and the checked buffers of one call.

    q and out: (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) with `cu_seqlens_q`; k and v likewise
    with `cu_seqlens_k`. Any strides with a contiguous last axis. Index arrays are int32; lse is fp32 (heads, total_q).
    The arrays must outlive the launch.
    """
    params = AttentionParams()
    for name, array in (("q", q), ("k", k), ("v", v), ("out", out)):
        item = array.itemsize
        assert array.strides[-1] == item, f"{name}: the last axis must be contiguous"
        strides = [stride // item for stride in array.strides[:-1]]
        setattr(params, name, array.ctypes.data)
        for axis, stride in zip(("batch", "token", "head"), [0, *strides][-3:], strict=True):
            setattr(params, f"{name}_{axis}_stride", stride)
    optional = {
        "lse": lse,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "kv_lengths": kv_lengths,
        "workspace": workspace,
    }
    for name, optional_array in optional.items():
        setattr(params, name, None if optional_array is None else optional_array.ctypes.data)
    params.num_heads, params.num_kv_heads, params.splits = q.shape[-2], k.shape[-2], splits
    params.scale_log2 = (1 / math.sqrt(q.shape[-1]) if scale is None else scale) * math.log2(math.e)
    if cu_seqlens_q is None:
        params.batch, params.seqlen_q = q.shape[0], q.shape[1]
        params.total_q = q.shape[0] * q.shape[1]
    else:
        params.batch, params.total_q = len(cu_seqlens_q) - 1, q.shape[0]
        params.seqlen_q = int(np.diff(cu_seqlens_q).max())
    params.seqlen_k = k.shape[1] if cu_seqlens_k is None else int(np.diff(cu_seqlens_k).max())
    inputs = [q, k, v, *(a for a in (cu_seqlens_q, cu_seqlens_k, kv_lengths) if a is not None)]
    outputs = [out, *(a for a in (lse, workspace) if a is not None)]
    return params, [Buffer(_span(a)) for a in inputs] + [Buffer(_span(a), writable=True) for a in outputs]


def _span(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bytes from an array's first element to its last, as a flat array."""
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    count = max(0, last // array.itemsize + 1) if array.size else 0
    return np.lib.stride_tricks.as_strided(
        array.reshape(-1)[:0] if not array.size else array, (count,), (array.itemsize,)
    )

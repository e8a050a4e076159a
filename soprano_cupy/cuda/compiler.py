"""NVRTC, CUDA's run-time compiler, called directly through ctypes.

CuPy's own compile step cannot ask for `sm_90a` and hides the log. The library is the one that CuPy uses where
CuPy is installed, else that of the pip package or of a CUDA installation, so that kernels compile (and CI
checks them) on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import DeviceError

log = logging.getLogger(__name__)

MAJOR_VERSIONS = (13, 12)
_BASE_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")  # -v: registers and spills in the log
_HOW_TO_GET = "install it with: pip install nvidia-cuda-nvrtc-cu12 (or nvidia-cuda-nvrtc for CUDA 13)"


@dataclass(frozen=True)
class Binary:
    """A compiled kernel file: the cubin's bytes and what the compiler said."""

    cubin: bytes
    log: str


def compile_options(architecture: str, defines: Sequence[tuple[str, int]] = ()) -> tuple[str, ...]:
    """The options of one compilation: architecture ("sm_80", "sm_90a") and `-D` constants in their order."""
    return (*_BASE_OPTIONS, f"--gpu-architecture={architecture}", *(f"-D{name}={value}" for name, value in defines))


class Nvrtc:
    """One loaded NVRTC library."""

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self._library = library
        self.path = path
        library.nvrtcGetErrorString.restype = ctypes.c_char_p

    @cached_property
    def version(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    @cached_property
    def architectures(self) -> tuple[int, ...]:
        """Compute capabilities that it compiles for, ascending: 75, 80, 86 and so on."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        values = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", values)
        return tuple(sorted(values))

    def compile(self, source: str, name: str, options: Sequence[str]) -> Binary:
        """Compile one text to a cubin; `DeviceError` carries the first error line, the log has the rest."""
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), ctypes.c_int(0), None, None
        )
        try:
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, ctypes.c_int(len(options)), arguments)
            messages = self._text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0\n").decode()
            if status:
                log.debug("NVRTC %s on %s with %s:\n%s", self.version, name, " ".join(options), messages)
                raise DeviceError(f"{name} does not compile ({self._why(status)}): {_first_error(messages)}")
            return Binary(self._text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"), messages)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, size_function: str, function: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_function, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(function, program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise DeviceError(f"{function} failed: {self._why(status)}; reinstall NVRTC ({self.path})")

    def _why(self, status: int) -> str:
        return str(self._library.nvrtcGetErrorString(status).decode())


def _first_error(messages: str) -> str:
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


_found: Nvrtc | None = None
_lock = threading.Lock()


def find_nvrtc() -> Nvrtc:
    """The NVRTC of this process, loaded at the first call; `DeviceError` when there is none."""
    global _found
    with _lock:
        if _found is None:
            _found = _load()
        return _found


def _load() -> Nvrtc:
    for candidate in _candidates():
        nvrtc = _open(candidate)
        if nvrtc is not None:
            return nvrtc
    raise DeviceError(f"NVRTC, CUDA's run-time compiler, was not found; {_HOW_TO_GET}")


def _open(path: str) -> Nvrtc | None:
    """The library at `path` (or of that name, where the loader finds it); None when it cannot be used."""
    try:
        # it looks for its builtins by name: have those beside it loaded before it asks
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if "/" in path else ():
            ctypes.CDLL(str(builtins))
        nvrtc = Nvrtc(ctypes.CDLL(path), path)
        log.debug("NVRTC %s from %s", nvrtc.version, path)
    except (OSError, AttributeError, DeviceError) as error:
        log.debug("no NVRTC at %s: %s", path, error)
        return None
    return nvrtc


def _candidates() -> Iterator[str]:
    """Where NVRTC may be: CuPy's, the pip packages', the loader's path, a CUDA installation's."""
    major = _cupy_nvrtc_major()
    if major:
        yield f"libnvrtc.so.{major}"  # in this process already
    yield from _pip_libraries()
    for version in MAJOR_VERSIONS:
        yield f"libnvrtc.so.{version}"
    for root in (os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if root:
            yield from (str(Path(root) / "lib64" / f"libnvrtc.so.{version}") for version in MAJOR_VERSIONS)


def _cupy_nvrtc_major() -> int | None:
    """The major version of the NVRTC that CuPy has loaded; None without a working CuPy."""
    if importlib.util.find_spec("cupy_backends") is None:
        return None
    try:
        from cupy_backends.cuda.libs import nvrtc

        return int(nvrtc.getVersion()[0])
    except Exception as error:  # whatever a broken CuPy raises, another NVRTC may still be there
        log.debug("CuPy offers no NVRTC: %s", error)
        return None


def _pip_libraries() -> Iterator[str]:
    """Libraries of nvidia-cuda-nvrtc wheels: nvidia/cuda_nvrtc/lib (CUDA 12), nvidia/cu13/lib (CUDA 13)."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for version in MAJOR_VERSIONS:
        for folder in folders:
            yield from (str(path) for path in sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{version}")))


def architecture_for(capability: tuple[int, int], supported: Sequence[int]) -> int:
    """The best architecture among `supported` whose cubin runs on a GPU of this compute capability.

    A cubin runs on its own and later minor versions of the same major: sm_80 code on 8.6. `DeviceError` if none.
    """
    major, minor = capability
    fitting = [value for value in supported if value // 10 == major and value % 10 <= minor]
    if not fitting:
        raise DeviceError(
            f"this compiler knows no architecture for compute capability {major}.{minor} "
            f"(it has {', '.join(map(str, supported))}); install the CuPy of a CUDA version that supports the GPU"
        )
    return max(fitting)

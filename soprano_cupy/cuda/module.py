"""From a kernel's name and constants to a launchable function on a CuPy device.

`build` needs no GPU: shipped binary, else cached binary, else NVRTC. `load` puts the binary on a device, once
per process and device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..cores import available_cores
from ..errors import DeviceError
from .cache import entry_key, read_entry, read_prebuilt, write_entry
from .compiler import architecture_for, compile_options, find_nvrtc
from .source import joined_source

log = logging.getLogger(__name__)

DEFAULT_SHARED_BYTES = 48 * 1024  # a kernel gets more dynamic shared memory than this only when it asks
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

# NVRTC calls at once. With one for each core the kernel that takes longest took longer still: the first audio of a
# process without a cache came after 3.1 to 3.3 s with 12 calls on 16 cores, 3.2 to 4.5 with more, 3.5 to 4.1 with four.
_compilers = threading.BoundedSemaphore(max(2, available_cores() * 3 // 4))


@dataclass(frozen=True)
class DeviceFacts:
    """What a launch plan may depend on."""

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int = 0  # of the second-level cache; 0: not known

    @property
    def compute_capability(self) -> int:
        """90 for 9.0."""
        return self.capability[0] * 10 + self.capability[1]


@cache
def device_facts(index: int) -> DeviceFacts:
    """The facts of CUDA device `index`."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(index)
    return DeviceFacts(
        index=index,
        name=properties["name"].decode(),
        capability=(properties["major"], properties["minor"]),
        multiprocessors=properties["multiProcessorCount"],
        l2_bytes=properties["l2CacheSize"],
    )


def build(
    source_name: str, defines: Sequence[tuple[str, int]], capability: tuple[int, int], *, specific: bool = False
) -> bytes:
    """The cubin of `kernels/<source_name>` for a GPU of this compute capability.

    specific: compile for exactly this architecture with its own instructions ("sm_90a").
    Raises `DeviceError` when there is no shipped binary and NVRTC is missing or refuses.
    """
    text = joined_source(source_name)
    try:
        nvrtc = find_nvrtc()
    except DeviceError:
        shipped = _shipped(text, defines, capability, specific)
        if shipped is None:
            raise
        return shipped
    architecture = _architecture(capability, nvrtc.architectures, specific)
    options = compile_options(architecture, defines)
    key = entry_key(text, options, nvrtc.version)
    cubin = read_prebuilt(text, options) or read_entry(key)
    if cubin is None:
        with _compilers:
            log.debug("compiling %s for %s with %s", source_name, architecture, dict(defines))
            cubin = nvrtc.compile(text, source_name, options).cubin
        write_entry(key, cubin)
    return cubin


def _architecture(capability: tuple[int, int], supported: Sequence[int], specific: bool) -> str:
    if not specific:
        return f"sm_{architecture_for(capability, supported)}"
    number = capability[0] * 10 + capability[1]
    if number not in supported:
        raise DeviceError(f"this NVRTC does not compile for sm_{number}a; use the CuPy of a newer CUDA version")
    return f"sm_{number}a"


def _shipped(
    text: str, defines: Sequence[tuple[str, int]], capability: tuple[int, int], specific: bool
) -> bytes | None:
    """The shipped binary of the nearest architecture that runs on this GPU, for machines without NVRTC."""
    major, minor = capability
    for lower in range(minor, -1 if not specific else minor - 1, -1):
        cubin = read_prebuilt(text, compile_options(f"sm_{major}{lower}{'a' if specific else ''}", defines))
        if cubin is not None:
            return cubin
    return None


class Kernel:
    """One function of a loaded module; calling it launches on CuPy's current stream."""

    def __init__(self, module: Any, function: Any) -> None:
        self._module = module  # a module that is collected is unloaded
        self._function = function
        self._shared_bytes = DEFAULT_SHARED_BYTES

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared_bytes: int = 0
    ) -> None:
        """Launch. arguments: CuPy arrays, or NumPy scalars and structured scalars, passed by value."""
        self.allow_shared_bytes(shared_bytes)
        self._function(grid, block, arguments, shared_mem=shared_bytes)

    @property
    def pointer(self) -> int:
        """The driver's handle (CUfunction); it holds as long as this object lives."""
        return int(self._function.ptr)

    def allow_shared_bytes(self, shared_bytes: int) -> None:
        """Let launches ask for this much dynamic shared memory; what was allowed before stays allowed."""
        if shared_bytes > self._shared_bytes:
            from cupy_backends.cuda.api import driver

            driver.funcSetAttribute(self._function.ptr, _MAX_DYNAMIC_SHARED, shared_bytes)
            self._shared_bytes = shared_bytes


_kernels: dict[tuple[Any, ...], Kernel] = {}
_modules: dict[tuple[Any, ...], Any] = {}
_turns: dict[tuple[Any, ...], threading.Lock] = {}  # of the threads that want the same module
_lock = threading.Lock()


def load(
    source_name: str,
    function: str,
    defines: Sequence[tuple[str, int]],
    device: int,
    *,
    specific: bool = False,
) -> Kernel:
    """The kernel `function` of `kernels/<source_name>`, built and loaded on CUDA device `device` at first need.

    Threads that ask for different modules build them side by side.
    """
    module_key = (source_name, tuple(defines), device, specific)
    key = (function, *module_key)
    kernel = _kernels.get(key)
    if kernel is None:
        with _lock:
            turn = _turns.setdefault(module_key, threading.Lock())
        with turn:
            kernel = _kernels.get(key) or _load(*key)
            _kernels[key] = kernel
    return kernel


def _load(function: str, source_name: str, defines: Sequence[tuple[str, int]], device: int, specific: bool) -> Kernel:
    import cupy

    key = (source_name, defines, device, specific)
    capability = device_facts(device).capability
    # ahead of the context, which takes a while, too
    cubin = None if key in _modules else build(source_name, defines, capability, specific=specific)
    with cupy.cuda.Device(device):
        cupy.cuda.runtime.free(0)  # a thread that has not used the device yet has no context to load into
        if cubin is not None:
            module = cupy.cuda.function.Module()
            module.load(cubin)
            _modules[key] = module
        return Kernel(_modules[key], _modules[key].get_function(function))

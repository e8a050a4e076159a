"""From planned launches to a program on a device: kernels built side by side, loaded, packed and described."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ..cores import available_cores
from ..cuda.module import Kernel, build, device_facts, load
from ..errors import DeviceError
from .launch import Blocks, Dimension, Launch, Symbol

if TYPE_CHECKING:
    from ._driver import Event as Event
    from ._driver import Graph as Graph
    from ._driver import MappedMemory as MappedMemory
    from ._driver import Program as Program

log = logging.getLogger(__name__)

PROGRAMMATIC_FROM = (9, 0)  # compute capability
PROGRAMMATIC_CUDA = 12030  # the driver's CUDA version from which graphs keep programmatic edges: 12.3
PORTABLE_CLUSTER = 8  # blocks; a kernel has to ask for more
MOST_LOADERS = 16  # threads that have kernels built and load them

Module = tuple[str, tuple[tuple[str, int], ...], bool]  # source, constants, specific
Item = TypeVar("Item")
Result = TypeVar("Result")


def __getattr__(name: str) -> Any:
    """Event, Graph, MappedMemory and Program: the compiled classes, for importing them from here."""
    if name in ("Event", "Graph", "MappedMemory", "Program"):
        from . import _driver

        return getattr(_driver, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def driver_problem() -> str | None:
    """Why programs cannot be launched here, as one line; None when they can. Never raises."""
    try:
        from . import _driver
    except ImportError as error:
        return f"its extension module cannot be loaded ({error}); install again where there is a C compiler"
    return _driver.problem()


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """Makes a CUDA device, and its context in the driver, current in this thread."""
    import cupy

    with cupy.cuda.Device(device):
        cupy.cuda.runtime.free(0)  # CuPy makes a context current only when a thread first needs one
        yield


def compile_program(launches: Iterable[Launch], capability: tuple[int, int]) -> int:
    """Build every kernel for a compute capability, without a GPU, so that loading finds them; how many there are.

    Raises `DeviceError` when NVRTC is missing or refuses a kernel.
    """
    modules = list(dict.fromkeys(map(_module, launches)))

    def compile_one(module: Module) -> None:
        source, defines, specific = module
        build(source, defines, capability, specific=specific)

    _side_by_side(compile_one, modules)
    return len(modules)


def load_kernels(launches: Iterable[Launch], device: int) -> dict[tuple[str, Module], Kernel]:
    """The kernels of all launches on a CUDA device, by `_function`; those that are not there are built side by side.

    Raises `DeviceError` when NVRTC or the driver refuses one.
    """
    wanted = list(dict.fromkeys(map(_function, launches)))

    def load_one(function: tuple[str, Module]) -> Kernel:
        name, (source, defines, specific) = function
        return load(source, name, defines, device, specific=specific)

    return dict(zip(wanted, _side_by_side(load_one, wanted), strict=True))


def load_program(launches: Sequence[Launch], device: int) -> Program:
    """A program of these launches on a CUDA device; kernels that are not there yet are built side by side.

    Raises `DeviceError` when the driver, NVRTC or the GPU refuses, `ParameterError` for an impossible launch.
    """
    problem = driver_problem()
    if problem is not None:
        raise DeviceError(f"the GPU engine cannot run: {problem}")
    from . import _driver

    begun = time.perf_counter()
    kernels = load_kernels(launches, device)
    with on_device(device):
        for launch in launches:
            _allow(kernels[_function(launch)], launch)
        program = _driver.Program(
            launches,
            [kernels[_function(launch)].pointer for launch in launches],
            programmatic=has_programmatic_launches(device),
            keep=tuple(kernels.values()),
        )
    seconds = time.perf_counter() - begun
    log.info("%d launches of %d kernels ready on cuda:%d after %.2f s", len(launches), len(kernels), device, seconds)
    for line in describe_program(launches):
        log.debug("%s", line)
    return program


def has_programmatic_launches(device: int) -> bool:
    """Whether the GPU and its driver know programmatic dependent launches, in streams and in graphs."""
    from . import _driver

    new_enough = device_facts(device).capability >= PROGRAMMATIC_FROM
    return new_enough and _driver.launches_with_attributes() and _driver.driver_version() >= PROGRAMMATIC_CUDA


def describe_program(launches: Iterable[Launch]) -> list[str]:
    """One line for each kind of launch, in the order of their first appearance: how often, grid, block, constants."""
    counts: dict[str, int] = {}
    for launch in launches:
        line = _describe(launch)
        counts[line] = counts.get(line, 0) + 1
    return [f"{count:3} x {line}" for line, count in counts.items()]


def _describe(launch: Launch) -> str:
    grid = " x ".join(_dimension(size) for size in launch.grid)
    parts = [f"{launch.kernel}: {grid} blocks of {launch.threads} threads, {launch.shared_bytes} bytes shared"]
    if launch.cluster > 1:
        parts.append(f"clusters of {launch.cluster}")
    if launch.cooperative:
        parts.append("cooperative")
    if launch.defines:
        parts.append(" ".join(f"{name}={value}" for name, value in launch.defines))
    return ", ".join(parts)


def _dimension(size: Dimension) -> str:
    if not isinstance(size, Blocks):
        return str(size)
    symbol = Symbol(size.symbol).name.lower()
    quotient = symbol if size.times == 1 else f"{symbol}*{size.times}"
    blocks = quotient if size.of_each == 1 else f"ceil({quotient}/{size.of_each})"
    return blocks if size.repeat == 1 else f"{size.repeat}*{blocks}"


def _module(launch: Launch) -> Module:
    return launch.source, launch.defines, launch.specific


def _function(launch: Launch) -> tuple[str, Module]:
    return launch.kernel, _module(launch)


def _allow(kernel: Kernel, launch: Launch) -> None:
    """What a launch beyond the defaults has to ask for first."""
    from . import _driver

    try:
        kernel.allow_shared_bytes(launch.shared_bytes)
    except RuntimeError as error:  # CuPy's CUDADriverError
        raise DeviceError(
            f"{launch.kernel} needs {launch.shared_bytes} bytes of shared memory a block, more than this GPU has "
            f"({error}); please report it with the output of soprano-cupy doctor"
        ) from error
    if launch.cluster > PORTABLE_CLUSTER:
        _driver.allow_large_clusters(kernel.pointer)


def _side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results for all items, in their order, by as many threads as there are cores; NVRTC runs outside the GIL."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(len(items), available_cores(), MOST_LOADERS)) as pool:
        return list(pool.map(work, items))

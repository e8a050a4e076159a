"""Where the planned launches of a generation step run in tests: the emulated machine, or a GPU.

Both take the launch that a planner makes of arrays in the host's memory, and leave what it wrote in those arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import emulation
import numpy as np

from soprano_cupy.gpu.launch import Launch

Array = np.ndarray[Any, Any]
Planner = Callable[..., Launch]


class Machine(Protocol):
    """Runs one planned launch."""

    capability: tuple[int, int]
    multiprocessors: int

    def run(self, planner: Planner, arrays: Mapping[str, Array], written: set[str], **sizes: Any) -> Launch:
        """arrays: by the planner's names for their addresses, C-contiguous; `written` names those that may change."""


class Emulated:
    """The kernels' own source on the CPU, as __CUDA_ARCH__ `arch`."""

    def __init__(self, arch: int = 800, multiprocessors: int = 132, **options: Any) -> None:
        self.arch, self.multiprocessors, self.options = arch, multiprocessors, options
        self.capability = (arch // 100, arch // 10 % 10)
        self.source: Any = None  # another than the plan's

    def run(self, planner: Planner, arrays: Mapping[str, Array], written: set[str], **sizes: Any) -> Launch:
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        launch = planner(capability=self.capability, multiprocessors=self.multiprocessors, **addresses, **sizes)
        library = emulation.build(self.source or launch.source, dict(launch.defines), self.arch)
        library.launch(
            launch.kernel, launch.params, grid=[d for d in launch.grid if isinstance(d, int)], threads=launch.threads,
            shared_bytes=launch.shared_bytes, cluster=launch.cluster,
            buffers=[
                emulation.Buffer(array, any(np.may_share_memory(array, arrays[other]) for other in written))
                for array in arrays.values()
            ],
            **self.options,
        )  # fmt: skip
        return launch


class OnGpu:
    """CUDA device 0, through the engine's own launcher."""

    def __init__(self) -> None:
        from soprano_cupy.cuda.module import device_facts

        facts = device_facts(0)
        self.capability, self.multiprocessors = facts.capability, facts.multiprocessors

    def run(self, planner: Planner, arrays: Mapping[str, Array], written: set[str], **sizes: Any) -> Launch:
        import cupy

        from soprano_cupy.gpu.program import load_program

        copies = {name: cupy.asarray(np.ascontiguousarray(a).reshape(-1).view(np.uint8)) for name, a in arrays.items()}
        addresses = {name: int(copy.data.ptr) for name, copy in copies.items()}
        launch = planner(capability=self.capability, multiprocessors=self.multiprocessors, **addresses, **sizes)
        program = load_program([launch], 0)
        stream = cupy.cuda.get_current_stream()
        program.run(stream.ptr)
        stream.synchronize()
        for name in written:
            arrays[name].reshape(-1).view(np.uint8)[...] = copies[name].get()
        for name in set(arrays) - written:
            unchanged = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
            np.testing.assert_array_equal(copies[name].get(), unchanged, f"{launch.kernel} wrote {name}")
        return launch

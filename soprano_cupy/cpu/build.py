"""The extension modules of the CPU engine, for `setup.py`; imports nothing but setuptools.

One binary serves every machine of an architecture: the files of an instruction set choose it by themselves
with target pragmas, so one set of flags compiles all, and `csrc/dispatch.c` picks at run time.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension

COMPILE_ARGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fvisibility=hidden"]


def cpu_extensions() -> list[Extension]:
    """Extensions with paths relative to the project's root, where setup.py runs."""
    folder = Path("soprano_cupy/cpu")
    return [
        Extension(
            "soprano_cupy.cpu._math",
            [str(folder / "_math.pyx"), str(folder / "csrc/gelu.c")],
            include_dirs=[str(folder / "csrc")],
            depends=[str(folder / "csrc/simd.h"), str(folder / "csrc/gelu.h")],
            extra_compile_args=COMPILE_ARGS,
        )
    ]

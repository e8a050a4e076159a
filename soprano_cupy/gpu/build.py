"""The extension modules of the GPU engine, for `setup.py`; imports nothing but setuptools. They need no CUDA."""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension

FOLDER = Path("soprano_cupy/gpu")


def gpu_extensions() -> list[Extension]:
    """Extensions with paths relative to the project's root, where setup.py runs."""
    csrc = FOLDER / "csrc"
    headers = [*sorted(csrc.glob("*.h")), *sorted(FOLDER.glob("*.pxi"))]
    return [
        Extension(
            "soprano_cupy.gpu._driver",
            [str(FOLDER / "_driver.pyx"), *(str(path) for path in sorted(csrc.glob("*.c")))],
            include_dirs=[str(csrc)],
            depends=[str(path) for path in headers],
            extra_compile_args=["-O2", "-g0", "-std=gnu11", "-fvisibility=hidden", "-pthread"],
            extra_link_args=["-pthread"],
            libraries=["dl"],
        ),
        Extension(
            "soprano_cupy.gpu._tables",
            [str(FOLDER / "_tables.pyx")],
            extra_compile_args=["-O2", "-g0", "-std=gnu11", "-fvisibility=hidden"],
        ),
    ]

"""The extension modules of the CPU engine, for `setup.py`; imports nothing but setuptools.

One binary serves every machine of an architecture: the files of an instruction set choose it by themselves
with target pragmas, so one set of flags compiles all, and `csrc/dispatch.c` picks at run time.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension

FOLDER = Path("soprano_cupy/cpu")
COMPILE_ARGS = ["-O3", "-g0", "-std=gnu11", "-fno-math-errno", "-fvisibility=hidden", "-pthread"]


def cpu_extensions() -> list[Extension]:
    """Extensions with paths relative to the project's root, where setup.py runs."""
    return [_extension("_math", ["gelu.c"]), _extension("_engine", [p.name for p in _sources() if p.name != "gelu.c"])]


def _sources() -> list[Path]:
    return sorted((FOLDER / "csrc").glob("*.c"))


def _extension(name: str, sources: list[str]) -> Extension:
    csrc = FOLDER / "csrc"
    return Extension(
        f"soprano_cupy.cpu.{name}",
        [str(FOLDER / f"{name}.pyx"), *(str(csrc / source) for source in sources)],
        include_dirs=[str(csrc)],
        depends=[str(path) for path in sorted(csrc.glob("*.h"))],
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=["-pthread"],
    )

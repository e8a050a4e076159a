"""Builds the extension modules and puts `kernels/` inside the package; metadata is in pyproject.toml."""

import re
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KERNEL_FILES = {".cu", ".cuh", ".cubin", ".json"}  # .json: which NVRTC built the binaries
NOT_SHIPPED = {"emulation", "experiments"}


class BuildWithKernels(build_py):
    """Copy the CUDA sources to `soprano_cupy/kernels`, where an installed package looks for them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout finds kernels/ beside the package
            return
        for source in sorted((ROOT / "kernels").rglob("*")):
            if source.suffix in KERNEL_FILES and not NOT_SHIPPED.intersection(source.parts):
                target = Path(self.build_lib) / "soprano_cupy" / source.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(source), str(target))


version = re.search(r'^__version__ = "(.+)"$', (ROOT / "soprano_cupy/__init__.py").read_text(), re.MULTILINE)
assert version is not None


def extensions(part: str) -> list[object]:
    """The extension modules of `cpu` or `gpu`, without importing the package."""
    return runpy.run_path(str(ROOT / "soprano_cupy" / part / "build.py"))[f"{part}_extensions"]()


setup(
    version=version[1],
    ext_modules=[*extensions("cpu"), *extensions("gpu")],
    cmdclass={"build_py": BuildWithKernels},
)

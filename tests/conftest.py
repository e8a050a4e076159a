"""Fixtures and markers shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from soprano_cupy.cuda.compiler import Nvrtc


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference data beside the project; tests that read it skip where it is absent."""
    folder = Path(os.environ.get("SOPRANO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"reference data not found at {folder}; set SOPRANO_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def nvrtc() -> Nvrtc:
    """NVRTC, for tests that compile kernels; they skip where there is none."""
    from soprano_cupy.cuda.compiler import find_nvrtc
    from soprano_cupy.errors import DeviceError

    try:
        return find_nvrtc()
    except DeviceError as error:
        pytest.skip(str(error))


def pytest_configure() -> None:
    """Under compute-sanitizer (`make sanitize-gpu`) every array is an allocation of its own, whose bounds it knows."""
    if os.environ.get("SOPRANO_SANITIZE"):
        import cupy

        cupy.cuda.set_allocator(None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip with the reason where no GPU can be used."""
    from soprano_cupy.device import cuda_problem

    problem = cuda_problem()
    if problem is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=problem))

"""Fixtures and markers shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The reference data beside the project; tests that read it skip where it is absent."""
    folder = Path(os.environ.get("SOPRANO_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"reference data not found at {folder}; set SOPRANO_SHARED to its folder")
    return folder

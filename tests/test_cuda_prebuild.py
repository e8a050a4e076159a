"""tools/prebuild.py fills a folder from which a machine without NVRTC gets every kernel of a class."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from soprano_cupy.attention.probe import ShapeClass
from soprano_cupy.attention.variants import architecture_facts, variants
from soprano_cupy.cuda import cache, module
from soprano_cupy.cuda.compiler import find_nvrtc
from soprano_cupy.errors import DeviceError

SHAPE = ShapeClass("cuda:0", "float32", 32, 4, True)


@pytest.fixture(scope="module")
def prebuild() -> ModuleType:
    try:
        find_nvrtc()
    except DeviceError as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("prebuild", Path(__file__).parents[1] / "tools" / "prebuild.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_every_kernel_of_a_class_runs_without_nvrtc(
    prebuild: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    (folder / "stale.cubin").write_bytes(b"from another version")
    plans = list(variants(SHAPE, architecture_facts(80)))
    assert prebuild.prebuild(folder, [80], [SHAPE]) == len(plans)
    assert len(list(folder.glob("*.cubin"))) == len(plans)

    def missing() -> None:
        raise DeviceError("NVRTC was not found")

    monkeypatch.setattr(module, "find_nvrtc", missing)
    monkeypatch.setattr(cache, "kernels_folder", lambda: tmp_path)
    cache._prebuilt_version.cache_clear()
    for _, plan in plans:
        assert module.build(plan.source, plan.defines, (8, 0)).startswith(b"\x7fELF")
        assert module.build(plan.source, plan.defines, (8, 6)) == module.build(plan.source, plan.defines, (8, 0))
        with pytest.raises(DeviceError, match="NVRTC was not found"):
            module.build(plan.source, (*plan.defines, ("OTHER", 1)), (8, 0))


def test_an_architecture_that_nvrtc_does_not_know(prebuild: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"does not compile for \[31\]"):
        prebuild.prebuild(tmp_path / "prebuilt", [31, find_nvrtc().architectures[-1]], [SHAPE])
    assert not (tmp_path / "prebuilt").exists()

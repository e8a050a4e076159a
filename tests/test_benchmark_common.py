"""Result files: their format, their numbers, and that one is written whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def common() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "benchmark_common", Path(__file__).parents[1] / "benchmarks" / "common.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_medians_and_percentiles(common: ModuleType) -> None:
    assert common.timing([3.0, 1.0, 2.0]) == common.Timing(2.0, 3.0, 3, 1.0)
    assert common.timing([4.0, 1.0, 2.0, 3.0]) == common.Timing(2.5, 4.0, 4, 1.0)
    assert common.timing([float(n) for n in range(1, 201)]) == common.Timing(100.5, 198.0, 200, 1.0)
    assert common.timing([5.0]) == common.Timing(5.0, 5.0, 1, 5.0)


def test_timing_on_the_host(common: ModuleType) -> None:
    calls: list[int] = []
    timing = common.time_host(lambda: calls.append(1), seconds=0.0, least=4)
    assert len(calls) == 5  # one to warm up
    assert timing.repeats == 4
    assert 0 < timing.median <= timing.p99


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "tesla-t4"),
        ("", "gpu"),
    ],
)
def test_short_names_of_gpus(common: ModuleType, name: str, label: str) -> None:
    assert common.gpu_label(name) == label


def test_the_result_file(common: ModuleType, tmp_path: Path) -> None:
    rows = [
        common.Row("decode/B1/L512/bf16", 5.123456789, "us", 30, 6.0, 0.13, 0.0254, {"torch_cudnn": 24.0}, 0),
        common.Row("cpu/voice/int8", 2.5, "x", 3),
    ]
    facts = common.machine_facts(gpu=False)
    path = tmp_path / "results" / "test.json"
    common.write_results(path, "attention", facts, {"copy_tb_s": 4.1234567}, rows, 7)
    result = json.loads(path.read_text())
    assert list(result)[:9] == ["what", "machine", "gpu", "driver", "cuda", "cupy", "python", "commit", "date"]
    assert result["checks"] == "passed 7"
    assert result["limits"] == {"copy_tb_s": 4.1235}
    assert result["rows"] == [
        {
            "case": "decode/B1/L512/bf16",
            "value": 5.1235,
            "unit": "us",
            "repeats": 30,
            "p99": 6.0,
            "limit": 0.13,
            "share_of_limit": 0.0254,
            "peer": {"torch_cudnn": 24.0},
            "peak_extra_bytes": 0,
        },
        {"case": "cpu/voice/int8", "value": 2.5, "unit": "x", "repeats": 3},
    ]
    assert [item.name for item in path.parent.iterdir()] == ["test.json"]


def test_a_result_that_cannot_be_written_leaves_the_old_one(common: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        common.write_results(path, "attention", {"machine": object()}, {}, [], 0)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["test.json"]

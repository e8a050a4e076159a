"""The emulated machine itself: a small kernel gives the right product, and every planted fault is caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulation
import ml_dtypes
import numpy as np
import pytest

SMOKE = Path(__file__).with_name("emulation_smoke.cu")
HEAD_DIM = 64


def run_smoke(defines: dict[str, int], dtype: Any, arch: int = 800, **options: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 16, 1, HEAD_DIM)).astype(dtype)
    k = rng.standard_normal((1, 8, 1, HEAD_DIM)).astype(dtype)
    out, scores = np.zeros_like(q), np.full((16, 8), np.nan, np.float32)
    params, buffers = emulation.attention_params(q, k, k, out, lse=scores)
    library = emulation.build(SMOKE, {"HEAD_DIM": HEAD_DIM, **defines}, arch)
    launch = {"grid": (1, 1, 1), "threads": 32, "shared_bytes": 24 * HEAD_DIM * 2, "buffers": buffers, **options}
    library.launch("smoke", params, **launch)
    return scores, q[0, :, 0].astype(np.float64) @ k[0, :, 0].astype(np.float64).T


@pytest.mark.parametrize("arch", [750, 800])
@pytest.mark.parametrize("reverse", [False, True])
def test_smoke_kernel_is_right(arch: int, reverse: bool) -> None:
    scores, expected = run_smoke({"DTYPE_FP16": 1}, np.float16, arch, reverse=reverse)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_smoke_kernel_is_right_in_bf16() -> None:
    scores, expected = run_smoke({"DTYPE_BF16": 1}, ml_dtypes.bfloat16)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"skip_wait": 0}, "copy into it is in flight"),
        ({"skip_barrier": 0}, "race on shared memory"),
        ({"skip_barrier": 1}, "race on shared memory"),
        ({"skip_warp_barrier": 0}, "race on shared memory"),
        ({"shared_bytes": 23 * HEAD_DIM * 2}, "outside the 2944 bytes"),
        ({"threads": 64}, "race on shared memory"),
        ({"buffers": []}, None),
    ],
)
def test_faults_are_caught(fault: dict[str, Any], message: str | None) -> None:
    if message is None:  # no buffers named: nothing to check against, so the launch goes through
        run_smoke({"DTYPE_FP16": 1}, np.float16, **fault)
        return
    with pytest.raises(emulation.EmulationError, match=message):
        run_smoke({"DTYPE_FP16": 1}, np.float16, **fault)


def test_global_access_outside_the_buffers_is_caught() -> None:
    small = np.zeros(4, np.float16)
    with pytest.raises(emulation.EmulationError, match="outside every buffer"):
        run_smoke({"DTYPE_FP16": 1}, np.float16, buffers=[emulation.Buffer(small)])

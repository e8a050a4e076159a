"""Bad arguments are named with their value, and the kernels' record has the layout of the C struct."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soprano_cupy.attention import attention, flash_attention, standard_attention
from soprano_cupy.attention.arguments import check
from soprano_cupy.attention.problem import LOG2_E, PARAMS_DTYPE, kernel_ready, pack_params
from soprano_cupy.cuda.source import kernels_folder
from soprano_cupy.errors import ParameterError


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


Q, K = zeros(2, 3, 4, 32), zeros(2, 5, 2, 32)
ROWS, PACKED_K = zeros(6, 4, 32), zeros(6, 2, 32)

BAD = [
    ("q must be a NumPy or CuPy array, not list", ([1.0], K, K), {}),
    ("v must be a NumPy or CuPy array, not NoneType", (Q, K, None), {}),
    ("q has dtype int32", (zeros(2, 3, 4, 32, dtype=np.int32), K, K), {}),
    ("k has dtype float64 and q float32", (Q, K.astype(np.float64), K), {}),
    (r"shapes \(4, 32\), \(2, 5, 2, 32\)", (zeros(4, 32), K, K), {}),
    (r"shapes \(2, 3, 4, 32\), \(6, 2, 32\)", (Q, PACKED_K, PACKED_K), {}),
    (r"v has shape \(2, 5, 2, 16\) and k \(2, 5, 2, 32\)", (Q, K, K[..., :16]), {}),
    ("k has head_dim 16 and q 32", (Q, K[..., :16], K[..., :16]), {}),
    ("k has 3 heads, which do not divide q's 4", (Q, zeros(2, 5, 3, 32), zeros(2, 5, 3, 32)), {}),
    ("k has batch size 1 and q 2", (Q, K[:1], K[:1]), {}),
    ("k has 5 packed tokens and q 6", (ROWS, PACKED_K[:5], PACKED_K[:5]), {"cu_seqlens": [0, 6]}),
    (r"q has shape \(2, 0, 4, 32\)", (Q[:, :0], K, K), {}),
    (r"k has shape \(2, 0, 2, 32\)", (Q, K[:, :0], K[:, :0]), {}),
    ("cu_seqlens is for packed queries", (Q, K, K), {"cu_seqlens": [0, 3, 6]}),
    ("cu_seqlens is missing", (ROWS, K, K), {}),
    ("kv_lengths is for keys with a batch axis", (ROWS, PACKED_K, PACKED_K), {"cu_seqlens": [0, 6], "kv_lengths": [6]}),
    ("cu_seqlens has 1 entries", (ROWS, PACKED_K, PACKED_K), {"cu_seqlens": [0]}),
    ("cu_seqlens has 4 entries; the 2 sequences", (ROWS, K, K), {"cu_seqlens": [0, 1, 2, 6]}),
    (r"cu_seqlens\[0\] = 1 must be 0", (ROWS, K, K), {"cu_seqlens": [1, 3, 6]}),
    (r"cu_seqlens\[2\] = 7 must be the number of rows of q, 6", (ROWS, K, K), {"cu_seqlens": [0, 3, 7]}),
    (
        r"cu_seqlens\[2\] = 3 must be above cu_seqlens\[1\] = 3",
        (ROWS, PACKED_K, PACKED_K),
        {"cu_seqlens": [0, 3, 3, 6]},
    ),
    (r"cu_seqlens\[1\] = -1 must be above", (ROWS, K, K), {"cu_seqlens": [0, -1, 6]}),
    ("cu_seqlens must hold integers on one axis, not float64", (ROWS, K, K), {"cu_seqlens": [0.0, 3.0, 6.0]}),
    ("cu_seqlens must be a list", (ROWS, K, K), {"cu_seqlens": 6}),
    ("flat list of integers", (ROWS, K, K), {"cu_seqlens": [[0], [3, 6]]}),
    (r"kv_lengths\[1\] = 0 must be from 1 to 5", (Q, K, K), {"kv_lengths": np.array([5, 0])}),
    (r"kv_lengths\[0\] = 6 must be from 1 to 5", (Q, K, K), {"kv_lengths": [6, 5]}),
    ("kv_lengths has 3 entries for 2 sequences", (Q, K, K), {"kv_lengths": [5, 5, 5]}),
    (r"kv_lengths must hold integers on one axis, not int64 of shape \(2, 1\)", (Q, K, K), {"kv_lengths": [[5], [5]]}),
    ("kv_lengths must hold integers on one axis, not bool", (Q, K, K), {"kv_lengths": [True, True]}),
    ("scale = 0 must be positive", (Q, K, K), {"scale": 0}),
    ("scale = nan must be positive and finite", (Q, K, K), {"scale": float("nan")}),
    ("scale = '1' must be a number", (Q, K, K), {"scale": "1"}),
    ("causal = 1 must be True or False", (Q, K, K), {"causal": 1}),
]


@pytest.mark.parametrize("function", [attention, flash_attention, standard_attention])
@pytest.mark.parametrize(("message", "arrays", "options"), BAD, ids=[case[0][:40] for case in BAD])
def test_bad_arguments(function: Any, message: str, arrays: tuple[Any, Any, Any], options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=message):
        function(*arrays, **options)


def test_a_checked_call() -> None:
    problem = check(ROWS, K, K, cu_seqlens=np.array([0, 2, 6], np.uint8), kv_lengths=[4, 5])
    assert (problem.form, problem.device, problem.dtype) == ("cache", "cpu", "float32")
    assert (problem.batch, problem.total_q, problem.seqlen_q, problem.seqlen_k) == (2, 6, 4, 5)
    assert (problem.num_heads, problem.num_kv_heads, problem.group, problem.head_dim) == (4, 2, 2, 32)
    assert problem.scale == 1 / math.sqrt(32)
    assert problem.scale_log2 == problem.scale * LOG2_E


def test_the_record_has_the_layout_of_the_struct(tmp_path: Path) -> None:
    """offsetof and sizeof of every field, from the compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler to ask for the struct's layout")
    fields = "".join(
        f'    printf("{name} %zu\\n", offsetof(AttentionParams, {name}));\n' for name in PARAMS_DTYPE.names
    )
    (tmp_path / "layout.cpp").write_text(
        '#include <cstddef>\n#include <cstdio>\n#include "attention_params.cuh"\n'
        f'int main() {{\n{fields}    printf("size %zu\\n", sizeof(AttentionParams));\n}}\n'
    )
    program = tmp_path / "layout"
    command = [compiler, f"-I{kernels_folder()}", "-o", str(program), str(tmp_path / "layout.cpp")]
    subprocess.run(command, check=True, capture_output=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split("\n")
    layout = {name: int(offset) for name, offset in (line.split() for line in lines if line)}
    expected = {name: int(PARAMS_DTYPE.fields[name][1]) for name in PARAMS_DTYPE.names}
    assert layout == {**expected, "size": PARAMS_DTYPE.itemsize}


def test_every_field_of_the_struct_is_in_the_record() -> None:
    text = (kernels_folder() / "attention_params.cuh").read_text()
    body = text[text.index("struct AttentionParams {") : text.index("};")]
    statements = "".join(line.partition("//")[0] for line in body.split("\n")[1:]).split(";")
    names = [word.split()[-1].strip("*") for line in statements if line.strip() for word in line.split(",")]
    assert tuple(names) == PARAMS_DTYPE.names


def test_packing_a_cache() -> None:
    cache = np.zeros((2, 3, 10, 2, 32), np.float16)
    problem = kernel_ready(check(zeros(6, 4, 32, dtype=np.float16), cache[0, :2, :8], cache[1, :2, :8],
                                 cu_seqlens=[0, 2, 6], kv_lengths=[4, 8]))  # fmt: skip
    out = np.empty_like(problem.q)
    record = pack_params(problem, out, splits=3)[0]
    assert record["k"] == cache.ctypes.data
    assert record["v"] == cache[1].ctypes.data
    assert record["out"] == out.ctypes.data
    assert tuple(record[f"k_{axis}_stride"] for axis in ("batch", "token", "head")) == (640, 64, 32)
    assert tuple(record[f"q_{axis}_stride"] for axis in ("batch", "token", "head")) == (0, 128, 32)
    assert (record["batch"], record["total_q"], record["seqlen_q"], record["seqlen_k"]) == (2, 6, 4, 8)
    assert (record["num_heads"], record["num_kv_heads"], record["splits"]) == (4, 2, 3)
    assert record["scale_log2"] == np.float32(problem.scale * LOG2_E)
    assert (record["lse"], record["workspace"], record["cu_seqlens_k"]) == (0, 0, 0)
    assert problem.cu_seqlens.dtype == problem.kv_lengths.dtype == np.int32
    assert record["kv_lengths"] == problem.kv_lengths.ctypes.data


def test_arrays_that_the_kernels_cannot_address_are_copied() -> None:
    base = np.zeros(2 * 5 * 2 * 40 + 8, np.float16)
    shifted = base[1 : 1 + 2 * 5 * 2 * 32].reshape(2, 5, 2, 32)  # begins at 2 bytes off 16
    wide = base[: 2 * 5 * 2 * 40].reshape(2, 5, 2, 40)
    q = zeros(2, 3, 4, 32, dtype=np.float16)
    for k, copied in [(shifted, True), (wide[..., :32], False), (wide[..., 4:36], True), (wide[::-1, ..., :32], True)]:
        ready = kernel_ready(check(q, k, k))
        assert (ready.k is not k) == copied
        assert ready.k.ctypes.data % 16 == 0

"""The safetensors format: read strictly, written whole or not at all."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import numpy as library

from soprano_cupy.checkpoint.safetensors import open_safetensors, write_safetensors
from soprano_cupy.errors import CheckpointError
from soprano_cupy.testing import make_checkpoint


def header_and_data(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, arrays: dict[str, np.ndarray], dtype: str) -> Path:
    specs = {name: (dtype, array.shape) for name, array in arrays.items()}
    write_safetensors(path, specs, arrays.__getitem__)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_our_files_are_read_by_the_formats_library(tmp_path):
    arrays = {"b": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32), "a": np.zeros(0, np.float32)}
    loaded = library.load_file(write(tmp_path / "a.safetensors", arrays, "float32"))
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_formats_library_writes_files_we_read(tmp_path, dtype):
    arrays = {name: np.random.default_rng(i).standard_normal((i + 1, 3)).astype(dtype) for i, name in enumerate("zyx")}
    library.save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "np"})
    with open_safetensors(tmp_path / "a.safetensors") as file:
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.pop(name, array.shape, array.dtype.name), array)
        file.finish()


def test_unaligned_data_is_read(tmp_path):
    header = json.dumps({"x": tensor()}).encode()
    content = header_and_data(header + b" " * (8 - (len(header) + 1) % 8 + 2), struct.pack("<2f", 1.5, -2))
    assert (len(content) - 8) % 4
    (tmp_path / "a.safetensors").write_bytes(content)
    with open_safetensors(tmp_path / "a.safetensors") as file:
        np.testing.assert_array_equal(file.pop("x", (2,)), [1.5, -2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"1234567", "inside its first 8 bytes"),
        (struct.pack("<Q", 1 << 62), "its header claims 4611686018427387904 bytes"),
        (struct.pack("<Q", 100) + b"{}", "inside its header"),
        (header_and_data(b""), "not valid JSON"),
        (header_and_data(b"\xff\xfe"), "not valid JSON"),
        (header_and_data(b"[" * 100_000), "not valid JSON"),
        (header_and_data(b'{"x":' + b"9" * 5000 + b"}"), "not valid JSON|needs dtype"),
        (header_and_data([]), "not a JSON object"),
        (header_and_data({}), "no tensors"),
        (header_and_data({"__metadata__": {"format": "pt"}}), "no tensors"),
        (header_and_data({"x": 1}), "needs dtype, shape and data_offsets"),
        (header_and_data({"x": {"dtype": "F32"}}), "needs dtype, shape and data_offsets"),
        (header_and_data({"x": tensor("I64")}, bytes(8)), "has dtype 'I64', supported are BF16, F16, F32, F64"),
        (header_and_data({"x": tensor(["F32"])}, bytes(8)), "has dtype"),
        (header_and_data({"x": tensor(shape=3)}, bytes(8)), "shape of tensor x is not a list of sizes"),
        (header_and_data({"x": tensor(shape=[-2])}, bytes(8)), "shape of tensor x is not a list of sizes"),
        (header_and_data({"x": tensor(shape=[True, 2])}, bytes(8)), "shape of tensor x is not a list of sizes"),
        (header_and_data({"x": tensor(shape=[2.0])}, bytes(8)), "shape of tensor x is not a list of sizes"),
        (header_and_data({"x": tensor(shape=[1 << 50])}, bytes(8)), "shape of tensor x is not a list of sizes"),
        (header_and_data({"x": tensor(shape=[1] * 9, offsets=[0, 4])}, bytes(4)), "9 dimensions"),
        (header_and_data({"x": tensor(offsets=[0, 8, 9])}, bytes(8)), "3 offsets"),
        (header_and_data({"x": tensor(offsets=[8, 0])}, bytes(8)), "does not fill its -8 bytes"),
        (header_and_data({"x": tensor(shape=[3])}, bytes(8)), "does not fill its 8 bytes"),
        (header_and_data({"x": tensor(shape=[1 << 47, 1 << 47, 4])}, bytes(8)), "does not fill"),
        (header_and_data({"x": tensor(), "y": tensor()}, bytes(8)), "overlaps another or follows a gap"),
        (header_and_data({"x": tensor(offsets=[4, 12])}, bytes(12)), "overlaps another or follows a gap"),
        (
            header_and_data({"x": tensor(), "y": tensor(offsets=[4, 12])}, bytes(12)),
            "overlaps another or follows a gap",
        ),
        (header_and_data({"x": tensor()}, bytes(7)), "bytes where its header promises"),
        (header_and_data({"x": tensor()}, bytes(9)), "bytes where its header promises"),
        (
            header_and_data(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{}}', bytes(8)),
            "names something twice",
        ),
    ],
)
def test_damaged_safetensors(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_safetensors_cut_off_anywhere(tmp_path, tiny):
    """At every byte of the header's start, and every 997th of the rest."""
    content = (tiny / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for length in [*range(0, 600), *range(600, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            open_safetensors(path)


def test_nothing_is_left_when_writing_fails(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def interrupted(name: str) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, {"x": ("float32", (2,))}, interrupted)
    with pytest.raises(CheckpointError, match=r"tensor x has shape \(3,\), expected \(2,\)"):
        write_safetensors(path, {"x": ("float32", (2,))}, lambda name: np.zeros(3, np.float32))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match=r"cannot write .*No such file"):
        write_safetensors(tmp_path / "no" / "a.safetensors", {"x": ("float32", (2,))}, np.zeros)

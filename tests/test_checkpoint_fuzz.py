"""Mutated checkpoint files: whatever the bytes, only `CheckpointError` comes out.

SOPRANO_FUZZ_EXAMPLES sets how many inputs each test tries.
"""

from __future__ import annotations

import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soprano_cupy.checkpoint import decoder_config
from soprano_cupy.checkpoint.convert_dtype import STORED_AS
from soprano_cupy.checkpoint.safetensors import open_safetensors, write_safetensors
from soprano_cupy.checkpoint.tensor_pickle import read_tensor_pickle
from soprano_cupy.checkpoint.tensors import TensorFile
from soprano_cupy.checkpoint.torch_zip import open_torch_zip
from soprano_cupy.checkpoint.write_torch_zip import state_dict_pickle, write_member, write_torch_zip
from soprano_cupy.errors import CheckpointError

EXAMPLES = int(os.environ.get("SOPRANO_FUZZ_EXAMPLES", "250"))
SPECS = {
    "decoder.embed.weight": ("float32", (2, 3, 1)),
    "decoder.convnext.0.gamma": ("float16", (2,)),
    "head.out.weight": ("bfloat16", (6, 2)),
    "head.out.bias": ("float64", (6,)),
}
SPECIAL = [bytes([value]) for value in (0, 1, 0x7F, 0x80, 0xFF)]
SPECIAL += [struct.pack("<I", value) for value in (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)]
SPECIAL += [struct.pack("<Q", value) for value in (0, 1 << 31, 1 << 62, (1 << 64) - 1)]
SPECIAL += [b'"', b"{", b"}", b"[", b"]", b",", b"-1", b"9" * 30, b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"]
SPECIAL += [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]

edits = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "copy", "cut"]),
        st.integers(0, 1 << 20),
        st.one_of(st.sampled_from(SPECIAL), st.binary(min_size=1, max_size=12)),
    ),
    min_size=1,
    max_size=6,
)
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 250,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def mutate(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, number, value in changes:
        at = number % (len(content) + 1)
        if kind == "replace":
            content = content[:at] + value + content[at + len(value) :]
        elif kind == "insert":
            content = content[:at] + value + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(value) :]
        elif kind == "copy":
            start = number // 7 % (len(content) + 1)
            content = content[:at] + content[start : start + 8 * len(value)] + content[at:]
        else:
            content = content[: max(at, len(content) // 2)]
    return content


def read_everything(opener: Callable[[Path], TensorFile], path: Path) -> str:
    """All that a program would do with a decoder's file, and what it complains about."""
    try:
        with opener(path) as file:
            for name in sorted(file.names()):
                file.pop(name, file.shape(name))
            decoder_config(file)
    except CheckpointError as error:
        return str(error)
    return ""


def is_one_line(complaint: str) -> bool:
    return "\n" not in complaint and len(complaint) < 1000


@lru_cache
def valid(writer: Callable[..., None], path: Path) -> bytes:
    writer(path, SPECS, lambda name: np.ones(SPECS[name][1], STORED_AS[SPECS[name][0]]))
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(changes=edits)
def test_mutated_safetensors(folder, changes):
    path = folder / "decoder.safetensors"
    path.write_bytes(mutate(valid(write_safetensors, folder / "valid.safetensors"), changes))
    assert is_one_line(read_everything(open_safetensors, path))


@fuzz
@given(changes=edits)
def test_mutated_safetensors_headers(folder, changes):
    """Only the JSON is mutated and its length is right, so that it is parsed."""
    content = valid(write_safetensors, folder / "valid.safetensors")
    (size,) = struct.unpack("<Q", content[:8])
    header = mutate(content[8 : 8 + size], changes)
    path = folder / "decoder.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    assert is_one_line(read_everything(open_safetensors, path))


@fuzz
@given(changes=edits)
def test_mutated_archives(folder, changes):
    path = folder / "decoder.pth"
    path.write_bytes(mutate(valid(write_torch_zip, folder / "valid.pth"), changes))
    assert is_one_line(read_everything(open_torch_zip, path))


@fuzz
@given(changes=edits)
def test_mutated_indices_in_valid_archives(folder, changes):
    """Only the pickle is mutated and its checksum is right, so that it is interpreted."""
    path = folder / "decoder.pth"
    with zipfile.ZipFile(path, "w") as out:
        write_member(out, "data.pkl", mutate(state_dict_pickle(SPECS), changes))
        for key, (dtype, shape) in enumerate(SPECS.values()):
            write_member(out, f"data/{key}", bytes(math.prod(shape) * STORED_AS[dtype].itemsize))
    assert is_one_line(read_everything(open_torch_zip, path))


pickled_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@fuzz
@given(value=pickled_values, protocol=st.integers(0, 5), changes=edits, intact=st.booleans())
def test_pickles_of_anything(value, protocol, changes, intact):
    data = pickle.dumps(value, protocol)
    with pytest.raises(CheckpointError):
        read_tensor_pickle(data if intact else mutate(data, changes))


@fuzz
@given(data=st.lists(st.sampled_from(SPECIAL) | st.binary(max_size=6), max_size=40).map(b"".join))
def test_opcodes_at_random(data):
    try:
        complaint = "" if read_tensor_pickle(data) else "nothing found"
    except CheckpointError as error:
        complaint = str(error)
    assert complaint != "nothing found"
    assert is_one_line(complaint)

"""The tensor index of a `decoder.pth`: what is understood, and what is damaged."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import types
from typing import Any

import pytest

from soprano_cupy.checkpoint.tensor_pickle import read_tensor_pickle
from soprano_cupy.checkpoint.write_torch_zip import (
    global_opcode,
    state_dict_pickle,
    tensor_opcodes,
    text_opcode,
)
from soprano_cupy.errors import CheckpointError, UnsafePickleError

TENSOR = tensor_opcodes("0", "float32", 2, 0, (2,), (1,))


class Call:
    """Pickles as the call of a function; rest: state, list items and dict items of `__reduce__`."""

    def __init__(self, function: Any, *arguments: Any, rest: tuple[Any, ...] = ()) -> None:
        self.parts = (function, arguments, *rest)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off"),
        (b"\x80\x02", "cut off"),
        (b"\x80", "cut off or damaged in PROTO"),
        (b"X\xff\xff\xff\x7fabc", "cut off or damaged in BINUNICODE"),
        (b"\x8d" + b"\xff" * 8 + b"abc", "cut off or damaged in BINUNICODE8"),
        (b"\x8c\x02\xff\xff.", "cut off or damaged in SHORT_BINUNICODE"),
        (b"\x8b\xff\xff\xff\xff.", "cut off or damaged in LONG4"),
        (b"\xfe.", "is no opcode"),
        (b"\x80\x00.", "PROTO"),
        (b"\x80\x09.", "PROTO"),
        (b".", "does not end with one value"),
        (b"NN.", "does not end with one value"),
        (b"(N.", "does not end with one value"),
        (b"t.", "TUPLE before byte 1 makes no sense"),
        (b"u.", "SETITEMS"),
        (b"(u.", "SETITEMS"),
        (b"}(Nu.", "SETITEMS"),
        (b"}(NNu.", "SETITEMS"),
        (b"}(]Nu.", "SETITEMS"),
        (b"](NNu.", "SETITEMS"),
        (b"}s.", "SETITEM"),
        (b"NNs.", "SETITEM"),
        (b"}Na.", "APPEND"),
        (b"}(Ne.", "APPENDS"),
        (b"\x85.", "TUPLE1"),
        (b"N\x86.", "TUPLE2"),
        (b"N(N\x86.", "TUPLE2"),
        (b"h\x07.", "BINGET"),
        (b"q\x07.", "BINPUT"),
        (b"R.", "REDUCE"),
        (b"b.", "BUILD"),
        (b"\x93.", "STACK_GLOBAL"),
        (b"Q.", "BINPERSID"),
        (b"NQ.", "BINPERSID"),
        (b")Q.", "BINPERSID"),
        (
            b"("
            + text_opcode("storage")
            + global_opcode("torch._utils", "_rebuild_tensor_v2")
            + text_opcode("0")
            + text_opcode("cpu")
            + b"K\x01tQ.",
            "BINPERSID",
        ),
        (b"\x8a\x09" + b"\x01" * 9 + b".", "LONG1"),
        (b"\x8b\x00\x00\x10\x00" + b"\x01" * (1 << 20) + b".", "LONG4"),
        (b"N.", "does not hold named tensors"),
        (b"].", "does not hold named tensors"),
        (b"}.", "does not hold named tensors"),
        (b"}K\x01K\x02s.", "its entry a int is a int"),
        (b"}X\x01\x00\x00\x00aNs.", "its entry a is a NoneType where a tensor is expected"),
        (b"}X\x01\x00\x00\x00a" + b"]" * 1000 + b"a" * 999 + b"s.", "its entry a is a list"),
        (b"(" * 100_000, "cut off"),
        (b")" + b"\x85" * 200_000 + b".", "does not hold named tensors"),
        (b")q\x00" + b"h\x00h\x00\x86q\x00" * 100_000 + b".", "does not hold named tensors|does not end with one"),
        (bytes(3 << 20), "more than 2097152"),
    ],
)
def test_damaged_pickles(data, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensor_pickle(data)
    assert not isinstance(caught.value, UnsafePickleError)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "wrong",
    [
        tensor_opcodes("0", "float32", 2, -1, (2,), (1,)),
        tensor_opcodes("0", "float32", 2, 0, (-2,), (1,)),
        tensor_opcodes("0", "float32", 2, 0, (2,), (-1,)),
        tensor_opcodes("0", "float32", -2, 0, (2,), (1,)),
        tensor_opcodes("0", "float32", 1 << 60, 0, (2,), (1,)),
        tensor_opcodes("0", "float32", 2, 0, (1 << 60,), (1,)),
        tensor_opcodes("0", "float32", 2, 0, (2,), ()),
        TENSOR.replace(b"J\x02\x00\x00\x00", b"\x88"),
        TENSOR.replace(b"J\x02\x00\x00\x00", b"G@\x00\x00\x00\x00\x00\x00\x00"),
        TENSOR.replace(text_opcode("storage"), text_opcode("module")),
        TENSOR.replace(text_opcode("0"), b"K\x00"),
    ],
)
def test_tensors_that_cannot_be(wrong):
    before, after = b"\x80\x02}" + text_opcode("x"), b"s."
    assert read_tensor_pickle(before + TENSOR + after)["x"].shape == (2,)
    assert wrong != TENSOR
    with pytest.raises(CheckpointError, match="makes no sense"):
        read_tensor_pickle(before + wrong + after)


def test_every_prefix_of_a_valid_pickle_is_refused():
    data = state_dict_pickle({f"layer.{i}": ("float32", (3, i)) for i in range(1, 4)})
    assert len(read_tensor_pickle(data)) == 3
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            read_tensor_pickle(data[:length])


def test_real_pickler_output_is_understood():
    """All protocols of Python's own pickler, with stand-ins that print PyTorch's names."""
    module = types.ModuleType("torch._utils")
    rebuild = types.FunctionType((lambda *a: a).__code__, {}, "_rebuild_tensor_v2")
    module._rebuild_tensor_v2 = rebuild
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    storage_class = type("HalfStorage", (), {"__module__": "torch"})
    package = types.ModuleType("torch")
    package._utils, package.HalfStorage = module, storage_class

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", storage_class, "7", "cpu", 6) if isinstance(obj, storage_class) else None

    value = {"state_dict": {"w": Call(rebuild, storage_class(), 0, (2, 3), (3, 1), False, {})}, "epoch": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", package)
        patch.setitem(sys.modules, "torch._utils", module)
        for protocol in (2, 3, 4, 5):
            stream = io.BytesIO()
            Pickler(stream, protocol).dump(value)
            tensors = read_tensor_pickle(stream.getvalue())
            assert tensors["w"].shape == (2, 3)
            assert (tensors["w"].storage.key, tensors["w"].storage.dtype) == ("7", "float16")


def test_memo_growth_stays_in_proportion():
    """Many memo entries with huge indices are only entries of a dictionary."""
    body = b"".join(b"r" + struct.pack("<I", 0xFFFFFFFF - i) for i in range(50_000))
    with pytest.raises(CheckpointError, match="does not hold named tensors"):
        read_tensor_pickle(b"N" + body + b".")

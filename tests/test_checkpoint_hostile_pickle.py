"""A `decoder.pth` that asks for more than tensors is refused by name, and nothing of it is run."""

from __future__ import annotations

import contextlib
import copyreg
import marshal
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soprano_cupy.checkpoint.tensor_pickle import ALLOWED_GLOBALS, read_tensor_pickle
from soprano_cupy.checkpoint.torch_zip import open_torch_zip
from soprano_cupy.checkpoint.write_torch_zip import (
    global_opcode,
    tensor_opcodes,
    text_opcode,
    write_member,
)
from soprano_cupy.errors import UnsafePickleError

TENSOR = tensor_opcodes("0", "float32", 2, 0, (2,), (1,))


class Call:
    """Pickles as the call of a function; rest: state, list items and dict items of `__reduce__`."""

    def __init__(self, function: Any, *arguments: Any, rest: tuple[Any, ...] = ()) -> None:
        self.parts = (function, arguments, *rest)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


class WithState:
    """Pickles as an object whose state is set, which would run `__setstate__`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return WithState, (), {"armed": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CANARY.touch()


class Loaded:
    """Made by NEWOBJ or NEWOBJ_EX."""

    def __new__(cls, *_: Any, **__: Any) -> Loaded:
        CANARY.touch()
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ("x",), {"key": 1}


CANARY = Path("set by the fixture")


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(globals(), "CANARY", tmp_path / "canary")
    return tmp_path / "canary"


def touch_code(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


def call(function: bytes, *arguments: bytes) -> bytes:
    """Opcodes of a call, for what the pickler itself would not write."""
    return function + b"(" + b"".join(arguments) + b"tR"


def bytecode(path: Path) -> bytes:
    """A function made of marshalled bytecode, then called."""
    code = marshal.dumps(compile(touch_code(path), "x", "exec"))
    loaded = call(global_opcode("marshal", "loads"), b"B" + struct.pack("<I", len(code)) + code)
    return b"\x80\x03" + call(call(global_opcode("types", "FunctionType"), loaded, b"}")) + b"."


def getattr_chain(path: Path) -> bytes:
    module = call(global_opcode("builtins", "__import__"), text_opcode("os"))
    system = call(global_opcode("builtins", "getattr"), module, text_opcode("system"))
    return b"\x80\x02" + call(system, text_opcode(f"touch {path}")) + b"."


def instance(path: Path) -> bytes:
    return b"(" + text_opcode(f"touch {path}") + b"ios\nsystem\n."


def object_opcode(path: Path) -> bytes:
    return b"(" + global_opcode("os", "system") + text_opcode(f"touch {path}") + b"o."


def extension(path: Path) -> bytes:
    """The number that some program registered for os.system, behind EXT1."""
    return b"\x80\x02" + call(b"\x82" + bytes([EXTENSION]), text_opcode(f"touch {path}")) + b"."


EXTENSION = 240
PAYLOADS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os.system": (lambda path: Call(os.system, f"touch {path}"), r"posix\.system"),
    "eval": (lambda path: Call(eval, touch_code(path)), "eval"),
    "exec": (lambda path: Call(exec, touch_code(path)), "exec"),
    "open": (lambda path: Call(os.mkdir, str(path)), r"posix\.mkdir"),
    "nested": (lambda path: Call(len, Call(list, Call(map, eval, [touch_code(path)]))), "len"),
    "method": (lambda path: Call(Path.touch, path), "getattr|pathlib"),
    "state": (lambda path: WithState(), "WithState"),
    "new object": (lambda path: Loaded(), "Loaded|partial"),
    "list items": (lambda path: Call(list, rest=(None, iter([Call(os.system, f"touch {path}")]))), "list"),
    "dict value": (lambda path: {"x": Call(os.system, f"touch {path}")}, r"posix\.system"),
    "tuple": (lambda path: ("x", Call(eval, touch_code(path))), "eval"),
    "getattr chain": (getattr_chain, "__import__|getattr"),
    "bytecode": (bytecode, "FunctionType"),
    "INST": (instance, r"creates os\.system"),
    "OBJ": (object_opcode, r"asks for os\.system"),
    "EXT1": (extension, "uses EXT1"),
}


def payload(name: str, path: Path, protocol: int) -> bytes:
    """The pickle; making it may run what reading it must not."""
    value = PAYLOADS[name][0](path)
    data = value if isinstance(value, bytes) else pickle.dumps(value, protocol)
    path.unlink(missing_ok=True)
    return data


def archive(folder: Path, data: bytes, storages: dict[str, bytes] | None = None) -> Path:
    path = folder / "decoder.pth"
    with zipfile.ZipFile(path, "w") as out:
        write_member(out, "data.pkl", data)
        for key, content in ({"0": bytes(8)} if storages is None else storages).items():
            write_member(out, f"data/{key}", content)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_are_refused_by_name_and_not_run(tmp_path, canary, name, protocol):
    data = payload(name, canary, protocol)
    with pytest.raises(UnsafePickleError, match=PAYLOADS[name][1]) as caught:
        open_torch_zip(archive(tmp_path, data))
    assert not canary.exists()
    assert "nothing was run" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "decoder.pth") in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_are_dangerous_to_a_real_unpickler(canary, name, protocol):
    """The payloads do run when unpickled, so that their refusal means something."""
    data = payload(name, canary, protocol)
    copyreg.add_extension("os", "system", EXTENSION)
    try:
        with contextlib.suppress(TypeError):
            pickle.loads(data)
    finally:
        copyreg.remove_extension("os", "system", EXTENSION)
    assert canary.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_hidden_behind_a_tensor(tmp_path, canary, name):
    """As a further entry of a state dict, as its metadata, and in place of a storage, shape or hook."""
    inner = payload(name, canary, 2).removeprefix(b"\x80\x02").removeprefix(b"\x80\x03")[:-1]
    ordered = b"\x80\x02" + global_opcode("collections", "OrderedDict") + b")R"
    item = text_opcode("a") + TENSOR
    rebuild = global_opcode("torch._utils", "_rebuild_tensor_v2")
    for data in (
        ordered + b"(" + item + text_opcode("b") + inner + b"u.",
        ordered + b"(" + item + b"u}" + text_opcode("_metadata") + inner + b"sb.",
        b"\x80\x02}(" + item + text_opcode("b") + rebuild + b"(" + inner + b"K\x00K\x02\x85K\x01\x85\x89NtRu.",
        b"\x80\x02}" + text_opcode("b") + TENSOR[:-2] + inner + b"tRs.",
    ):
        with pytest.raises(UnsafePickleError):
            open_torch_zip(archive(tmp_path, data))
        assert not canary.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n(X\x02\x00\x00\x00lstR.", r"asks for os\.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.", r"asks for os\.system"),
        (b"(X\x02\x00\x00\x00lsios\nsystem\n.", r"creates os\.system"),
        (b"(cos\nsystem\nX\x02\x00\x00\x00lso.", r"asks for os\.system"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses NEWOBJ"),
        (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "uses NEWOBJ_EX"),
        (b"(ccollections\nOrderedDict\no.", "uses OBJ"),
        (b"\x82\x01.", "uses EXT1"),
        (b"\x83\x01\x00.", "uses EXT2"),
        (b"\x84\x01\x00\x00\x00.", "uses EXT4"),
        (b"P0\n.", "uses PERSID"),
        (b"\x80\x05\x97.", "uses NEXT_BUFFER"),
        (b"\x80\x04\x8f.", "uses EMPTY_SET"),
        (b"I" + b"9" * 100_000 + b"\n.", "uses INT"),
        (b"L" + b"9" * 100_000 + b"L\n.", "uses LONG"),
        (b"S'a'\n.", "uses STRING"),
        (b"B\x02\x00\x00\x00ls.", "uses BINBYTES"),
        (b"N2.", "uses DUP"),
        (b"N0.", "uses POP"),
        (b"\x80\x04)\x8c\x06system\x93.", "computes the name of a function"),
        (b"X\x02\x00\x00\x00ls)R.", "calls ls"),
        (b"ccollections\nOrderedDict\n]\x85R.", r"calls collections\.OrderedDict in an unknown way"),
        (
            b"ctorch._utils\n_rebuild_parameter\nK\x01\x85R.",
            r"calls torch\._utils\._rebuild_parameter in an unknown way",
        ),
        (b"ctorch\nFloatStorage\n)R.", r"calls torch\.FloatStorage in an unknown way"),
        (b"ccollections\nOrderedDict\nNR.", r"calls collections\.OrderedDict"),
        (b"ctorch\nFloatStorage\n}b.", r"sets the state of torch\.FloatStorage"),
        (b"}]b.", "sets the state of a dict"),
        (b"ctorch\nLongStorage\n.", r"asks for torch\.LongStorage"),
        (b"ctorch.hub\nload\n.", r"asks for torch\.hub\.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "_rebuild_tensor_v2.__globals__"),
        (b"ccollections\nOrderedDict.fromkeys\n.", r"OrderedDict\.fromkeys"),
        (b"cevil\n" + b"x" * 5000 + b"\n.", "asks for evil.x{50}"),
    ],
)
def test_other_opcodes_and_names(data, message):
    with pytest.raises(UnsafePickleError, match=message) as caught:
        read_tensor_pickle(data)
    assert len(str(caught.value)) < 300


def test_allowed_names_are_few():
    assert sorted(ALLOWED_GLOBALS) == [
        "collections.OrderedDict",
        "torch.BFloat16Storage",
        "torch.DoubleStorage",
        "torch.FloatStorage",
        "torch.HalfStorage",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor_v2",
    ]

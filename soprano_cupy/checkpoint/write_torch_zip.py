"""Write tensors as `torch.save` does, without PyTorch: for made-up checkpoints and for testing the reader."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from .convert_dtype import STORED_AS
from .tensor_pickle import STORAGE_DTYPES
from .write_file import replace_file

ROOT = "decoder"
STORAGE_ALIGNMENT = 64  # bytes, by padding the extra field of a member's local header
PADDING_FIELD = 0x4246
MODIFIED = (1980, 1, 1, 0, 0, 0)  # the same tensors give the same file

STORAGE_CLASSES = {dtype: name.removeprefix("torch.") for name, dtype in STORAGE_DTYPES.items()}


def write_torch_zip(
    path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], np.ndarray]
) -> None:
    """Write a state dict atomically, one tensor in memory at a time; arguments as in `write_safetensors`."""
    with replace_file(path) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        write_member(archive, "data.pkl", state_dict_pickle(specs))
        write_member(archive, "byteorder", b"little")
        for key, (name, (dtype, shape)) in enumerate(specs.items()):
            array = np.asarray(read(name), STORED_AS[dtype], order="C").reshape(shape)
            write_member(archive, f"data/{key}", array.reshape(-1).view(np.uint8).data)
        write_member(archive, "version", b"3\n")


def write_member(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Append one uncompressed file to the archive, its content aligned."""
    info = zipfile.ZipInfo(f"{ROOT}/{name}", MODIFIED)
    header_end = archive.start_dir + 30 + len(info.filename) + 4  # fixed part, name, head of the padding field
    padding = -header_end % STORAGE_ALIGNMENT
    info.extra = struct.pack("<HH", PADDING_FIELD, padding) + bytes(padding)
    archive.writestr(info, content)


def state_dict_pickle(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The index, pickle protocol 2: OrderedDict of name to _rebuild_tensor_v2(storage, 0, shape, strides, ...)."""
    parts = [b"\x80\x02", global_opcode("collections", "OrderedDict"), b")R("]
    for key, (name, (dtype, shape)) in enumerate(specs.items()):
        strides = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
        count = int(np.prod(shape, dtype=np.int64))
        parts.append(text_opcode(name) + tensor_opcodes(str(key), dtype, count, 0, shape, strides))
    return b"".join([*parts, b"u."])


def tensor_opcodes(
    key: str, dtype: str, count: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> bytes:
    """Opcodes that leave one tensor on the stack: a view of storage `key` of `count` elements."""
    storage = b"(" + text_opcode("storage") + global_opcode("torch", STORAGE_CLASSES[dtype])
    storage += text_opcode(key) + text_opcode("cpu") + integer_opcode(count) + b"tQ"
    arguments = storage + integer_opcode(offset) + _tuple_opcodes(shape) + _tuple_opcodes(strides)
    hooks = b"\x89" + global_opcode("collections", "OrderedDict") + b")R"
    return global_opcode("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + hooks + b"tR"


def global_opcode(module: str, name: str) -> bytes:
    """GLOBAL: the opcode that names a function or class."""
    return f"c{module}\n{name}\n".encode()


def text_opcode(text: str) -> bytes:
    """BINUNICODE."""
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer_opcode(value: int) -> bytes:
    """BININT, or LONG1 where it is too small."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple_opcodes(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(integer_opcode(value) for value in values) + b"t"

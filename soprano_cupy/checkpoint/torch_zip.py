"""`decoder.pth`: the zip archive that PyTorch writes, read without PyTorch.

- NAME/data.pkl: the index, a pickle that names the tensors and their storages
- NAME/data/KEY: one storage each, raw, uncompressed, 64-byte aligned
- NAME/byteorder: "little"; absent in files of older versions, which are little-endian too
- NAME/version and others, which are not needed
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from .convert_dtype import STORED_AS
from .tensor_pickle import MAX_PICKLE_BYTES, StorageReference, TensorReference, read_tensor_pickle
from .tensors import Storage, TensorEntry, TensorFile, map_file

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # signature ... length of name, length of extra field
LOCAL_SIGNATURE = b"PK\x03\x04"
ENCRYPTED = 0x1
MAX_MEMBERS = 1 << 16
MAX_DIMENSIONS = 8

_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, EOFError, struct.error)


def open_torch_zip(path: Path) -> TensorFile:
    """Map the tensors of a file written by `torch.save` (1.6 or later); nothing in it is run.

    `UnsafePickleError` when it asks for anything but tensors, else `CheckpointError`.
    """
    mapping = map_file(path)
    try:
        return TensorFile(path, mapping, _read_entries(mapping))
    except CheckpointError as error:
        mapping.close()
        raise type(error)(f"{path}: {error}") from error


def _read_entries(mapping: mmap.mmap) -> dict[str, TensorEntry]:
    members = _members(mapping)
    indices = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(indices) != 1:
        raise CheckpointError(f"it holds {len(indices)} data.pkl, expected 1; is it a PyTorch file?")
    root = indices[0].removesuffix("data.pkl")
    order = _content(mapping, members, root + "byteorder", 16) if root + "byteorder" in members else b"little"
    if order != b"little":
        raise CheckpointError(f"its byte order is {order!r}, only b'little' is supported")
    tensors = read_tensor_pickle(_content(mapping, members, root + "data.pkl", MAX_PICKLE_BYTES))
    storages = {tensor.storage: _storage(members, root, tensor.storage) for tensor in tensors.values()}
    entries = {name: _entry(name, tensor, storages[tensor.storage]) for name, tensor in tensors.items()}
    if sum(entry.count * STORED_AS[entry.dtype].itemsize for entry in entries.values()) > len(mapping):
        raise CheckpointError("its tensors share storages so much that they exceed the file's size")
    return entries


def _members(mapping: mmap.mmap) -> dict[str, Storage]:
    """The bytes of every file in the archive; each must be stored plainly, once, and inside the file."""
    if mapping[:4] != LOCAL_SIGNATURE:
        raise CheckpointError(
            "it is not a zip archive: cut off, or written by PyTorch before 1.6; download it again, "
            "or save it again with a current PyTorch"
        )
    try:
        with zipfile.ZipFile(mapping) as archive:  # type: ignore[call-overload]  # a mapping reads like a file
            infos = archive.infolist()
    except _ZIP_ERRORS as error:
        raise CheckpointError(f"its zip directory is missing or damaged ({error}); download it again") from error
    if len(infos) > MAX_MEMBERS:
        raise CheckpointError(f"its zip directory lists {len(infos)} files, more than {MAX_MEMBERS}")
    members: dict[str, Storage] = {}
    for info in infos:
        if info.filename in members:
            raise CheckpointError(f"its zip directory lists {info.filename!r} twice")
        members[info.filename] = _member(mapping, info)
    _check_overlap(members)
    return members


def _member(mapping: mmap.mmap, info: zipfile.ZipInfo) -> Storage:
    """Where a member's bytes are: behind its local header, which repeats its name."""
    if info.flag_bits & ENCRYPTED or info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise CheckpointError(f"{info.filename!r} is compressed or encrypted; PyTorch stores its files plainly")
    if info.header_offset < 0:
        raise CheckpointError(f"{info.filename!r} lies before the file; download it again")
    header = mapping[info.header_offset : info.header_offset + LOCAL_HEADER.size]
    if len(header) < LOCAL_HEADER.size or header[:4] != LOCAL_SIGNATURE:
        raise CheckpointError(f"the header of {info.filename!r} is missing; download it again")
    *_, name_length, extra_length = LOCAL_HEADER.unpack(header)
    name_start = info.header_offset + LOCAL_HEADER.size
    start = name_start + name_length + extra_length
    name = mapping[name_start : name_start + name_length]
    if name.decode("utf-8", "replace") != info.orig_filename or start + info.file_size > len(mapping):
        raise CheckpointError(f"{info.filename!r} is not where the zip directory says; download it again")
    return Storage(start, info.file_size, info.CRC)


def _check_overlap(members: Mapping[str, Storage]) -> None:
    end = 0
    for name, member in sorted(members.items(), key=lambda item: (item[1].start, item[1].size)):
        if member.start < end:
            raise CheckpointError(f"{name!r} overlaps another file of the archive")
        end = member.start + member.size


def _content(mapping: mmap.mmap, members: Mapping[str, Storage], name: str, limit: int) -> bytes:
    member = members[name]
    if member.size > limit:
        raise CheckpointError(f"{name!r} has {member.size} bytes, more than {limit}")
    content = mapping[member.start : member.start + member.size]
    if zlib.crc32(content) != member.crc32:
        raise CheckpointError(f"{name!r} is damaged (its CRC-32 differs); download it again")
    return content


def _storage(members: Mapping[str, Storage], root: str, reference: StorageReference) -> Storage:
    name = f"{root}data/{reference.key}"
    if name not in members:
        raise CheckpointError(f"{name!r} is missing from the archive; download it again")
    expected = reference.count * STORED_AS[reference.dtype].itemsize
    if members[name].size != expected:
        raise CheckpointError(f"{name!r} has {members[name].size} bytes, expected {expected}")
    return members[name]


def _entry(name: str, tensor: TensorReference, storage: Storage) -> TensorEntry:
    """Check that every element of the view lies inside its storage, and that none is repeated."""
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise CheckpointError(f"tensor {name} has {len(tensor.shape)} dimensions")
    if count and (last >= tensor.storage.count or count > tensor.storage.count):
        raise CheckpointError(f"tensor {name} of shape {tensor.shape} reaches beyond its storage")
    strides = None if _is_contiguous(tensor.shape, tensor.strides) else tensor.strides
    itemsize = STORED_AS[tensor.storage.dtype].itemsize
    return TensorEntry(tensor.storage.dtype, tensor.shape, storage, tensor.offset * itemsize, strides)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements follow each other in C order; the stride of a single row does not matter."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

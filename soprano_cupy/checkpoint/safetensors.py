"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors without gaps.

Read and written by our own code: NumPy has no bfloat16, so the format's own library would copy every
such tensor once more, and it writes only what lies in memory as a whole.
https://huggingface.co/docs/safetensors describes the format.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .convert_dtype import STORED_AS
from .tensors import Storage, TensorEntry, TensorFile, map_file
from .write_file import replace_file

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
CODES = {name: code for code, name in DTYPES.items()}
MAX_HEADER_BYTES = 8 << 20  # the 80M model's header has 22 thousand
MAX_DIMENSIONS = 8
DATA_ALIGNMENT = 8  # of the first tensor, by padding the header with spaces


def open_safetensors(path: Path) -> TensorFile:
    """Map a safetensors file after checking its whole header; `CheckpointError` says what is wrong."""
    mapping = map_file(path)
    try:
        return TensorFile(path, mapping, _read_entries(mapping))
    except _DamageError as error:
        mapping.close()
        raise CheckpointError(f"{path} is damaged: {error}; download it again") from None


def write_safetensors(
    path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], np.ndarray]
) -> None:
    """Write a safetensors file atomically, one tensor in memory at a time.

    specs: name to (dtype, shape). read: the tensor of a name as a C-contiguous array, bfloat16 as uint16.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + math.prod(shape) * STORED_AS[dtype].itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % DATA_ALIGNMENT)
    with replace_file(path) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, (dtype, shape) in specs.items():
            array = np.asarray(read(name), STORED_AS[dtype], order="C")
            if array.shape != tuple(shape):
                raise CheckpointError(f"tensor {name} has shape {array.shape}, expected {tuple(shape)}")
            stream.write(array.reshape(-1).view(np.uint8).data)


class _DamageError(ValueError):
    """What is wrong with the header, to be told together with the path."""


def _read_entries(mapping: mmap.mmap) -> dict[str, TensorEntry]:
    if len(mapping) < 8:
        raise _DamageError("it ends inside its first 8 bytes")
    (size,) = struct.unpack("<Q", mapping[:8])
    if size > MAX_HEADER_BYTES:
        raise _DamageError(f"its header claims {size} bytes, more than {MAX_HEADER_BYTES}; this is no safetensors file")
    if 8 + size > len(mapping):
        raise _DamageError("it ends inside its header")
    header = _parse(mapping[8 : 8 + size])
    entries = {name: _entry(name, value, 8 + size) for name, value in header.items() if name != "__metadata__"}
    if not entries:
        raise _DamageError("it holds no tensors")
    _check_layout(entries, 8 + size, len(mapping))
    return entries


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except _DamageError:
        raise
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise _DamageError(f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _DamageError("its header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _DamageError("its header names something twice")
    return result


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _DamageError(f"tensor {name} needs dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise _DamageError(f"tensor {name} has dtype {value['dtype']!r}, supported are {', '.join(DTYPES)}")
    shape = _sizes(value["shape"], f"shape of tensor {name}")
    offsets = _sizes(value["data_offsets"], f"data_offsets of tensor {name}")
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise _DamageError(f"tensor {name} has {len(shape)} dimensions and {len(offsets)} offsets")
    start, end = offsets
    if end - start != math.prod(shape) * STORED_AS[dtype].itemsize:
        raise _DamageError(f"tensor {name} of shape {shape} does not fill its {end - start} bytes")
    return TensorEntry(dtype, shape, Storage(data_start + start, end - start))


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int or not 0 <= item < 1 << 48 for item in value):
        raise _DamageError(f"the {what} is not a list of sizes")
    return tuple(value)


def _check_layout(entries: Mapping[str, TensorEntry], data_start: int, file_size: int) -> None:
    """The tensors cover the rest of the file without gap or overlap, as the format demands."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].storage.start, item[1].storage.size)):
        if entry.storage.start != end:
            raise _DamageError(f"tensor {name} overlaps another or follows a gap")
        end += entry.storage.size
    if end != file_size:
        raise _DamageError(f"it has {file_size} bytes where its header promises {end}")

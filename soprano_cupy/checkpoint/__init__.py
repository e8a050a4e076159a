"""From the files of a checkpoint folder to named tensors.

- tensors.py: `TensorFile`, shapes and arrays of one mapped file
- safetensors.py: model.safetensors, decoder.safetensors
- torch_zip.py: decoder.pth; its index is read by tensor_pickle.py, nothing is executed
- shapes.py: the tensors that a configuration calls for, and a decoder's configuration from its tensors
- hub.py: downloads; resolve.py: which checkpoint a name means
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError
from .resolve import ResolvedModel, resolve_model
from .safetensors import open_safetensors, write_safetensors
from .shapes import decoder_config, decoder_shapes, language_model_shapes
from .tensors import TensorFile
from .torch_zip import open_torch_zip

__all__ = [
    "ResolvedModel",
    "TensorFile",
    "convert",
    "decoder_config",
    "decoder_shapes",
    "language_model_shapes",
    "open_decoder",
    "open_language_model",
    "resolve_model",
]

LANGUAGE_MODEL = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
DECODER = "decoder.safetensors"
DECODER_PICKLE = "decoder.pth"


def open_language_model(folder: str | os.PathLike[str]) -> TensorFile:
    """The tensors of `model.safetensors`, under Hugging Face's names for Qwen3."""
    folder = _folder(folder)
    path = folder / LANGUAGE_MODEL
    if not path.exists() and (folder / SHARD_INDEX).exists():
        raise CheckpointError(f"{folder} holds a model in several files; save it as one {LANGUAGE_MODEL}")
    return open_safetensors(path)


def open_decoder(folder: str | os.PathLike[str]) -> TensorFile:
    """The decoder's tensors, from `decoder.safetensors` where present, else from `decoder.pth`."""
    folder = _folder(folder)
    if (folder / DECODER).exists():
        return open_safetensors(folder / DECODER)
    if (folder / DECODER_PICKLE).exists():
        return open_torch_zip(folder / DECODER_PICKLE)
    raise CheckpointError(f"{folder} holds neither {DECODER} nor {DECODER_PICKLE}; download the checkpoint again")


def convert(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write `decoder.pth` of `folder` as safetensors, every value and dtype kept; returns the new file.

    out: a file, or a folder that gets a `decoder.safetensors`; by default `folder` itself. What is there is
    replaced in one step, once everything is written.
    """
    folder = _folder(folder)
    target = Path(folder if out is None else out)
    if target.is_dir():
        target = target / DECODER
    with open_torch_zip(folder / DECODER_PICKLE) as file:
        decoder_config(file)
        specs = {name: (file.dtype(name), file.shape(name)) for name in sorted(file.names())}
        write_safetensors(target, specs, lambda name: file.pop(name, file.shape(name), file.dtype(name)))
    return target


def _folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is {'not a folder' if path.exists() else 'missing'}; name a checkpoint's folder")
    return path

"""The same checkpoint through each implementation: what the tests of all of them share."""

from __future__ import annotations

from pathlib import Path

import pytest

from soprano_cupy import Qwen3, VocosDecoder
from soprano_cupy.attention import select_attention
from soprano_cupy.checkpoint import decoder_config, open_decoder, open_language_model
from soprano_cupy.config import ModelConfig
from soprano_cupy.portable.qwen3 import PortableLanguageModel
from soprano_cupy.portable.vocos import PortableDecoder

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
FLOAT64 = ["portable", GPU]  # array code on NumPy, and on CuPy
FLOAT32 = ["cpu", *FLOAT64]  # and the compiled CPU engine


def load_language_model(folder: Path, place: str, dtype: str = "float32") -> Qwen3:
    """`cpu`, `cuda` as users get them, or `portable`: array code on NumPy."""
    if place != "portable":
        return Qwen3.load(folder, place, dtype)
    choice = select_attention("standard", dtype=dtype)
    with open_language_model(folder) as file:
        config = ModelConfig.from_folder(folder)
        return Qwen3(PortableLanguageModel(file, config, "cpu", dtype, choice, "test"))


def load_decoder(folder: Path, place: str, dtype: str = "float32") -> VocosDecoder:
    """The same for the decoder."""
    if place != "portable":
        return VocosDecoder.load(folder, place, dtype)
    with open_decoder(folder) as file:
        return VocosDecoder(PortableDecoder(file, decoder_config(file), "cpu", dtype, "test"))

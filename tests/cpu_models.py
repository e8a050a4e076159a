"""Small random models on every engine, for the CPU engine's tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soprano_cupy.attention import select_attention
from soprano_cupy.checkpoint import decoder_config, open_decoder, open_language_model
from soprano_cupy.config import DecoderConfig, ModelConfig
from soprano_cupy.cpu.qwen3 import CpuLanguageModel
from soprano_cupy.cpu.vocos import CpuDecoder
from soprano_cupy.portable.qwen3 import PortableLanguageModel
from soprano_cupy.portable.vocos import PortableDecoder
from soprano_cupy.runner import LanguageModelRunner
from soprano_cupy.testing import TINY, TINY_DECODER

# Sizes that fill no tile: odd everything, more heads in a group than attention takes at once, one head alone.
CONFIGS: dict[str, ModelConfig] = {
    "grouped": TINY,
    "odd": dataclasses.replace(
        TINY, vocab_size=131, hidden_size=45, num_heads=3, num_kv_heads=1, head_dim=22, intermediate_size=67
    ),
    "many_heads": dataclasses.replace(
        TINY, hidden_size=64, num_heads=28, num_kv_heads=1, head_dim=16, num_layers=1, tie_embeddings=True
    ),
    "wide_heads": dataclasses.replace(TINY, num_heads=2, num_kv_heads=2, head_dim=520, num_layers=1),
}
DECODERS: dict[str, DecoderConfig] = {
    "tiny": TINY_DECODER,
    "odd": dataclasses.replace(TINY_DECODER, input_size=37, dim=35, intermediate_size=51, embed_kernel=3),
    "wide_kernels": dataclasses.replace(TINY_DECODER, embed_kernel=7, block_kernel=5),
    "other_fft": dataclasses.replace(TINY_DECODER, n_fft=120, hop_length=30, embed_kernel=5),
    "prime_fft": dataclasses.replace(TINY_DECODER, n_fft=44, hop_length=11, num_blocks=1),
}


def language_model(folder: Path, dtype: str = "float32", isa: str | None = None) -> CpuLanguageModel:
    with open_language_model(folder) as file:
        return CpuLanguageModel(file, ModelConfig.from_folder(folder), dtype, isa=isa)


def portable_model(folder: Path, dtype: str) -> PortableLanguageModel:
    config = ModelConfig.from_folder(folder)
    choice = select_attention(
        "standard",
        device="cpu",
        dtype=dtype,
        head_dim=config.head_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
    )
    with open_language_model(folder) as file:
        return PortableLanguageModel(file, config, "cpu", dtype, choice, "oracle")


def decoder(folder: Path, dtype: str = "float32", isa: str | None = None) -> CpuDecoder:
    with open_decoder(folder) as file:
        return CpuDecoder(file, decoder_config(file), dtype, isa=isa)


def portable_decoder(folder: Path, dtype: str) -> PortableDecoder:
    with open_decoder(folder) as file:
        return PortableDecoder(file, decoder_config(file), "cpu", dtype, "oracle")


def prompt(config: ModelConfig, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(0, config.vocab_size, length).astype(np.int32)


def run(model: LanguageModelRunner, prompts: Sequence[np.ndarray], *, last_only: bool = False) -> Any:
    """States of prompts through one `extend`, in a cache full of NaN where the engine has one."""
    cache = model.new_cache(len(prompts), max(len(ids) for ids in prompts))
    poison(cache)
    return extend(model, cache, prompts, last_only=last_only)


def extend(model: LanguageModelRunner, cache: Any, pieces: Sequence[np.ndarray], *, last_only: bool = False) -> Any:
    starts = np.concatenate(([0], np.cumsum([len(ids) for ids in pieces]))).astype(np.int32)
    return model.extend(cache, np.concatenate(pieces), starts, last_only=last_only)


def poison(cache: Any) -> None:
    if hasattr(cache, "values") and hasattr(cache.values, "poison"):
        cache.values.poison()

"""The sizes of a model, read from its files once and passed around frozen.

Formats: Hugging Face `config.json` of `Qwen3ForCausalLM`; Vocos decoder sizes follow from tensor shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError

SAMPLE_RATE_HZ = 32_000
N_FFT = 2048
HOP_LENGTH = 512  # samples from one spectrogram frame to the next
FRAMES_PER_TOKEN = 4
TOKEN_SAMPLES = HOP_LENGTH * FRAMES_PER_TOKEN  # 2,048 samples = 64 ms
MAX_NEW_TOKENS = 512  # the reference's limit for one sentence


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; `CheckpointError` when it is missing, unreadable or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download the checkpoint again")
    return value


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Qwen3 language model, named as in `config.json`."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    eos_token_id: int

    @property
    def group_size(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def rope_frequencies(self) -> np.ndarray:
        """Radians that each of the head_dim / 2 rotary pairs turns per position, float64 (Su et al., 2021)."""
        return self.rope_theta ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `config.json` and, for the end token, `generation_config.json` of a checkpoint folder."""
        folder = Path(folder)
        raw = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        if generation.is_file():
            raw = {"eos_token_id": read_json(generation).get("eos_token_id"), **_without_none(raw)}
        return cls.from_dict(raw, source=folder / "config.json")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str | Path = "config.json") -> ModelConfig:
        """Check every value that the forward pass relies on; `CheckpointError` names the first wrong one."""
        read = _Reader(raw, str(source))
        read.architecture()
        heads = read.size("num_attention_heads", 1024)
        hidden = read.size("hidden_size", 1 << 16)
        config = cls(
            vocab_size=read.size("vocab_size", 1 << 22),
            hidden_size=hidden,
            num_layers=read.size("num_hidden_layers", 1024),
            num_heads=heads,
            num_kv_heads=read.size("num_key_value_heads", 1024, default=heads),
            head_dim=read.size("head_dim", 1024, default=max(hidden // heads, 1)),
            intermediate_size=read.size("intermediate_size", 1 << 20),
            max_positions=read.size("max_position_embeddings", 1 << 24),
            rope_theta=read.rope_theta(),
            rms_norm_eps=read.positive("rms_norm_eps", 1e-6),
            tie_embeddings=read.flag("tie_word_embeddings", default=False),
            eos_token_id=read.token("eos_token_id"),
        )
        if config.num_heads % config.num_kv_heads:
            read.refuse("num_key_value_heads", f"must divide num_attention_heads = {config.num_heads}")
        if config.head_dim % 2:
            read.refuse("head_dim", "must be even for rotary embeddings")
        if config.eos_token_id >= config.vocab_size:
            read.refuse("eos_token_id", f"must be below vocab_size = {config.vocab_size}")
        return config


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Vocos decoder, all taken from the shapes of its tensors."""

    input_size: int  # the language model's hidden size
    dim: int
    intermediate_size: int
    num_blocks: int
    embed_kernel: int  # width of the first convolution: 1 in Soprano-1.1-80M, 3 in Soprano-80M
    block_kernel: int = 3
    n_fft: int = N_FFT
    hop_length: int = HOP_LENGTH
    frames_per_token: int = FRAMES_PER_TOKEN

    @property
    def num_bins(self) -> int:
        return self.n_fft // 2 + 1

    @property
    def token_samples(self) -> int:
        return self.hop_length * self.frames_per_token


def _without_none(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if value is not None}


class _Reader:
    """Typed access to one JSON object with errors that name the file, the key and the value."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def refuse(self, key: str, why: str) -> None:
        raise CheckpointError(f"{self.source}: {key} = {self.raw.get(key)!r} {why}")

    def architecture(self) -> None:
        """Refuse what the forward pass does not compute, rather than compute something else."""
        names = self.raw.get("architectures")
        if self.raw.get("model_type", "qwen3") != "qwen3":
            self.refuse("model_type", "is not supported; only qwen3 checkpoints are")
        if names is not None and "Qwen3ForCausalLM" not in (names if isinstance(names, list) else [names]):
            self.refuse("architectures", "is not supported; only Qwen3ForCausalLM is")
        if self.raw.get("hidden_act", "silu") != "silu":
            self.refuse("hidden_act", "is not supported; only silu is")
        if self.raw.get("attention_bias"):
            self.refuse("attention_bias", "is not supported; Soprano's projections have no bias")
        if self.raw.get("use_sliding_window"):
            self.refuse("use_sliding_window", "is not supported; Soprano attends to the whole text")
        for key in ("rope_scaling", "rope_parameters"):
            scaling = self.raw.get(key)
            kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else None
            if scaling is not None and kind != "default":
                self.refuse(key, "is not supported; only plain rotary embeddings are")

    def size(self, key: str, limit: int, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            self.refuse(key, f"must be a whole number from 1 to {limit}")
        return int(value)  # type: ignore[arg-type]

    def positive(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            self.refuse(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return bool(value)

    def token(self, key: str) -> int:
        value = self.raw.get(key)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.refuse(key, "must be one token id")
        return int(value)  # type: ignore[arg-type]

    def rope_theta(self) -> float:
        """`rope_theta` at the top level (transformers 4) or inside `rope_parameters` (transformers 5)."""
        nested = self.raw.get("rope_parameters")
        if "rope_theta" not in self.raw and isinstance(nested, Mapping) and "rope_theta" in nested:
            return _Reader(nested, f"{self.source} rope_parameters").positive("rope_theta", 10_000.0)
        return self.positive("rope_theta", 10_000.0)

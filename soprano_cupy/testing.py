"""Random checkpoints of any size in the published formats, for tests and benchmarks.

They say nothing intelligible, but they behave: logits far enough apart for one greedy path on every
engine, states that move as much as a real voice's, audio between -1 and 1, sentences that end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from .checkpoint.convert_dtype import float32_to_bfloat16
from .checkpoint.safetensors import write_safetensors
from .checkpoint.shapes import WINDOW, Shapes, decoder_shapes, language_model_shapes
from .checkpoint.write_file import replace_file
from .checkpoint.write_torch_zip import write_torch_zip
from .config import DecoderConfig, ModelConfig
from .errors import ParameterError

STOP_TOKEN = 3
SPECIAL_TOKENS = ("[UNK]", "[TEXT]", "[START]", "[STOP]")  # ids 0 to 3
CHARACTERS = [chr(code) for code in range(32, 127) if not chr(code).isupper()]
MERGES = (
    "t h",
    "th e",
    "i n",
    "e r",
    "a n",
    "o u",
    "r e",
    "in g",
    "o n",
    "e n",
    "h e",
    "l l",
    "s t",
    "o r",
    "a t",
    "w e",
)
MIN_VOCAB = len(SPECIAL_TOKENS) + 1 + len(CHARACTERS) + len(MERGES)

SOPRANO_1_1_80M = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    num_layers=17,
    num_heads=4,
    num_kv_heads=1,
    head_dim=128,
    intermediate_size=2304,
    max_positions=1024,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    eos_token_id=STOP_TOKEN,
)
SOPRANO_1_1_80M_DECODER = DecoderConfig(512, dim=768, intermediate_size=2304, num_blocks=8, embed_kernel=1)
SOPRANO_80M = dataclasses.replace(SOPRANO_1_1_80M, max_positions=512)
SOPRANO_80M_DECODER = DecoderConfig(512, dim=512, intermediate_size=1536, num_blocks=8, embed_kernel=3)
TINY = ModelConfig(
    vocab_size=256,
    hidden_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=112,
    max_positions=1024,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
    eos_token_id=STOP_TOKEN,
)
TINY_DECODER = DecoderConfig(48, dim=40, intermediate_size=104, num_blocks=2, embed_kernel=1)

LOGIT_STD = 4.0
STATE_STEP = 1000.0  # L1 distance of two unrelated states; the loop check calls under 300 stuck
STUCK_STATE_STEP = 100.0
AUDIO_RMS = 0.1
LOG_MAGNITUDE_STD = 1.0
STOP_HANDICAP = 1.35  # found by trying: its repetition penalty of 1.2, as it is in every prompt, and a little more


def make_checkpoint(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    config: ModelConfig = TINY,
    decoder: DecoderConfig | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: str = "bfloat16",
    decoder_dtype: str = "float32",
    decoder_format: str = "pth",
    mean_tokens: int | None = 24,
    stuck: bool = False,
) -> Path:
    """Write a whole checkpoint into `folder` (made if needed) and return it; the same seed gives the same files.

    decoder: by default the one published with an 80M `config`, else a tiny one of the right input size.
    tokenizer: a tokenizer.json to copy, by default a small one of exactly vocab_size ids.
    dtype, decoder_dtype: of the weights, "bfloat16", "float16", "float32" or "float64".
    decoder_format: "pth" as published, or "safetensors".
    mean_tokens: about how many tokens a sentence gets, at temperature 0 very roughly; None: it hardly ever ends.
    stuck: consecutive states lie so close together that the loop check sees a stuck voice.
    """
    if decoder is None:
        decoder = _default_decoder(config)
    if decoder.input_size != config.hidden_size:
        raise ParameterError(f"decoder.input_size = {decoder.input_size} is not hidden_size = {config.hidden_size}")
    if decoder_format not in ("pth", "safetensors"):
        raise ParameterError(f"decoder_format = {decoder_format!r} is neither pth nor safetensors")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model = _LanguageModelWeights(seed, config, mean_tokens, stuck)
    model.write(write_safetensors, path / "model.safetensors", language_model_shapes(config), dtype)
    voice = _DecoderWeights(seed, decoder, model.state_scale)
    write = write_torch_zip if decoder_format == "pth" else write_safetensors
    voice.write(write, path / f"decoder.{decoder_format}", decoder_shapes(decoder), decoder_dtype)
    text = tokenizer_json(config.vocab_size) if tokenizer is None else Path(tokenizer).read_text(encoding="utf-8")
    _write_text(path / "tokenizer.json", text)
    _write_text(path / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    _write_text(path / "generation_config.json", json.dumps({"eos_token_id": config.eos_token_id}))
    _write_text(path / "config.json", json.dumps(config_json(config, dtype), indent=1))
    return path


def config_json(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """`config.json` in Hugging Face's words; `ModelConfig.from_dict` reads it back."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "eos_token_id": config.eos_token_id,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "dtype": dtype,
    }


def tokenizer_json(vocab_size: int) -> str:
    """A byte-pair tokenizer laid out like the published one: special, audio, then text pieces, `vocab_size` in all."""
    if vocab_size < MIN_VOCAB:
        raise ParameterError(
            f"vocab_size = {vocab_size} is too small for the made-up tokenizer; {MIN_VOCAB} is the least"
        )
    audio = [f"[{code}]" for code in range(vocab_size - MIN_VOCAB + 1)]
    fixed = [*SPECIAL_TOKENS, *audio]
    pieces = [*fixed, *CHARACTERS, *(merge.replace(" ", "") for merge in MERGES)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    whitespace = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    words = {"type": "Split", "pattern": {"Regex": r"\s+|\w+|[^\w\s]+"}, "behavior": "Isolated", "invert": False}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in enumerate(fixed)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, whitespace]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, words]},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "[UNK]",
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": list(MERGES),
        },
    }
    return json.dumps(description)


class _Weights:
    """Random tensors by name; each has its own random numbers, so their order does not matter."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        raise NotImplementedError

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> np.ndarray:
        """float32 of `shape`, scaled in place."""
        values = np.random.default_rng([self.seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        return values

    def write(self, writer: Callable[..., None], path: Path, shapes: Shapes, dtype: str) -> None:
        def read(name: str) -> np.ndarray:
            values = self.tensor(name, shapes[name])
            return float32_to_bfloat16(values) if dtype == "bfloat16" else values

        writer(path, {name: (dtype, shape) for name, shape in shapes.items()}, read)


class _LanguageModelWeights(_Weights):
    """Unit variance from layer to layer; the final norm sets how far apart states are, the head the logits."""

    def __init__(self, seed: int, config: ModelConfig, mean_tokens: int | None, stuck: bool) -> None:
        super().__init__(seed)
        self.config = config
        self.mean_tokens = mean_tokens
        step = STUCK_STATE_STEP if stuck else STATE_STEP
        # Two unrelated states of H normal values differ by 2 / sqrt(pi) per value on average.
        self.state_scale = step / (config.hidden_size * 2 / math.sqrt(math.pi))
        self.head_std = LOGIT_STD / (self.state_scale * math.sqrt(config.hidden_size))
        # What embeddings and layers add to the residual stream, each as much as the others.
        self.residual_std = self.head_std if config.tie_embeddings else 1.0

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        head = "model.embed_tokens.weight" if self.config.tie_embeddings else "lm_head.weight"
        if name == head:
            values = self.normal(name, shape, self.head_std)
            values[self.config.eos_token_id] *= self._stop_gain()
            return values
        if name == "model.norm.weight":
            return self._final_norm(name, shape)
        if len(shape) == 1:
            return self.normal(name, shape, 0.1, 1.0)
        if "embed" in name:
            return self.normal(name, shape, self.residual_std)
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        return self.normal(name, shape, (self.residual_std if adds else 1.0) / math.sqrt(shape[1]))

    def _final_norm(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Half of the signs are negative with tied embeddings, else each token would call for itself again:
        its embedding is in the state and would meet itself in the head."""
        values = self.normal(name, shape, 0.1 * self.state_scale, self.state_scale)
        if self.config.tie_embeddings:
            values[::2] *= -1
        return values

    def _stop_gain(self) -> float:
        """How much larger the stop token's logits are, for it to win one step in `mean_tokens`."""
        if self.mean_tokens is None:
            return 0.1
        best_of_others = NormalDist().inv_cdf(1 - 1 / self.config.vocab_size)
        needed = NormalDist().inv_cdf(1 - 1 / max(self.mean_tokens, 3))
        return STOP_HANDICAP * best_of_others / needed


class _DecoderWeights(_Weights):
    """Unit variance through the blocks; the head's bias sets the loudness."""

    def __init__(self, seed: int, config: DecoderConfig, state_scale: float) -> None:
        super().__init__(seed)
        self.config = config
        self.state_scale = state_scale

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == WINDOW:
            return np.hanning(shape[0] + 1)[:-1].astype(np.float32)
        if name == "head.out.bias":
            return self._head_bias(name, shape)
        if name == "decoder.embed.weight":
            return self.normal(name, shape, 1 / (self.state_scale * math.sqrt(shape[1] * shape[2])))
        if name.endswith("gamma"):
            return self.normal(name, shape, 0.1, 0.5)
        if name.endswith("norm.weight"):
            return self.normal(name, shape, 0.1, 1.0)
        if name.endswith("bias"):
            return self.normal(name, shape, 0.1)
        return self.normal(name, shape, 1 / math.sqrt(math.prod(shape[1:])))

    def _head_bias(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Log-magnitudes around the loudness wanted, phases all around the circle.

        With magnitudes of mean square M, n_fft of them make frames of variance M / n_fft, and overlapping
        windows leave 1 / 1.5 of that: M = 1.5 n_fft rms^2 = exp(2 mean + 2 std^2).
        """
        bias = self.normal(name, shape, math.pi)
        mean = math.log(1.5 * self.config.n_fft * AUDIO_RMS**2) / 2 - LOG_MAGNITUDE_STD**2
        bias[: self.config.num_bins] = self.normal(f"{name}.magnitude", (self.config.num_bins,), 0.3, mean)
        return bias


def _default_decoder(config: ModelConfig) -> DecoderConfig:
    if config == SOPRANO_80M:
        return SOPRANO_80M_DECODER
    if config == SOPRANO_1_1_80M:
        return SOPRANO_1_1_80M_DECODER
    return dataclasses.replace(TINY_DECODER, input_size=config.hidden_size)


def _write_text(path: Path, text: str) -> None:
    with replace_file(path) as stream:
        stream.write(text.encode())

"""Random checkpoints of any size in the published formats, for tests and benchmarks.

They say nothing intelligible, but they behave: logits far enough apart for one greedy path on every
engine, states that move as much as a real voice's, audio between -1 and 1, sentences that end.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from .checkpoint.convert_dtype import STORED_AS
from .checkpoint.random_weights import DecoderWeights, LanguageModelWeights
from .checkpoint.safetensors import write_safetensors
from .checkpoint.shapes import decoder_shapes, language_model_shapes
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
    for name, value, allowed in (
        ("dtype", dtype, tuple(STORED_AS)),
        ("decoder_dtype", decoder_dtype, tuple(STORED_AS)),
        ("decoder_format", decoder_format, ("pth", "safetensors")),
    ):
        if value not in allowed:
            raise ParameterError(f"{name} = {value!r} is not one of {', '.join(allowed)}")
    text = tokenizer_json(config.vocab_size) if tokenizer is None else Path(tokenizer).read_text(encoding="utf-8")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model = LanguageModelWeights(seed, config, mean_tokens, stuck)
    model.write(write_safetensors, path / "model.safetensors", language_model_shapes(config), dtype)
    voice = DecoderWeights(seed, decoder, model.state_scale)
    write = write_torch_zip if decoder_format == "pth" else write_safetensors
    voice.write(write, path / f"decoder.{decoder_format}", decoder_shapes(decoder), decoder_dtype)
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


def _default_decoder(config: ModelConfig) -> DecoderConfig:
    if config == SOPRANO_80M:
        return SOPRANO_80M_DECODER
    if config == SOPRANO_1_1_80M:
        return SOPRANO_1_1_80M_DECODER
    return dataclasses.replace(TINY_DECODER, input_size=config.hidden_size)


def _write_text(path: Path, text: str) -> None:
    with replace_file(path) as stream:
        stream.write(text.encode())

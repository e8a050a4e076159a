"""Reading config.json: every wrong value is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soprano_cupy import CheckpointError
from soprano_cupy.config import ModelConfig

GOOD: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 17,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "intermediate_size": 2304,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}


def test_published_configuration(shared_dir: Path) -> None:
    config = ModelConfig.from_folder(shared_dir / "soprano-1.1-80m")
    assert config == ModelConfig.from_dict(GOOD)
    assert config == ModelConfig(8192, 512, 17, 4, 1, 128, 2304, 1024, 10000.0, 1e-6, False, 3)
    assert (config.group_size, config.q_size, config.kv_size) == (4, 512, 128)


def test_defaults_and_both_places_of_rope_theta() -> None:
    raw = {k: v for k, v in GOOD.items() if k not in ("head_dim", "num_key_value_heads", "rope_theta")}
    config = ModelConfig.from_dict(raw)
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (128, 4, 10000.0)
    nested = ModelConfig.from_dict(raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert nested.rope_theta == 5e5


def test_rotary_frequencies() -> None:
    frequencies = ModelConfig.from_dict(GOOD).rope_frequencies()
    assert frequencies.shape == (64,)
    np.testing.assert_allclose(frequencies[[0, 16, 32, 48]], [1, 0.1, 0.01, 0.001], rtol=1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("architectures", ["LlamaForCausalLM"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4}),
        ("vocab_size", 0),
        ("vocab_size", None),
        ("hidden_size", "512"),
        ("hidden_size", 512.0),
        ("hidden_size", 10**9),
        ("num_hidden_layers", True),
        ("num_attention_heads", -4),
        ("num_key_value_heads", 3),
        ("head_dim", 127),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "small"),
        ("rope_theta", float("nan")),
        ("rope_theta", float("inf")),
        ("tie_word_embeddings", 1),
        ("eos_token_id", 8192),
        ("eos_token_id", [1, 2]),
        ("eos_token_id", None),
    ],
)
def test_wrong_values_are_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {key} = "):
        ModelConfig.from_dict(GOOD | {key: value})


def test_end_token_from_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in GOOD.items() if k != "eos_token_id"}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert ModelConfig.from_folder(tmp_path).eos_token_id == 7


@pytest.mark.parametrize("content", ["", "{", "[]", "null", b"\xff\xfe", "[" * 100_000])
def test_damaged_json(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        ModelConfig.from_folder(tmp_path)

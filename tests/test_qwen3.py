"""The public language model: shapes, raggedness, the cache, and every wrong argument named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numerics import relative_error
from runners import FLOAT32, FLOAT64, load_language_model

from soprano_cupy import DeviceError, ParameterError, Qwen3
from soprano_cupy.device import to_host
from soprano_cupy.testing import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, seed=7)
    return path


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Qwen3:
    return load_language_model(folder, "portable", "float64")


def random_ids(model: Qwen3, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, model.config.vocab_size, shape).astype(np.int32)


@pytest.mark.parametrize("device", FLOAT32)
@pytest.mark.parametrize("length", [1, 2, 17, 130])
def test_float32_against_float64(folder: Path, oracle: Qwen3, device: str, length: int) -> None:
    ids = random_ids(oracle, 2, length)
    expected_states, expected_logits = oracle.forward(ids)
    states, logits = load_language_model(folder, device).forward(ids)
    assert states.shape == (2, length, oracle.config.hidden_size)
    assert logits.shape == (2, length, oracle.config.vocab_size)
    assert states.dtype == logits.dtype == np.float32
    assert relative_error(to_host(states), expected_states) <= 2e-6
    assert relative_error(to_host(logits), expected_logits) <= 2e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_against_plain_arithmetic(folder: Path, oracle: Qwen3, dtype: str) -> None:
    """At most twice the error of an implementation that rounds after every operation."""
    ids = random_ids(oracle, 3, 60)
    expected_states, expected_logits = oracle.forward(ids)
    states, logits = Qwen3.load(folder, "cuda", dtype).forward(ids)
    plain_states, plain_logits = plain_forward(folder, ids, dtype)
    assert relative_error(to_host(states), expected_states) <= 2 * relative_error(plain_states, expected_states)
    assert relative_error(to_host(logits), expected_logits) <= 2 * relative_error(plain_logits, expected_logits)


def plain_forward(folder: Path, ids: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The forward pass as a straightforward 16-bit model computes it: each operation's result is rounded."""
    from soprano_cupy.checkpoint import open_language_model
    from soprano_cupy.config import ModelConfig
    from soprano_cupy.portable.qwen3 import storage_dtype

    c, kind = ModelConfig.from_folder(folder), storage_dtype(dtype)

    def cut(x: np.ndarray) -> np.ndarray:
        return x.astype(kind).astype(np.float32)

    def rms(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return cut(cut(x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps)) * w)

    with open_language_model(folder) as file:
        w = {name: cut(file.pop(name, file.shape(name))) for name in file.names()}
    x = w["model.embed_tokens.weight"][ids]
    angles = np.arange(ids.shape[1])[:, None] * c.rope_frequencies()
    cos, sin = cut(np.cos(angles))[None, :, None], cut(np.sin(angles))[None, :, None]
    mask = np.triu(np.full((ids.shape[1],) * 2, -np.inf, np.float32), 1)

    def turn(v: np.ndarray) -> np.ndarray:
        low, high = np.split(v, 2, -1)
        return cut(np.concatenate((cut(low * cos) - cut(high * sin), cut(high * cos) + cut(low * sin)), -1))

    for i in range(c.num_layers):
        p = {k.partition(f"layers.{i}.")[2]: v for k, v in w.items() if f"layers.{i}." in k}
        h = rms(x, p["input_layernorm.weight"])
        q, k, v = (
            cut(h @ p[f"self_attn.{n}_proj.weight"].T).reshape(*ids.shape, -1, c.head_dim) for n in ("q", "k", "v")
        )
        q, k = turn(rms(q, p["self_attn.q_norm.weight"])), turn(rms(k, p["self_attn.k_norm.weight"]))
        k, v = (np.repeat(t, c.group_size, axis=2) for t in (k, v))
        scores = cut(np.einsum("bshd,bthd->bhst", q, k)) * np.float32(c.head_dim**-0.5) + mask
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = cut(weights / weights.sum(-1, keepdims=True))
        o = cut(np.einsum("bhst,bthd->bshd", weights, v)).reshape(*ids.shape, -1)
        x = cut(x + cut(o @ p["self_attn.o_proj.weight"].T))
        h = rms(x, p["post_attention_layernorm.weight"])
        gate, up = cut(h @ p["mlp.gate_proj.weight"].T), cut(h @ p["mlp.up_proj.weight"].T)
        x = cut(x + cut(cut(cut(gate / (1 + np.exp(-gate))) * up) @ p["mlp.down_proj.weight"].T))
    states = rms(x, w["model.norm.weight"])
    return states, cut(states @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T)


@pytest.mark.parametrize("device", FLOAT64)
def test_extending_piece_by_piece_equals_one_pass(folder: Path, oracle: Qwen3, device: str) -> None:
    runner = load_language_model(folder, device, "float64").runner
    ids = random_ids(oracle, 40)
    cache = runner.new_cache(1, 40)
    pieces = [ids[:13], ids[13:14], ids[14:20], ids[20:]]
    states = [to_host(runner.extend(cache, piece, np.array([0, len(piece)], np.int32))) for piece in pieces]
    np.testing.assert_allclose(np.concatenate(states), oracle.forward(ids)[0], atol=1e-10)


@pytest.mark.parametrize("device", FLOAT64)
def test_ragged_neighbours_change_nothing(folder: Path, oracle: Qwen3, device: str) -> None:
    runner = load_language_model(folder, device, "float64").runner
    lengths = [5, 1, 33, 2]
    rows = [random_ids(oracle, n, seed=n) for n in lengths]
    cache = runner.new_cache(6, 64)
    for array in (cache.keys, cache.values):
        array[...] = np.nan
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    states = to_host(runner.extend(cache, np.concatenate(rows), starts))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(states[starts[i] : starts[i + 1]], oracle.forward(row)[0], atol=1e-10)
    following = np.array([9, 8, 7, 6], np.int32)
    states = to_host(runner.extend(cache, following, np.arange(5, dtype=np.int32), last_only=True))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(states[i], oracle.forward(np.append(row, following[i]))[0][-1], atol=1e-10)


def test_generate_shapes_and_parameters(folder: Path) -> None:
    model = Qwen3.load(folder)
    single = model.generate(random_ids(model, 6), max_new_tokens=9, temperature=0.9, seed=3)
    several = model.generate([random_ids(model, 6), random_ids(model, 3)], max_new_tokens=9, temperature=0.9, seed=3)
    np.testing.assert_array_equal(single.tokens, several[0].tokens)
    assert single.states.shape == (len(single.tokens) - (single.finish_reason == "stop"), model.config.hidden_size)
    assert len(model.generate(random_ids(model, 2, 4), max_new_tokens=2)) == 2


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "must be integers"),
        (np.zeros((2, 0), int), "must be integers"),
        (np.zeros((1, 2, 3), int), "must be integers"),
        (np.zeros(3), "dtype float64"),
        (np.array(["a"]), "must be integers"),
        (np.array([True]), "dtype bool"),
        ([0, -1], "ids holds -1"),
        ([0, 10**6], "ids holds 1000000"),
        (np.zeros(5000, int), "5000 tokens; this model reads at most"),
        (5, "must be integers"),
        (None, "must be integers"),
        ([[1, 2], []], "must be integers"),
    ],
)
def test_wrong_ids(folder: Path, ids: Any, words: str) -> None:
    model = Qwen3.load(folder)
    with pytest.raises(ParameterError, match=words):
        model.generate(ids)
    if not isinstance(ids, list) or not ids or not isinstance(ids[0], list):
        with pytest.raises(ParameterError, match=words):
            model.forward(ids)


def test_wrong_ways_to_load(folder: Path) -> None:
    with pytest.raises(ParameterError, match="dtype = 'float8'"):
        Qwen3.load(folder, dtype="float8")
    with pytest.raises(ParameterError, match="device = 'gpu'"):
        Qwen3.load(folder, device="gpu")
    with pytest.raises(DeviceError, match="cuda:99"):
        Qwen3.load(folder, device="cuda:99")

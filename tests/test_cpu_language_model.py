"""The CPU engine's language model against the reference's outputs and against the portable oracle in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cpu_models import CONFIGS, extend, language_model, poison, portable_model, prompt, run
from numerics import relative_error, round_to_bfloat16

from soprano_cupy import Qwen3
from soprano_cupy.checkpoint import language_model_shapes, open_language_model
from soprano_cupy.config import ModelConfig
from soprano_cupy.cpu import _engine
from soprano_cupy.cpu.qwen3 import CpuLanguageModel
from soprano_cupy.errors import CheckpointError, ParameterError
from soprano_cupy.portable import qwen3 as portable_qwen3
from soprano_cupy.runner import KVCache, LanguageModelRunner
from soprano_cupy.testing import SOPRANO_1_1_80M, TINY, make_checkpoint

ISAS = _engine.instruction_sets()
DTYPES = ["float32", "bfloat16", "int8"]
LENGTHS = [1, 7, 130, 300]  # up to three splits of 128 keys; together more rows than go through at once
Folders = dict[str, Path]
Oracle = Callable[[str, str], list[np.ndarray]]
MIN_COSINE = 0.999  # of int8 states, at every position


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = _engine.get_threads()
    yield
    _engine.set_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    return {
        name: make_checkpoint(root / name, config=config, dtype="float32" if name == "odd" else "bfloat16")
        for name, config in CONFIGS.items()
    }


@pytest.fixture(scope="module")
def oracle(folders: Folders) -> Oracle:
    @cache
    def states(name: str, dtype: str) -> list[np.ndarray]:
        model = portable_model(folders[name], dtype)
        return [run(model, [prompt(model.config, length)]) for length in LENGTHS]

    return states


def plain_bfloat16(folder: Path, patch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """States of the plain implementation: weights and both sides of every product rounded to bfloat16."""
    exact = portable_qwen3.linear

    def rounded(x: np.ndarray, weight: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        return round_to_bfloat16(exact(round_to_bfloat16(x), round_to_bfloat16(weight), *rest))

    patch.setattr(portable_qwen3, "linear", rounded)
    model = portable_model(folder, "float32")
    return [run(model, [prompt(model.config, length)]) for length in LENGTHS]


def cosines(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    scale = np.linalg.norm(values, axis=-1) * np.linalg.norm(reference, axis=-1)
    return (values * reference).sum(axis=-1) / scale


# ---- against the oracle ----


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_states_are_as_good_as_the_portable_ones(folders: Folders, oracle: Oracle, name: str, isa: str) -> None:
    model = language_model(folders[name], "float32", isa)
    for length, exact, plain in zip(LENGTHS, oracle(name, "float64"), oracle(name, "float32"), strict=True):
        allowed = 2 * relative_error(plain, exact) + 1e-7
        share = relative_error(run(model, [prompt(model.config, length)]), exact) / allowed
        assert share <= 1, f"{length} tokens used {share:.2f} of the allowance"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["grouped", "odd"])
def test_bfloat16_states_err_at_most_twice_as_much_as_plain_ones(
    folders: Folders, oracle: Oracle, name: str, isa: str
) -> None:
    model = language_model(folders[name], "bfloat16", isa)
    with pytest.MonkeyPatch.context() as patch:
        plain = plain_bfloat16(folders[name], patch)
    for length, exact, rounded in zip(LENGTHS, oracle(name, "float64"), plain, strict=True):
        share = relative_error(run(model, [prompt(model.config, length)]), exact) / (2 * relative_error(rounded, exact))
        assert share <= 1, f"{length} tokens used {share:.2f} of the allowance"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_states_point_the_same_way(folders: Folders, oracle: Oracle, name: str, isa: str) -> None:
    model = language_model(folders[name], "int8", isa)
    for length, exact in zip(LENGTHS, oracle(name, "float64"), strict=True):
        assert cosines(run(model, [prompt(model.config, length)]), exact).min() >= MIN_COSINE


@pytest.mark.parametrize("seed", range(3))
def test_int8_states_at_the_published_width(tmp_path: Path, seed: int) -> None:
    """Six of the 80M model's layers; benchmarks/cpu.py asks the same of all seventeen."""
    config = dataclasses.replace(SOPRANO_1_1_80M, vocab_size=512, num_layers=6)
    folder = make_checkpoint(tmp_path, config=config, seed=seed)
    model, exact = language_model(folder, "int8"), portable_model(folder, "float64")
    for length in (1, 17, 40):
        ids = prompt(config, length, seed)
        assert cosines(run(model, [ids]), run(exact, [ids])).min() >= MIN_COSINE


@pytest.mark.parametrize("name", ["grouped", "odd"])
def test_logits_are_the_head_times_the_states(folders: Folders, name: str) -> None:
    model, exact = language_model(folders[name]), portable_model(folders[name], "float64")
    states = run(model, [prompt(model.config, 9)])
    assert relative_error(model.logits(states), exact.logits(states.astype(np.float64))) <= 1e-6
    assert model.logits(states[:0]).shape == (0, model.config.vocab_size)


# ---- what a result may not depend on ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_results_depend_on_neither_batch_nor_threads(folders: Folders, isa: str, dtype: str) -> None:
    model = language_model(folders["grouped"], dtype, isa)
    prompts = [prompt(model.config, length) for length in LENGTHS]
    _engine.set_threads(1)
    single = [run(model, [ids]) for ids in prompts]
    for threads in (1, 2, 7):
        _engine.set_threads(threads)
        np.testing.assert_array_equal(run(model, prompts), np.concatenate(single))
        np.testing.assert_array_equal(run(model, prompts[::-1], last_only=True), [s[-1] for s in single[::-1]])
        np.testing.assert_array_equal(run(model, prompts[2:3]), single[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["grouped", "many_heads", "wide_heads"])
def test_results_do_not_depend_on_how_a_sequence_is_cut(folders: Folders, name: str, dtype: str) -> None:
    model = language_model(folders[name], dtype)
    ids = prompt(model.config, 300)
    whole = run(model, [ids])
    cache = model.new_cache(1, 300)
    poison(cache)
    cuts = [0, 1, 2, 3, 127, 129, 130, 255, 256, 257, 300]
    pieces = [extend(model, cache, [ids[a:b]]) for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert cache.lengths[0] == 300


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_end_and_move(folders: Folders, dtype: str) -> None:
    """As the sampling loop does it: a sequence ends, the last one takes its slot, all go on."""
    model = language_model(folders["grouped"], dtype)
    prompts = [prompt(model.config, length) for length in (5, 20, 33)]
    cache = model.new_cache(3, 40)
    poison(cache)
    extend(model, cache, prompts, last_only=True)
    cache.move(2, 0)
    np.testing.assert_array_equal(cache.lengths, [33, 20, 33])
    more = [prompt(model.config, 1, seed=1), prompt(model.config, 2, seed=2)]
    states = extend(model, cache, more)
    expected = [run(model, [np.concatenate((prompts[source], new))]) for source, new in zip((2, 1), more, strict=True)]
    np.testing.assert_array_equal(states, np.concatenate([expected[0][-1:], expected[1][-2:]]))


def test_last_only_leaves_the_cache_as_it_would_be(folders: Folders) -> None:
    model = language_model(folders["grouped"])
    first, second = prompt(model.config, 270), prompt(model.config, 4, seed=1)
    cache = model.new_cache(1, 274)
    poison(cache)
    last = extend(model, cache, [first], last_only=True)
    whole = run(model, [np.concatenate((first, second))])
    np.testing.assert_array_equal(last[0], whole[269])
    np.testing.assert_array_equal(extend(model, cache, [second]), whole[270:])


# ---- the reference's outputs ----


@pytest.fixture(scope="module", params=["golden/mqa", "golden/gqa", "voice"])
def golden(request: pytest.FixtureRequest, shared_dir: Path) -> Iterator[Path]:
    """The two goldens come from rotary frequencies rounded to bfloat16 (see test_reference_parity.py)."""
    exact = ModelConfig.rope_frequencies
    with pytest.MonkeyPatch.context() as patch:
        if request.param.startswith("golden"):
            patch.setattr(ModelConfig, "rope_frequencies", lambda self: round_to_bfloat16(exact(self)))
        yield shared_dir / request.param


@pytest.mark.parametrize("isa", ISAS)
def test_reference_states_and_greedy_tokens(golden: Path, isa: str) -> None:
    expected = np.load(golden / "expected.npz")
    model = Qwen3(language_model(golden, "float32", isa))
    for i in range(3):
        states, logits = model.forward(expected[f"ids{i}"])
        assert relative_error(states, expected[f"hidden{i}"]) <= 1e-4
        assert relative_error(logits[-1], expected[f"logits{i}"]) <= 1e-4
        generation = model.generate(expected[f"ids{i}"], max_new_tokens=len(expected[f"greedy{i}"]))
        np.testing.assert_array_equal(generation.tokens, expected[f"greedy{i}"])
        count = len(expected[f"states{i}"])
        assert relative_error(generation.states[:count], expected[f"states{i}"]) <= 1e-4


def test_int8_states_of_the_reference_prompts(golden: Path) -> None:
    expected = np.load(golden / "expected.npz")
    model = Qwen3(language_model(golden, "int8"))
    for i in range(3):
        states, _ = model.forward(expected[f"ids{i}"])
        assert cosines(states, expected[f"hidden{i}"]).min() >= MIN_COSINE


# ---- interface ----


def test_the_engine_says_what_it_is(folders: Folders) -> None:
    model = language_model(folders["grouped"], "int8", "portable")
    assert isinstance(model, LanguageModelRunner)
    assert (model.device, model.dtype, model.attention) == ("cpu", "int8", "flash")
    assert "portable kernels" in model.reason
    assert "thread" in model.reason
    assert isinstance(model.new_cache(2, 20), KVCache)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2), ("int8", 1 + 2 / 64)])
def test_weights_take_the_memory_of_their_dtype(tmp_path: Path, dtype: str, bytes_each: float) -> None:
    config = dataclasses.replace(TINY, hidden_size=256, intermediate_size=512, vocab_size=512, num_layers=2)
    model = language_model(make_checkpoint(tmp_path, config=config), dtype)
    shapes = language_model_shapes(config)
    embeddings = math.prod(shapes.pop("model.embed_tokens.weight")) * 2  # bfloat16 in the file
    matrices = sum(math.prod(shape) for shape in shapes.values()) * bytes_each
    assert embeddings + matrices <= model.weight_bytes <= (embeddings + matrices) * 1.01


def test_wrong_calls_are_refused(folders: Folders) -> None:
    model = language_model(folders["grouped"])
    ids, starts = np.arange(4, dtype=np.int32), np.array([0, 4], np.int32)
    for bad_ids, bad_starts in [
        (ids, np.array([0, 3], np.int32)),
        (ids, np.array([0, 4, 4], np.int32)),
        (ids, np.array([1, 4], np.int32)),
        (ids + model.config.vocab_size, starts),
        (ids - 1, starts),
        (np.arange(40, dtype=np.int32), np.array([0, 40], np.int32)),
        (ids, np.array([0, 1, 2, 4], np.int32)),
    ]:
        cache = model.new_cache(2, 16)
        with pytest.raises(ParameterError):
            model.extend(cache, bad_ids, bad_starts)
        np.testing.assert_array_equal(cache.lengths, 0)
    with pytest.raises(ParameterError, match="float16"):
        language_model(folders["grouped"], "float16")


def test_a_surplus_tensor_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, config=CONFIGS["grouped"])
    smaller = dataclasses.replace(CONFIGS["grouped"], num_layers=CONFIGS["grouped"].num_layers - 1)
    with open_language_model(folder) as file, pytest.raises(CheckpointError, match="layers"):
        CpuLanguageModel(file, smaller)

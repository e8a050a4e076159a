"""The GPU engine's language model as a whole: against the float64 oracle, alone and in batches, given up and shared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numerics import relative_error
from runners import load_language_model
from speaking import check_threads
from test_qwen3 import plain_forward

from soprano_cupy import ParameterError, Qwen3, SopranoTTS
from soprano_cupy.device import to_host
from soprano_cupy.generation import Generation, Request, begin
from soprano_cupy.sampling import SamplingParams, penalise
from soprano_cupy.testing import make_checkpoint

pytestmark = pytest.mark.gpu

DTYPES = ["bfloat16", "float16"]
TEXT = "Hello there, how are you this fine morning? I am quite well, thank you very much. See you soon, my old friend."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, seed=7)
    return path


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Qwen3:
    return load_language_model(folder, "portable", "float64")


@pytest.fixture(scope="module", params=DTYPES)
def model(request: pytest.FixtureRequest, folder: Path) -> Qwen3:
    model = Qwen3.load(folder, "cuda", request.param)
    assert type(model.runner).__name__ == "GpuLanguageModel", model.runner.reason
    return model


def prompts_of(model: Qwen3, lengths: list[int]) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(4, model.config.vocab_size, n).astype(np.int32) for n in lengths]


def forward_error(model: Qwen3, folder: Path, oracle: Qwen3, ids: np.ndarray) -> float:
    """How far logits may be from the oracle's: twice what plain 16-bit arithmetic is, at worst, per logit."""
    _, exact = oracle.forward(ids[None])
    _, plain = plain_forward(folder, ids[None], model.runner.dtype)
    return 2 * float(np.abs(plain - exact).max())


@pytest.mark.parametrize("lengths", [[1], [17], [64, 3], [100, 1, 65, 16, 7]])
def test_forward_against_float64(model: Qwen3, folder: Path, oracle: Qwen3, lengths: list[int]) -> None:
    """Ragged prompts through `extend`: each as the oracle has it, at most twice plain arithmetic's error."""
    prompts = prompts_of(model, lengths)
    cache = model.runner.new_cache(len(prompts), max(lengths))
    starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    states = to_host(model.runner.extend(cache, np.concatenate(prompts), starts))
    logits = to_host(model.runner.logits(states))
    for i, ids in enumerate(prompts):
        exact_states, exact_logits = oracle.forward(ids[None])
        plain_states, plain_logits = plain_forward(folder, ids[None], model.runner.dtype)
        own = slice(starts[i], starts[i + 1])
        assert relative_error(states[own], exact_states[0]) <= 2 * relative_error(plain_states, exact_states)
        assert relative_error(logits[own], exact_logits[0]) <= 2 * relative_error(plain_logits, exact_logits)


def test_piece_by_piece_equals_one_pass(model: Qwen3) -> None:
    ids = prompts_of(model, [90])[0]
    cache = model.runner.new_cache(1, 90)
    pieces = [ids[:40], ids[40:41], ids[41:60], ids[60:]]
    states = [to_host(model.runner.extend(cache, piece, np.array([0, len(piece)], np.int32))) for piece in pieces]
    whole = to_host(model.forward(ids)[0])
    assert relative_error(np.concatenate(states), whole) <= {"bfloat16": 2e-2, "float16": 3e-3}[model.runner.dtype]


def check_choices(model: Qwen3, folder: Path, oracle: Qwen3, ids: np.ndarray, out: Generation, penalty: float) -> None:
    """Every token is the oracle's best one, or nearer to it than both numbers are known."""
    held = np.concatenate((ids, out.tokens))
    states, logits = oracle.forward(held[None])
    allowed = forward_error(model, folder, oracle, held)
    for j, token in enumerate(out.tokens):
        place = len(ids) - 1 + j
        seen = np.zeros((1, model.config.vocab_size), bool)
        seen[0, held[: place + 1]] = True
        scores = penalise(logits[0, place][None], seen, np.array([[penalty]]))[0]
        assert scores[token] >= scores.max() - 2 * max(penalty, 1 / penalty) * allowed, f"token {j}"
    kept = to_host(out.states)
    if len(kept) == 0:  # [STOP] at once
        return
    exact = states[0, len(ids) - 1 :][: len(kept)]
    plain = plain_forward(folder, held[None], model.runner.dtype)[0][0, len(ids) - 1 :][: len(kept)]
    assert relative_error(kept, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 63, 200])
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_generation_follows_the_oracle(
    model: Qwen3, folder: Path, oracle: Qwen3, length: int, penalty: float
) -> None:
    ids = prompts_of(model, [length])[0]
    out = model.generate(ids, max_new_tokens=60, repetition_penalty=penalty)
    assert len(out.tokens) == 60 or out.tokens[-1] == model.config.eos_token_id
    assert len(out.states) == len(out.tokens) - (out.finish_reason == "stop")
    check_choices(model, folder, oracle, ids, out, penalty)


@pytest.mark.parametrize("name", ["golden/mqa", "golden/gqa", "voice"])
def test_other_shapes_follow_the_oracle(shared_dir: Path, name: str) -> None:
    """The reference checkpoints: other heads, tied embeddings, a voice that was trained."""
    folder = shared_dir / name
    model, oracle = Qwen3.load(folder, "cuda", "bfloat16"), load_language_model(folder, "portable", "float64")
    expected = np.load(folder / "expected.npz")
    for i in range(2):
        out = model.generate(expected[f"ids{i}"], max_new_tokens=32)
        check_choices(model, folder, oracle, expected[f"ids{i}"], out, 1.2)


@pytest.mark.parametrize("count", [2, 3, 9, 33])
def test_batches_follow_the_oracle(model: Qwen3, folder: Path, oracle: Qwen3, count: int) -> None:
    prompts = prompts_of(model, [1 + (7 * i) % 50 for i in range(count)])
    for ids, out in list(zip(prompts, model.generate(prompts, max_new_tokens=24), strict=True))[:: max(1, count // 6)]:
        check_choices(model, folder, oracle, ids, out, 1.2)


def test_prompts_that_need_several_prefills(folder: Path) -> None:
    """More rows than one prefill takes: each sequence as alone, up to the choice of kernel."""
    model = Qwen3.load(folder, "cuda", "bfloat16")
    prompts = prompts_of(model, [200 + i % 7 for i in range(70)])
    together = model.generate(prompts, max_new_tokens=4)
    for i in (0, 39, 40, 41, 69):
        alone = model.generate(prompts[i], max_new_tokens=4)
        assert relative_error(to_host(together[i].states)[:1], to_host(alone.states)[:1]) <= 2e-2


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_thousand_repeats_are_identical(folder: Path, temperature: float) -> None:
    model = Qwen3.load(folder, "cuda", "bfloat16")
    ids = prompts_of(model, [30])[0]
    first = model.generate(ids, max_new_tokens=12, temperature=temperature, seed=5)
    for _ in range(1000):
        again = model.generate(ids, max_new_tokens=12, temperature=temperature, seed=5)
        np.testing.assert_array_equal(again.tokens, first.tokens)
        assert bool((again.states == first.states).all())


def test_rounds_and_results_agree(model: Qwen3) -> None:
    prompts = prompts_of(model, [9, 30, 2])
    params = SamplingParams(temperature=0.8, max_new_tokens=20, seed=3)
    requests = [Request(ids, params, stream) for stream, ids in enumerate(prompts)]
    whole = begin(model.runner, requests).results()
    tokens: list[list[int]] = [[] for _ in prompts]
    states: list[list[np.ndarray]] = [[] for _ in prompts]
    reasons: dict[int, str] = {}
    for steps in begin(model.runner, requests):
        for step in steps:
            tokens[step.index].append(step.token)
            if step.state is not None:
                states[step.index].append(to_host(step.state))
            if step.finish_reason:
                reasons[step.index] = step.finish_reason
    for i, out in enumerate(whole):
        np.testing.assert_array_equal(out.tokens, tokens[i])
        np.testing.assert_array_equal(to_host(out.states), np.stack(states[i]))
        assert out.finish_reason == reasons[i]


def test_limits_of_each_sequence(model: Qwen3) -> None:
    """Each ends at its own limit, and where the positions run out."""
    c = model.config
    prompts = prompts_of(model, [4, 5, c.max_positions - 3, c.max_positions])
    limits = [1, 7, 50, 50]
    requests = [
        Request(ids, SamplingParams(max_new_tokens=limit), 0) for ids, limit in zip(prompts, limits, strict=True)
    ]
    for out, most in zip(begin(model.runner, requests).results(), [1, 7, 4, 1], strict=True):
        stopped = out.finish_reason == "stop"
        assert len(out.tokens) <= most if stopped else len(out.tokens) == most
    with pytest.raises(ParameterError, match="at most"):
        model.generate(np.zeros(c.max_positions + 1, np.int32))


def test_streams_given_up_and_interleaved(folder: Path) -> None:
    """A stream that is dropped half-way, and two that are read in turn, leave every other one as it was."""
    tts = SopranoTTS(folder, device="cuda")
    whole = tts.infer(TEXT)
    given_up = tts.infer_stream(TEXT)
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    streams = [tts.infer_stream(TEXT), tts.infer_stream(TEXT)]
    pieces: list[list[np.ndarray]] = [[], []]
    for pair in zip(*streams, strict=True):
        for kept, piece in zip(pieces, pair, strict=True):
            kept.append(piece)
    for kept in pieces:
        assert len(np.concatenate(kept)) == len(whole)
        assert relative_error(np.concatenate(kept), whole) <= 1e-2


def test_threads_share_a_model(folder: Path) -> None:
    check_threads(SopranoTTS(folder, device="cuda"), TEXT, temperature=0.7, seed=1)

"""The persistent decode kernel on a GPU: the graph path's tokens and states; in parts, cancelled, stalled, repeated."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from persistent_host import gather_on_host

from soprano_cupy.errors import DeviceError
from soprano_cupy.generation import Request
from soprano_cupy.gpu import persistent, step
from soprano_cupy.gpu.persistent_weights import gather_blocks
from soprano_cupy.sampling import SamplingParams, penalise
from soprano_cupy.testing import SOPRANO_1_1_80M, TINY, make_checkpoint

pytestmark = pytest.mark.gpu

SMALL = replace(TINY, hidden_size=256, num_heads=4, num_kv_heads=1, head_dim=64, intermediate_size=512, vocab_size=2240)
MODELS = {"small": SMALL, "80m": SOPRANO_1_1_80M}
PROMPTS = [[5, 9, 33, 17, 60, 61, 8], list(range(4, 60)), [7] * 3 + list(range(90, 20, -1))]
SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {}, "drawn": {"temperature": 0.7, "top_p": 0.95, "seed": 3}}


class Engine:
    """A model with its graph path and the persistent kernel beside it."""

    def __init__(self, folder: Path) -> None:
        from soprano_cupy.checkpoint import open_language_model
        from soprano_cupy.config import ModelConfig
        from soprano_cupy.cuda.module import device_facts
        from soprano_cupy.gpu.qwen3 import GpuLanguageModel, best_dtype, engine_problem

        config = ModelConfig.from_folder(folder)
        dtype = best_dtype(device_facts(0).capability)
        reason = engine_problem(config, "cuda", dtype)
        if reason is not None:
            pytest.skip(reason)
        with open_language_model(folder) as file:
            self.model = GpuLanguageModel(file, config, "cuda", dtype, "test")
        self.model.persistent.use("0")  # `graph` is to be what its name says
        self.decoder = persistent.PersistentDecoder(config, lambda: self.model._weights, self.model._facts, dtype)
        if self.decoder.problem() is not None:
            pytest.skip(f"the persistent kernel does not run here: {self.decoder.problem()}")

    def graph(self, request: Request) -> Any:
        return self.model.begin([request]).results()[0]

    def persistent(self, request: Request, budget: int = persistent.UNLIMITED, **others: int) -> Any:
        """(tokens, states, record), by launches of `budget` tokens."""
        with self.model.borrowed([request]) as batch:
            batch.begin([request], give_up=False)
            common = replace(batch.common(budget), **others)
            while True:
                self.decoder.launch(batch.stream.ptr, [batch.places(0)], common)
                batch.stream.synchronize()
                self.decoder.check()
                word = int(batch.progress[0])
                if step.progress_status(word) or budget == persistent.UNLIMITED:
                    break
            count = step.progress_count(word)
            record = batch._arena["slots"].get()[0]
            return np.array(batch.tokens[0, :count]), batch.states[0, :count].get(), record


@pytest.fixture(scope="module", params=MODELS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("persistent") / request.param
    make_checkpoint(folder, config=MODELS[request.param], seed=1, mean_tokens=60)
    return Engine(folder)


def ask(prompt: list[int], tokens: int = 80, **sampling: Any) -> Request:
    return Request(np.array(prompt, np.int32), SamplingParams(max_new_tokens=tokens, **sampling))


def test_blocks_are_gathered() -> None:
    """Blocks of several matrices in any order, zeros among them, as NumPy gathers them."""
    import cupy

    rng = np.random.default_rng(2)
    matrices = [rng.integers(0, 1 << 16, 256 * count).astype(np.uint16) for count in (3, 1, 700)]
    order = rng.integers(-1, 704, 2001)
    found = gather_blocks([cupy.asarray(matrix) for matrix in matrices], order, "bfloat16", 0)
    np.testing.assert_array_equal(found.get(), gather_on_host(matrices, order))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_as_the_graph_path(engine: Engine, prompt: int, sampling: dict[str, Any]) -> None:
    """Equal tokens, or the first other one where the graph path's two best scores are closer than their error."""
    request = ask(PROMPTS[prompt], **sampling)
    expected = engine.graph(request)
    tokens, states, record = engine.persistent(request)
    same = first_difference(tokens, expected.tokens)
    kept = min(same + 1, len(expected.states), len(states))
    reference = expected.states[:kept].get()
    error = np.abs(states[:kept] - reference).max() / np.sqrt((reference**2).mean())
    assert error < 0.1, "states"
    if same == len(expected.tokens) == len(tokens):
        assert record["status"] == {"stop": step.STOP, "length": step.LENGTH}[expected.finish_reason]
        return
    assert same >= 1
    assert margin(engine, request, expected, states, same, sampling) < 1.0


def first_difference(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def margin(engine: Engine, request: Request, expected: Any, states: np.ndarray, at: int, sampling: Any) -> float:
    """The graph path's lead of its token over the other choice, over the largest difference of the logits."""
    import cupy

    both = cupy.stack([expected.states[at], cupy.asarray(states[at])])
    logits = engine.model.logits(both).get().astype(np.float64)
    seen = np.zeros((1, logits.shape[1]), bool)
    seen[0, [*request.ids, *expected.tokens[:at]]] = True
    scores = penalise(logits[:1], seen, np.array([[request.params.repetition_penalty]]))[0]
    if sampling:  # a draw turns over where the random number falls between the two sums
        return 0.0
    best = np.sort(scores)[-2:]
    return float((best[1] - best[0]) / (4 * np.abs(logits[0] - logits[1]).max()))


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_several_voices(engine: Engine, count: int) -> None:
    """Together each gets what it gets alone, but where two choices are closer than the error.

    Behind the same first token, that is: another number of prompts takes other kernels, whose first draw may differ.
    """
    problem = engine.decoder.problem(count)
    if problem is not None:
        pytest.skip(problem)
    kinds = [list(SAMPLINGS.values())[i % 2] for i in range(count)]
    requests = [ask(PROMPTS[i % 3], 20 + 5 * i, **kinds[i]) for i in range(count)]
    together, alone = (voices(engine, requests, groups) for groups in ([range(count)], [[i] for i in range(count)]))
    for request, kind, (tokens, states), (expected, expected_states) in zip(
        requests, kinds, together, alone, strict=True
    ):
        assert tokens[0] == expected[0]
        same = first_difference(tokens, expected)
        kept = min(same + 1, len(states), len(expected_states))
        reference = expected_states[:kept].get()
        error = np.abs(states[:kept].get() - reference).max() / np.sqrt((reference**2).mean())
        assert error < 0.1, "states"
        if same < max(len(tokens), len(expected)):
            other = SimpleNamespace(tokens=expected, states=expected_states)
            assert margin(engine, request, other, states.get(), same, kind) < 1.0


def voices(engine: Engine, requests: list[Request], groups: Any) -> list[tuple[np.ndarray, Any]]:
    """(tokens, states) of each request, generated a group at a time behind first tokens that all draw together."""
    with engine.model.borrowed(requests) as batch:
        batch.begin(requests, give_up=False)
        for group in groups:
            places = [batch.places(slot) for slot in group]
            engine.decoder.launch(batch.stream.ptr, places, batch.common(persistent.UNLIMITED))
            batch.stream.synchronize()
            engine.decoder.check()
        counts = [step.progress_count(int(batch.progress[i])) for i in range(len(requests))]
        return [(np.array(batch.tokens[i, :n]), batch.states[i, :n].copy()) for i, n in enumerate(counts)]


def test_in_parts(engine: Engine) -> None:
    request = ask(PROMPTS[0], 40, temperature=0.8, seed=9)
    whole, parts = engine.persistent(request), engine.persistent(request, budget=7)
    assert list(whole[0]) == list(parts[0])
    assert whole[1].tobytes() == parts[1].tobytes()
    assert whole[2].tobytes() == parts[2].tobytes()


def test_same_bits_every_time(engine: Engine) -> None:
    request = ask(PROMPTS[1], 40, temperature=0.8, seed=9)
    first = engine.persistent(request)
    for _ in range(100):
        again = engine.persistent(request)
        assert again[0].tobytes() == first[0].tobytes()
        assert again[1].tobytes() == first[1].tobytes()


def test_a_stall_ends_in_an_error(engine: Engine) -> None:
    """The watchdog ends the launch within a second, and everything goes on afterwards."""
    request = ask(PROMPTS[0], 40)
    begun = time.perf_counter()
    with pytest.raises(DeviceError, match="waited too long for"):
        engine.persistent(request, stall_at=3)
    assert time.perf_counter() - begun < 30  # a limit that only a hang would reach
    expected, (tokens, _, _) = engine.graph(request), engine.persistent(request)
    assert tokens[0] == expected.tokens[0]


def test_cancelled(engine: Engine) -> None:
    from soprano_cupy.gpu._driver import MappedMemory

    memory = MappedMemory(64)
    np.frombuffer(memory.view(), np.uint32)[0] = 1
    with engine.model.borrowed([ask(PROMPTS[0])]) as batch:
        batch.begin([ask(PROMPTS[0])], give_up=False)
        common = batch.common(persistent.UNLIMITED, cancel=memory.device, report=memory.device + 8)
        engine.decoder.launch(batch.stream.ptr, [batch.places(0)], common)
        batch.stream.synchronize()
        engine.decoder.check()
        assert step.progress_status(int(batch.progress[0])) == step.RUNNING
        assert 2 <= step.progress_count(int(batch.progress[0])) <= 4
        assert np.frombuffer(memory.view(), np.uint64)[1] == 1

"""The persistent decode kernel's own source on the emulated machine: whole sentences against the float64 reference.

All blocks of the grid run together, the search for races is on, and a thread that spins lets the others run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import persistent_host as host
import pytest

from soprano_cupy.gpu import persistent, step
from soprano_cupy.testing import TINY, make_checkpoint

MQA = replace(
    TINY, hidden_size=64, num_heads=4, num_kv_heads=1, head_dim=32, intermediate_size=160, vocab_size=200, num_layers=2
)
GQA = replace(MQA, hidden_size=96, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=136, vocab_size=333)
PROMPT = [5, 9, 33, 17, 60, 61, 8]
# A state's error, over the rms of the states: 16-bit roundings of activations, keys and values in two layers.
TOLERANCE = 0.08


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., host.Host]:
    made: dict[Any, host.Host] = {}

    def get(config: Any, *grid: int, **options: Any) -> host.Host:
        key = (config, grid, tuple(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model") / "checkpoint"
            make_checkpoint(folder, config=config, seed=3, mean_tokens=None, **options)
            made[key] = host.Host(folder, *grid)
        return made[key]

    return get


def check(h: host.Host, request: Any, outcome: host.Outcome, expected: Any) -> None:
    """Tokens, states, record and words are those of the reference."""
    count = int(outcome.record["count"])
    assert outcome.error == 0
    assert outcome.report == 1
    assert list(outcome.tokens[:count]) == list(expected.tokens)
    assert (outcome.tokens[count:] == -7).all()
    kept = len(expected.states)
    error = np.abs(outcome.states[:kept] - expected.states).max() / np.sqrt((expected.states**2).mean())
    assert error < TOLERANCE
    assert np.isnan(outcome.states[count:]).all()
    status = {"stop": step.STOP, "length": step.LENGTH}[expected.finish_reason]
    assert outcome.record["status"] == step.progress_status(outcome.progress) == status
    assert step.progress_count(outcome.progress) == count
    assert step.progress_token(outcome.progress) == expected.tokens[-1]
    assert bool(outcome.record["stuck"]) == step.progress_stuck(outcome.progress) == expected.stuck
    assert outcome.record["position"] == len(request.ids) + count - 1
    assert outcome.slot_of_row == -1


@pytest.mark.parametrize(("config", "grid"), [(MQA, (2, 2, 1)), (MQA, (1, 4, 1)), (GQA, (2, 4, 2)), (GQA, (4, 2, 1))])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 11}])
def test_sentences(
    hosts: Callable[..., host.Host], config: Any, grid: tuple[int, ...], sampling: dict[str, Any]
) -> None:
    h = hosts(config, *grid)
    request = host.request(PROMPT, max_new_tokens=7, **sampling)
    check(h, request, h.run(h.prepare(request)), h.expected(request))


def test_scores_in_the_room_of_the_mlp(hosts: Callable[..., host.Host]) -> None:
    """As with the 80M model: weights, then scores and their search, then weights again lie in the same memory."""
    h = hosts(replace(MQA, intermediate_size=480), 2, 2, 1)
    assert persistent.SEARCH_BYTES + 4 * h.config.vocab_size <= h.shape.room_bytes()[2]
    request = host.request(PROMPT, max_new_tokens=6, temperature=0.8, top_p=0.9, seed=11)
    check(h, request, h.run(h.prepare(request)), h.expected(request))
    assert h.library.library.persistent_shared_bytes() == persistent.shared_bytes(h.shape)


@pytest.mark.parametrize(("config", "grid"), [(MQA, (2, 2, 1)), (GQA, (2, 4, 2)), (MQA, (2, 4, 1, 2))])
def test_sizes_are_counted_alike(hosts: Callable[..., host.Host], config: Any, grid: tuple[int, ...]) -> None:
    h = hosts(config, *grid)
    library = h.library.library
    assert library.persistent_shared_bytes() == persistent.shared_bytes(h.shape)
    assert library.persistent_words() == persistent.scratch_words(h.shape)
    assert library.persistent_params_bytes() == persistent.params_dtype(h.shape.voices).itemsize


def test_threads_in_another_order(hosts: Callable[..., host.Host]) -> None:
    h = hosts(MQA, 2, 2, 1)
    request = host.request(PROMPT, max_new_tokens=5, temperature=1.0, top_p=1.0, seed=2)
    one, other = (h.run(h.prepare(request), reverse=reverse) for reverse in (False, True))
    check(h, request, one, h.expected(request))
    assert one.states.tobytes() == other.states.tobytes()
    assert one.record.tobytes() == other.record.tobytes()


def test_a_voice_that_ends(hosts: Callable[..., host.Host]) -> None:
    """The end token is drawn: here one that the reference draws sixth."""
    h = hosts(MQA, 2, 2, 1)
    request = host.request(PROMPT, max_new_tokens=30, temperature=1.5, top_p=1.0, seed=1)
    expected = h.expected(request)
    memory = h.prepare(request)
    end = int(expected.tokens[5])
    config, h.config = h.config, replace(h.config, eos_token_id=end)
    outcome = h.run(memory)
    h.config = config
    first = list(expected.tokens[1:]).index(end) + 1
    assert list(outcome.tokens[: first + 1]) == list(expected.tokens[: first + 1])
    assert outcome.record["count"] == first + 1
    assert outcome.record["status"] == step.STOP
    assert step.progress_status(outcome.progress) == step.STOP


def test_in_parts(hosts: Callable[..., host.Host]) -> None:
    """A launch of a few tokens leaves everything as the next one, or the graph path, needs it."""
    h = hosts(MQA, 2, 2, 1)
    request = host.request(PROMPT, max_new_tokens=8, temperature=0.9, top_p=0.95, seed=4)
    whole = h.run(h.prepare(request))
    memory = h.prepare(request)
    part = h.run(memory, budget=3)
    assert part.record["count"] == 4
    assert part.record["status"] == step.RUNNING
    assert part.slot_of_row == 5
    token = int(part.tokens[3])
    embedding = (h.source.embeddings[token].astype(np.uint32) << 16).view(np.float32)
    size = h.config.hidden_size
    assert (part.residual[:size] == embedding).all()
    gained = host.bits(embedding * h.source.layers[0].input_norm)
    assert (memory["hidden"][:size] == gained).all()
    np.testing.assert_allclose(memory["square_sums"], (embedding.reshape(-1, 16) ** 2).sum(1), rtol=1e-6)
    rest = h.run(memory)
    assert rest.record.tobytes() == whole.record.tobytes()
    assert rest.tokens.tobytes() == whole.tokens.tobytes()
    assert rest.states.tobytes() == whole.states.tobytes()
    assert rest.progress == whole.progress


@pytest.mark.parametrize("grid", [(2, 4, 1, 2), (1, 8, 1, 2)])
def test_two_voices(hosts: Callable[..., host.Host], grid: tuple[int, ...]) -> None:
    """Side by side each gets what it gets alone, to the bit; one ends before the other."""
    h = hosts(MQA, *grid)
    requests = [
        host.request(PROMPT, max_new_tokens=4),
        host.request([*PROMPT, 12, 13], max_new_tokens=8, temperature=0.8, top_p=0.9, seed=11),
    ]
    together = h.run_together([h.prepare(request) for request in requests])
    for request, outcome in zip(requests, together, strict=True):
        check(h, request, outcome, h.expected(request))
        alone = h.run(h.prepare(request))  # the second place is empty
        assert alone.states.tobytes() == outcome.states.tobytes()
        assert alone.record.tobytes() == outcome.record.tobytes()


def test_a_voice_that_has_ended(hosts: Callable[..., host.Host]) -> None:
    """Its first token was its last: the launch leaves it as it is, alone and beside another voice."""
    h = hosts(MQA, 2, 4, 1, 2)
    request = host.request(PROMPT, max_new_tokens=6)

    def ended() -> dict[str, Any]:
        memory = h.prepare(request)
        memory["slot"]["status"] = step.STOP
        return memory

    alone = h.run(ended())
    other, beside = h.run_together([ended(), h.prepare(request)])
    for outcome in (alone, other):
        assert (outcome.error, outcome.report) == (0, 1)
        assert (outcome.record["count"], outcome.record["status"]) == (1, step.STOP)
        assert (outcome.tokens[1:] == -7).all()
        assert outcome.progress == 0
    check(h, request, beside, h.expected(request))


def test_cancelled(hosts: Callable[..., host.Host]) -> None:
    """The word is looked at behind each token, so the launch ends one token later at the most."""
    h = hosts(MQA, 2, 2, 1)
    outcome = h.run(h.prepare(host.request(PROMPT, max_new_tokens=20)), cancelled=True)
    assert outcome.error == 0
    assert outcome.record["status"] == step.RUNNING
    assert 2 <= outcome.record["count"] <= 4
    assert outcome.slot_of_row == 5


def test_no_room_for_tokens(hosts: Callable[..., host.Host]) -> None:
    h = hosts(MQA, 2, 2, 1)
    memory = h.prepare(host.request(PROMPT, max_new_tokens=20))
    memory["slot"]["count"] = host.MOST_TOKENS
    outcome = h.run(memory)
    assert outcome.error == 0
    assert outcome.record["status"] == step.progress_status(outcome.progress) == step.FAILED


def test_states_that_are_not_finite(hosts: Callable[..., host.Host]) -> None:
    h = hosts(MQA, 2, 2, 1)
    memory = h.prepare(host.request(PROMPT, max_new_tokens=20))
    memory["residual"][3] = np.nan
    outcome = h.run(memory)
    assert outcome.error == 0
    assert outcome.record["status"] == step.FAILED
    assert outcome.slot_of_row == -1


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 11}])
def test_watchdog(hosts: Callable[..., host.Host], sampling: dict[str, Any]) -> None:
    """A block that falls silent: every wait of every block ends, the error says what was waited for."""
    h = hosts(MQA, 2, 2, 1)
    outcome = h.run(h.prepare(host.request(PROMPT, max_new_tokens=20, **sampling)), stall_at=2)
    assert outcome.error in (4, 5)  # block 0 waits for scores or states
    assert outcome.report == 1 + outcome.error
    assert outcome.record["count"] == 2  # of the first token behind the one that was there
    assert "waited too long for" in str(persistent.stalled(outcome.error))

"""The GPU decoder's host logic on a stand-in GPU: slices, programs, streams, slots, orders, and bad input."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vocos_standin
from numerics import snr_db

from soprano_cupy import VocosDecoder
from soprano_cupy.audio import to_pcm16
from soprano_cupy.checkpoint import decoder_config, open_decoder
from soprano_cupy.config import DecoderConfig
from soprano_cupy.errors import DeviceError, ParameterError
from soprano_cupy.gpu import program, vocos, vocos_slices
from soprano_cupy.gpu.launch import row_class
from soprano_cupy.gpu.vocos import GpuDecoder
from soprano_cupy.gpu.vocos_slices import ROW_CLASSES
from soprano_cupy.portable.vocos import PortableDecoder
from soprano_cupy.testing import TINY, make_checkpoint

CONFIG = DecoderConfig(16, 24, 32, 2, 1, 3, 64, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(TINY, hidden_size=CONFIG.input_size)
    return make_checkpoint(tmp_path_factory.mktemp("decoder"), seed=2, config=config, decoder=CONFIG)


@pytest.fixture(params=[False, True], ids=["at once", "when waited for"])
def standin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> vocos_standin.StandIn:
    standin = vocos_standin.StandIn(lazy=request.param)
    standin.install(monkeypatch)
    monkeypatch.setattr(vocos, "LEAST_ROWS", 64)
    monkeypatch.setattr(vocos_slices, "LEAST_ROWS", 64)
    monkeypatch.setattr(vocos, "SLICE_ROWS_EACH", 32)  # slices of 128 frames on four multiprocessors
    return standin


@pytest.fixture
def decoder(folder: Path, standin: vocos_standin.StandIn) -> GpuDecoder:
    with open_decoder(folder) as file:
        return GpuDecoder(file, decoder_config(file), "cuda:0", "test")


@pytest.fixture(scope="module")
def reference(folder: Path) -> PortableDecoder:
    with open_decoder(folder) as file:
        return PortableDecoder(file, decoder_config(file), "cpu", "float64", "test")


def states_of(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [17 * rng.normal(size=(length, CONFIG.input_size)).astype(np.float32) for length in lengths]


def on_gpu(states: np.ndarray) -> Any:
    return states.copy().view(vocos_standin.DeviceArray)


def test_decode_many_in_several_slices(decoder: GpuDecoder, reference: PortableDecoder, standin: Any) -> None:
    """Together 245 frames, in slices of up to 128, from the host and from the device; one voice in two slices."""
    utterances = states_of(9, 2, 40, 12, 3)
    mixed = [on_gpu(states) if i % 2 else states for i, states in enumerate(utterances)]
    audio = decoder.decode_many(mixed)
    assert len(standin.queues.runs) >= 3
    assert max(rows for rows, _, _ in standin.queues.runs) <= 128
    for states, samples in zip(utterances, audio, strict=True):
        assert samples.dtype == np.float32
        assert samples.shape == ((len(states) - 1) * CONFIG.token_samples,)
        quality = snr_db(samples, reference.decode(states[None])[0])
        assert quality >= 50, quality
    for samples, pcm in zip(audio, decoder.decode_pcm16(mixed), strict=True):
        np.testing.assert_array_equal(pcm, to_pcm16(samples))


def test_a_taker_that_fails(decoder: GpuDecoder, standin: Any) -> None:
    """Nothing is on its way into memory that is given back; the next call is as if there had been none before."""
    states = states_of(40, 40, 40, 40)
    expected = decoder.decode_many(states)

    def fail(samples: list[np.ndarray]) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        decoder.decode_in_turn(states, fail)
    assert not standin.queues.waiting
    for samples, before in zip(decoder.decode_many(states), expected, strict=True):
        np.testing.assert_array_equal(samples, before)


def test_decode_equals_decode_many(decoder: GpuDecoder, standin: Any) -> None:
    states = np.stack(states_of(12, 12, 12))
    many = np.stack(decoder.decode_many(list(states)))
    for given in (states, on_gpu(states), states.astype(np.float64)):
        together = decoder.decode(given)
        standin.queues.drain()
        np.testing.assert_array_equal(np.asarray(together), many)
    assert decoder.decode(states[:0]).shape == (0, many.shape[1])
    assert decoder.decode_many([]) == []


def test_memory_that_is_short(decoder: GpuDecoder, standin: Any) -> None:
    (states,) = states_of(40)
    whole = decoder.decode_many([states])[0]
    assert decoder._slices is not None
    enough, decoder._slices = decoder._slices.nbytes, None
    with memory_of(standin, enough - 1):
        np.testing.assert_array_equal(decoder.decode_many([states])[0], whole)
    assert decoder._slices is not None
    assert decoder._slices.rows == 64
    decoder._slices = None
    with memory_of(standin, 10_000), pytest.raises(DeviceError, match="no memory left"):
        decoder.decode_many([states])


@contextmanager
def memory_of(standin: Any, nbytes: int) -> Iterator[None]:
    """Larger allocations are refused."""
    standin.memory_bytes = nbytes
    yield
    standin.memory_bytes = None


@pytest.mark.parametrize("chunk", [1, 2, 5, 70])
@pytest.mark.parametrize("place", ["host", "device"])
def test_streams_equal_wholes(decoder: GpuDecoder, standin: Any, chunk: int, place: str) -> None:
    (states,) = states_of(70)
    whole = decoder.decode_many([states])[0]
    stream = decoder.stream()
    pieces = []
    for start in range(0, 70, chunk):
        given = on_gpu(states[start : start + chunk]) if place == "device" else states[start : start + chunk]
        standin.kept.append(given)
        pieces.append(stream.push(given))
    pieces.append(stream.finish())
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert all(piece.dtype == np.float32 for piece in pieces)


def test_the_first_states_wait(decoder: GpuDecoder, standin: Any) -> None:
    """Two blocks and the transform look four frames ahead: a token's four hops are there with the third state."""
    (states,) = states_of(6)
    stream = decoder.stream()
    assert [len(stream.push(states[i : i + 1])) // CONFIG.hop_length for i in range(6)] == [0, 0, 5, 4, 4, 4]
    assert [rows for rows, _, _ in standin.queues.runs] == [12, 4, 4, 4]
    assert len(stream.finish()) == 3 * CONFIG.hop_length


def test_streams_take_turns(decoder: GpuDecoder) -> None:
    """More voices than a table has slots, each of them as if it were alone; slots of ended and lost voices return."""
    voices = states_of(*range(3, 14))
    wholes = decoder.decode_many(voices)
    streams = [decoder.stream() for _ in voices]
    assert len(decoder._tables) == 2
    pieces: list[list[np.ndarray]] = [[] for _ in voices]
    for token in range(13):
        for stream, states, got in zip(streams, voices, pieces, strict=True):
            got.append(stream.push(states[token : token + 1]))
    for stream, got, whole in zip(streams, pieces, wholes, strict=True):
        np.testing.assert_array_equal(np.concatenate([*got, stream.finish()]), whole)
    free = sum(len(table._free) for table in decoder._tables)
    lost = decoder.stream()
    assert sum(len(table._free) for table in decoder._tables) == free - 1
    del lost, stream
    gc.collect()
    assert sum(len(table._free) for table in decoder._tables) == free == 16


def test_short_streams(decoder: GpuDecoder) -> None:
    assert decoder.stream().finish().size == 0
    stream = decoder.stream()
    assert stream.push(np.empty((0, 1), np.float32)).size == 0
    (states,) = states_of(2)
    stream.push(states[:1])
    assert stream.finish().size == 0
    with pytest.raises(ParameterError, match="has ended"):
        stream.push(states)
    with pytest.raises(ParameterError, match="has ended"):
        stream.finish()


@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 4, 5), (1, 1, 16), (0, 16), (3, 15)])
def test_wrong_shapes_are_refused(decoder: GpuDecoder, shape: tuple[int, ...]) -> None:
    wrong = np.zeros(shape, np.float32)
    with pytest.raises(ParameterError, match=r"states of shape"):
        decoder.decode(wrong)
    with pytest.raises(ParameterError, match=r"states of shape"):
        decoder.decode_many([wrong])
    if shape[0]:
        with pytest.raises(ParameterError, match=r"states of shape"):
            decoder.stream().push(wrong[..., :5])


def test_facts_for_users(decoder: GpuDecoder) -> None:
    assert (decoder.dtype, decoder.device, decoder.reason) == ("float16", "cuda:0", "test")
    before = decoder.nbytes
    assert before == decoder.weight_bytes > 0
    decoder.decode_many(states_of(3))
    decoder.stream()
    assert decoder.nbytes > before


def test_programs_are_planned_once(decoder: GpuDecoder, standin: Any) -> None:
    """Six launches around the blocks, three for each."""
    for _ in range(3):
        decoder.decode_many(states_of(3, 3))
    assert standin.program_sizes == [6 + 3 * CONFIG.num_blocks]


def test_what_the_engine_cannot_run(folder: Path, standin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vocos.decoder_problem(CONFIG, "cuda:0") is None
    assert "dim 44" in (vocos.decoder_problem(dataclasses.replace(CONFIG, dim=44), "cuda:0") or "")
    monkeypatch.setattr(program, "driver_problem", lambda: "no driver")
    assert vocos.decoder_problem(CONFIG, "cuda:0") == "no driver"
    with open_decoder(folder) as file, pytest.raises(DeviceError, match="no driver; choose dtype float32"):
        GpuDecoder(file, CONFIG, "cuda:0", "test")


def test_row_classes() -> None:
    for capacity in (1024, 8448):
        ranges = sorted(
            {row_class(rows, capacity, ROW_CLASSES) for rows in range(1, capacity + 1)}, key=lambda r: r.least
        )
        assert ranges[0].least == 1
        assert ranges[-1].most == capacity
        assert all(a.most + 1 == b.least for a, b in itertools.pairwise(ranges))


def test_public_decoder_on_it(decoder: GpuDecoder, standin: Any) -> None:
    (states,) = states_of(4)
    audio = VocosDecoder(decoder).runner.decode(states[None])
    standin.queues.drain()
    assert audio.shape == (1, 3 * CONFIG.token_samples)

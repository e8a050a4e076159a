"""The decoder on a GPU at real sizes, against float32 array code on the same states."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numerics import snr_db

from soprano_cupy import VocosDecoder
from soprano_cupy.audio import to_pcm16
from soprano_cupy.checkpoint import decoder_config, open_decoder
from soprano_cupy.checkpoint.random_weights import DecoderWeights
from soprano_cupy.checkpoint.safetensors import write_safetensors
from soprano_cupy.checkpoint.shapes import decoder_shapes
from soprano_cupy.config import DecoderConfig
from soprano_cupy.device import to_host
from soprano_cupy.gpu.vocos import GpuDecoder
from soprano_cupy.gpu.vocos_slices import ROW_CLASSES
from soprano_cupy.portable.vocos import PortableDecoder
from soprano_cupy.testing import SOPRANO_1_1_80M_DECODER, SOPRANO_80M_DECODER

pytestmark = pytest.mark.gpu

STATE_SCALE = 2.0  # of the random states, and what the random embedding expects
CONFIGS = {
    "1.1-80M": SOPRANO_1_1_80M_DECODER,
    "80M": SOPRANO_80M_DECODER,
    "odd": DecoderConfig(40, 72, 136, 3, 1, 5, 256, 64),
    "long window": DecoderConfig(64, 96, 128, 2, 3, 3, 4096, 1024),
}
# Where kernels are watched, only our own shall run on the GPU: those of cuBLAS and cuFFT take minutes.
REFERENCE_DEVICE = "cpu" if os.environ.get("SOPRANO_SANITIZE") else "cuda:0"
SAME = 60  # dB between results whose products may have added up in another order; float16 roundings turn over at most


@pytest.fixture(scope="module")
def cp() -> Any:
    return pytest.importorskip("cupy")


@pytest.fixture(scope="module", params=list(CONFIGS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_both(CONFIGS[request.param], tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[GpuDecoder, PortableDecoder]:
    return make_both(SOPRANO_1_1_80M_DECODER, tmp_path_factory.mktemp("published"))


def make_both(config: DecoderConfig, folder: Path) -> tuple[GpuDecoder, PortableDecoder]:
    weights = DecoderWeights(7, config, STATE_SCALE)
    weights.write(write_safetensors, folder / "decoder.safetensors", decoder_shapes(config), "float32")
    with open_decoder(folder) as file:
        reference = PortableDecoder(file, decoder_config(file), REFERENCE_DEVICE, "float32", "test")
    with open_decoder(folder) as file:
        return GpuDecoder(file, decoder_config(file), "cuda:0", "test"), reference


def states_of(decoder: GpuDecoder, *lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [STATE_SCALE * rng.normal(size=(n, decoder.config.input_size)).astype(np.float32) for n in lengths]


def assert_right(decoder: GpuDecoder, reference: PortableDecoder, states: np.ndarray, audio: np.ndarray) -> None:
    expected = to_host(reference.decode(states[None]))[0]
    assert audio.shape == expected.shape
    quality = snr_db(audio, expected)
    assert quality >= 50, quality


@pytest.mark.parametrize("tokens", [2, 3, 5, 8, 17, 65, 128, 513, 3000])
def test_whole_voices(both: Any, tokens: int) -> None:
    """Every class of rows; 3,000 tokens are more than a slice."""
    decoder, reference = both
    (states,) = states_of(decoder, tokens)
    assert_right(decoder, reference, states, decoder.decode(states[None]).get()[0])


def test_many_voices(both: Any, cp: Any) -> None:
    decoder, reference = both
    utterances = states_of(decoder, 128, 2, 77, 3, 200, 31, 5)
    given = [cp.asarray(states) if i % 2 else states for i, states in enumerate(utterances)]
    audio = decoder.decode_many(given)
    for states, samples, alone in zip(
        utterances, audio, (decoder.decode_many([u])[0] for u in utterances), strict=True
    ):
        assert_right(decoder, reference, states, samples)
        assert snr_db(alone, samples) >= SAME
    for samples, pcm in zip(audio, decoder.decode_pcm16(given), strict=True):
        np.testing.assert_array_equal(pcm, to_pcm16(samples))


def test_a_voice_has_the_same_bits_in_any_company(published: Any) -> None:
    """As long as the launches' rows are of one class; 5,000 to 8,000 frames are."""
    decoder, _ = published
    (states,) = states_of(decoder, 200)
    jobs = [[states, *states_of(decoder, *lengths, seed=1)] for lengths in ((1200,), (300,) * 4, (7,) * 170)]
    rows = [sum(4 * len(u) - 3 for u in job) for job in jobs]
    assert all(ROW_CLASSES[-1] < count < 8448 for count in rows)
    first, *others = [decoder.decode_many(job)[0] for job in jobs]
    last = decoder.decode_many(jobs[2][::-1])[-1]
    for other in (*others, last):
        np.testing.assert_array_equal(other, first)


def test_slices_of_a_large_job(published: Any) -> None:
    """64 voices of 128 tokens are four slices; spot checks, and the same bits every time."""
    decoder, reference = published
    utterances = states_of(decoder, *[128] * 64)
    audio = decoder.decode_many(utterances)
    for i in (0, 15, 16, 63):
        assert_right(decoder, reference, utterances[i], audio[i])
    for _ in range(5):
        for samples, again in zip(audio, decoder.decode_many(utterances), strict=True):
            np.testing.assert_array_equal(again, samples)
    together = decoder.decode(np.stack(utterances)).get()
    np.testing.assert_array_equal(together, np.stack(audio))


@pytest.mark.parametrize("chunk", [1, 3, 8, 50])
def test_streams(both: Any, cp: Any, chunk: int) -> None:
    decoder, reference = both
    (states,) = states_of(decoder, 67)
    whole = decoder.decode_many([states])[0]
    for place in (np.asarray, cp.asarray):
        stream = decoder.stream()
        pieces = [stream.push(place(states[i : i + chunk])) for i in range(0, len(states), chunk)]
        joined = np.concatenate([*pieces, stream.finish()])
        assert_right(decoder, reference, states, joined)
        assert snr_db(joined, whole) >= SAME


def test_streams_have_the_same_bits_whatever_the_pushes(published: Any) -> None:
    decoder, _ = published
    (states,) = states_of(decoder, 40)
    results = []
    for sizes in ([1] * 40, [40], [4, 1, 7, 28], [9, 9, 9, 13], [2] * 20):
        stream, ends = decoder.stream(), np.cumsum(sizes)
        pieces = [stream.push(states[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
        results.append(np.concatenate([*pieces, stream.finish()]))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_streams_side_by_side(published: Any) -> None:
    decoder, _ = published
    voices = states_of(decoder, *range(2, 22, 2))
    alone = []
    for states in voices:
        stream = decoder.stream()
        alone.append(np.concatenate([*(stream.push(s[None]) for s in states), stream.finish()]))
    streams = [decoder.stream() for _ in voices]
    pieces: list[list[np.ndarray]] = [[] for _ in voices]
    for token in range(20):
        for stream, states, got in zip(streams, voices, pieces, strict=True):
            got.append(stream.push(states[token : token + 1]))
    for stream, got, expected in zip(streams, pieces, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate([*got, stream.finish()]), expected)


def test_the_first_samples_come_with_the_fifth_state(published: Any) -> None:
    """Eight blocks and the transform look ten frames ahead: a token's samples, and 1,536 more; then a token's each."""
    decoder, _ = published
    (states,) = states_of(decoder, 7)
    stream = decoder.stream()
    assert [len(stream.push(s[None])) for s in states] == [0, 0, 0, 0, 3584, 2048, 2048]


def test_states_of_any_float_dtype(published: Any, cp: Any) -> None:
    decoder, _ = published
    (states,) = states_of(decoder, 20)
    states = states.astype(np.float16).astype(np.float32)
    expected = decoder.decode_many([states])[0]
    for dtype in (np.float16, np.float32, np.float64):
        for place in (np.asarray, cp.asarray):
            np.testing.assert_array_equal(decoder.decode_many([place(states.astype(dtype))])[0], expected)
    strided = cp.asarray(np.repeat(states, 2, 1))[:, ::2]
    np.testing.assert_array_equal(decoder.decode(strided[None]).get()[0], expected)
    shifted = cp.zeros(states.size + 1, cp.float32)[1:].reshape(states.shape)  # not aligned to 16 bytes
    shifted[...] = cp.asarray(states)
    np.testing.assert_array_equal(decoder.decode_many([shifted])[0], expected)


def test_order_with_the_callers_streams(published: Any, cp: Any) -> None:
    """States that are still being written are waited for, and may be written over right after the call."""
    decoder, _ = published
    (states,) = states_of(decoder, 100)
    expected = decoder.decode_many([states])[0]
    source, work = cp.asarray(states), cp.asarray(states)
    for stream in (cp.cuda.Stream.null, cp.cuda.Stream(non_blocking=True)):
        with stream:
            for _ in range(20):
                work[...] = 0
                for _ in range(50):
                    work += source * cp.float32(0.02)
                work[...] = source
                audio = decoder.decode(work[None])
                work[...] = cp.nan
                np.testing.assert_array_equal(audio.get()[0], expected)
        stream.synchronize()


def test_threads_take_turns(published: Any) -> None:
    decoder, _ = published
    voices = states_of(decoder, 30, 60, 90, 120)
    expected = [decoder.decode_many([states])[0] for states in voices]
    problems: list[str] = []

    def work(states: np.ndarray, audio: np.ndarray) -> None:
        for _ in range(20):
            if not (decoder.decode_many([states])[0] == audio).all():
                problems.append("other samples")
            stream = decoder.stream()
            joined = np.concatenate([stream.push(states), stream.finish()])
            if snr_db(joined, audio) < SAME:
                problems.append("other streamed samples")

    threads = [threading.Thread(target=work, args=pair) for pair in zip(voices, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_the_bundled_voice_goes_through_the_public_decoder(cp: Any) -> None:
    import soprano_cupy

    folder = Path(soprano_cupy.__file__).parent / "voices" / "mini"
    decoder = VocosDecoder.load(folder, "cuda", "auto")
    assert isinstance(decoder.runner, GpuDecoder)
    states = cp.asarray(np.random.default_rng(0).normal(size=(40, decoder.config.input_size)), cp.float32)
    exact = VocosDecoder.load(folder, "cuda", "float32")
    quality = snr_db(decoder(states).get(), exact(states).get())
    assert quality >= 50, quality

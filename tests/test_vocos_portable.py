"""The decoder's reference path: the inverse transform against its definition, streams against wholes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from runners import FLOAT64, load_decoder

from soprano_cupy import CheckpointError, ParameterError
from soprano_cupy.checkpoint import open_decoder
from soprano_cupy.device import array_module, to_host
from soprano_cupy.portable.istft import InverseSTFT, OverlapAdd, hann
from soprano_cupy.portable.vocos import stored_window
from soprano_cupy.testing import make_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(path, seed=3)
    return path


def transform_by_definition(spectrum: np.ndarray, window: np.ndarray, hop: int) -> np.ndarray:
    """Sum over bins and frames as the formula stands; spectrum (F, bins) complex."""
    size, frames = len(window), len(spectrum)
    total, weight = np.zeros(size + hop * (frames - 1)), np.zeros(size + hop * (frames - 1))
    time, bins = np.arange(size), np.arange(size // 2 + 1)
    mirrored = np.where((bins == 0) | (bins == size // 2), 1.0, 2.0)
    for f, values in enumerate(spectrum):
        waves = np.exp(2j * np.pi * np.outer(time, bins) / size) * mirrored
        total[f * hop : f * hop + size] += window * (waves @ values).real / size
        weight[f * hop : f * hop + size] += window**2
    middle = slice(size // 2, len(total) - size // 2)
    return total[middle] / weight[middle]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("frames", "pieces"), [(1, [1]), (2, [1, 1]), (9, [9]), (9, [1, 3, 0, 5]), (9, [1] * 9)])
def test_inverse_transform(device: str, frames: int, pieces: list[int]) -> None:
    rng = np.random.default_rng(0)
    spectrum = rng.normal(size=(frames, 33)) + 1j * rng.normal(size=(frames, 33))
    window = hann(64)
    expected = transform_by_definition(spectrum, window, 16)
    xp = array_module(device)
    overlap = OverlapAdd(InverseSTFT(window, 16, xp, "float64"), 1)
    starts = np.cumsum([0, *pieces])
    parts = [overlap.push(xp.asarray(spectrum[None, a:b])) for a, b in itertools.pairwise(starts)]
    audio = np.concatenate([to_host(part)[0] for part in [*parts, overlap.finish()]])
    np.testing.assert_allclose(audio, expected, atol=1e-12)


@pytest.mark.parametrize("device", FLOAT64)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("tokens", [2, 3, 6, 23])
def test_streamed_audio_equals_whole(folder: Path, device: str, chunk: int, tokens: int) -> None:
    decoder = load_decoder(folder, device)
    states = np.random.default_rng(1).normal(size=(tokens, decoder.config.input_size)).astype(np.float32)
    whole = to_host(decoder(states))
    stream = decoder.stream()
    pieces = [stream.push(states[i : i + chunk]) for i in range(0, tokens, chunk)]
    joined = np.concatenate([*pieces, stream.finish()])
    assert whole.shape == joined.shape == ((tokens - 1) * 2048,)
    assert np.abs(joined - whole).max() <= 1e-5
    assert np.abs(whole).max() > 0.01


def test_long_utterances_go_through_in_pieces(folder: Path) -> None:
    decoder = load_decoder(folder, "portable", "float64")
    states = np.random.default_rng(2).normal(size=(300, decoder.config.input_size))
    whole = decoder(states)
    stream = decoder.stream()
    np.testing.assert_allclose(np.concatenate([stream.push(states), stream.finish()]), whole, atol=1e-6)


def test_batch_equals_each_alone(folder: Path) -> None:
    decoder = load_decoder(folder, "portable")
    states = np.random.default_rng(3).normal(size=(3, 7, decoder.config.input_size)).astype(np.float32)
    together = decoder(states)
    for row, audio in zip(states, together, strict=True):
        np.testing.assert_allclose(decoder(row), audio, atol=1e-6)


def test_a_stream_of_nothing_ends_in_nothing(folder: Path) -> None:
    stream = load_decoder(folder, "portable").stream()
    assert stream.push(np.empty((0, 1), np.float32)).size == 0
    assert stream.finish().size == 0


def test_one_state_makes_no_sound(folder: Path) -> None:
    decoder = load_decoder(folder, "portable")
    stream = decoder.stream()
    stream.push(np.ones((1, decoder.config.input_size), np.float32))
    assert stream.finish().size == 0


@pytest.mark.parametrize("shape", [(1, 5), (5,), (2, 3, 4, 5), (1, 1, 5), (0, 5)])
def test_wrong_shapes_are_refused(folder: Path, shape: tuple[int, ...]) -> None:
    decoder = load_decoder(folder, "portable")
    with pytest.raises(ParameterError, match=r"states of shape"):
        decoder(np.zeros(shape, np.float32))


def test_integer_states_are_refused(folder: Path) -> None:
    decoder = load_decoder(folder, "portable")
    with pytest.raises(ParameterError, match="int64"):
        decoder(np.zeros((3, decoder.config.input_size), np.int64))


def test_a_window_that_is_none_is_refused(folder: Path) -> None:
    class Windowed:
        path = "decoder.pth"

        def __contains__(self, name: str) -> bool:
            return True

        def pop(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
            return np.ones(shape, dtype)

    with pytest.raises(CheckpointError, match="not a Hann window"):
        stored_window(Windowed(), 64)  # type: ignore[arg-type]


def test_every_tensor_is_used(folder: Path) -> None:
    load_decoder(folder, "portable")
    with open_decoder(folder) as file, pytest.raises(CheckpointError, match="does not have"):
        file.finish()

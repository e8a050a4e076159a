"""What float16 costs the decoder: its rounding points in NumPy, on the bundled voice and on random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numerics import snr_db

import soprano_cupy
from soprano_cupy import Qwen3
from soprano_cupy.checkpoint import decoder_config, open_decoder
from soprano_cupy.config import DecoderConfig
from soprano_cupy.errors import DeviceError
from soprano_cupy.gpu.vocos_weights import HostWeights, inverse_envelopes
from soprano_cupy.portable.istft import hann
from soprano_cupy.portable.ops import gelu, layer_norm
from soprano_cupy.portable.vocos import PortableDecoder
from soprano_cupy.testing import TINY, make_checkpoint
from soprano_cupy.text import build_prompts
from soprano_cupy.tokenizer import Tokenizer

HALF_MAX = 65_504


def rounded(x: np.ndarray, seen: list[float]) -> np.ndarray:
    seen.append(float(np.abs(x).max()))
    return x.astype(np.float16).astype(np.float32)


def half_decode(weights: HostWeights, c: DecoderConfig, states: np.ndarray, seen: list[float]) -> np.ndarray:
    """(T, input) to samples with each product's input and matrix in float16, in the kernels' order of things."""
    w = {name: np.asarray(array, np.float32) for name, array in weights.arrays.items()}

    def product(name: str, x: np.ndarray) -> np.ndarray:
        return rounded(x, seen) @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return layer_norm(x, w[f"{name}.gain"], w[f"{name}.shift"])

    frames = np.arange(4 * (len(states) - 1) + 1)
    left, part = frames // 4, (frames % 4)[:, None] / np.float32(4)
    tokens = product("embed", states)
    tokens = np.concatenate((tokens, tokens[-1:]))
    x = norm("embed", (tokens[left] * (1 - part) + tokens[left + 1] * part).astype(np.float32))
    for i in range(c.num_blocks):
        block = f"block{i}"
        padded = np.pad(x, ((c.block_kernel // 2,) * 2, (0, 0)))
        taps = [padded[t : t + len(x)] * w[f"{block}.taps"][t] for t in range(c.block_kernel)]
        inner = gelu(product(f"{block}.expand", norm(block, sum(taps) + w[f"{block}.bias"])))
        x = x + product(f"{block}.contract", inner)
    head = product("head", norm("head", x)).reshape(len(x), -1, 2)
    magnitude = np.minimum(np.exp2(np.minimum(head[..., 0], 7)), 100)
    turns = (head[..., 1] - np.rint(head[..., 1])) * (2 * np.pi)
    spectrum = np.zeros((len(x), c.num_bins), complex)
    spectrum[:, 1:-1] = (magnitude * np.exp(1j * turns))[:, 1:]
    samples = np.fft.irfft(spectrum, c.n_fft) * (w["window"] * c.n_fft)
    total = np.zeros((len(x) + 3, c.hop_length))
    for f, frame in enumerate(samples):
        total[f : f + 4] += frame.reshape(4, -1)
    exists = np.array([[0 <= h - p < len(x) for p in range(4)] for h in range(len(total))])
    total *= w["inverse"][exists @ (1 << np.arange(4))]
    return total[2 : len(x) + 1].reshape(-1)


def test_the_bundled_voice_in_half_precision() -> None:
    """At least 50 dB of the float32 audio, and nothing that is rounded comes near the end of float16."""
    folder = Path(soprano_cupy.__file__).parent / "voices" / "mini"
    model, tokenizer = Qwen3.load(folder, "cpu"), Tokenizer.load(folder)
    with open_decoder(folder) as file:
        config = decoder_config(file)
        reference = PortableDecoder(file, config, "cpu", "float32", "test")
    with open_decoder(folder) as file:
        weights = HostWeights(file, config)
    seen: list[float] = []
    for text in ("The birch canoe slid on the smooth planks.", "Four hours of steady work faced us."):
        (prompt,) = build_prompts(text)
        states = np.asarray(model.generate(tokenizer.encode(prompt)).states, np.float32)
        assert len(states) > 10
        quality = snr_db(half_decode(weights, config, states, seen), reference.decode(states[None])[0])
        assert quality >= 50, quality
    assert 1 < max(seen) < HALF_MAX / 100


def test_random_weights_of_the_published_depth(tmp_path: Path) -> None:
    decoder = DecoderConfig(48, 64, 192, 8, 1, n_fft=128, hop_length=32)
    folder = make_checkpoint(tmp_path, seed=1, config=TINY, decoder=decoder)
    with open_decoder(folder) as file:
        reference = PortableDecoder(file, decoder, "cpu", "float64", "test")
    with open_decoder(folder) as file:
        weights = HostWeights(file, decoder)
    states = 15 * np.random.default_rng(0).normal(size=(20, 48)).astype(np.float32)
    quality = snr_db(half_decode(weights, decoder, states, []), reference.decode(states[None])[0])
    assert quality >= 50, quality


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, config=TINY)

    class Loud:
        """A file whose second matrices are too large once gamma is folded in."""

        def __init__(self, file: object) -> None:
            self.file, self.path = file, "decoder.pth"

        def __contains__(self, name: str) -> bool:
            return name in self.file  # type: ignore[operator]

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def pop(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
            values = self.file.pop(name, shape, dtype)  # type: ignore[attr-defined]
            return values * np.float32(1e6 if name.endswith("0.gamma") else 1)

    with open_decoder(folder) as file, pytest.raises(DeviceError, match=r"block0.contract .* beyond float16; choose"):
        HostWeights(Loud(file), decoder_config(file))  # type: ignore[arg-type]


def test_envelopes() -> None:
    """All four frames of a periodic Hann window sum to 1.5; the set of no frames divides by nothing."""
    inverse = inverse_envelopes(hann(64))
    np.testing.assert_allclose(inverse[15], 1 / 1.5)
    assert (inverse[0] == 0).all()
    np.testing.assert_allclose(1 / inverse[0b0110], (hann(64) ** 2)[16:32] + (hann(64) ** 2)[32:48])

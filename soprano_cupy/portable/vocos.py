"""The Vocos decoder in array code (Siuzdak, 2023; ConvNeXt blocks of Liu et al., 2022).

Whole utterances and streams run the same code: every convolution is computed where its whole window is
known, and the two ends of an utterance are padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint import TensorFile
from ..config import DecoderConfig
from ..device import array_module, to_host
from ..errors import CheckpointError
from ..runner import DecoderRunner, DecoderStream
from .istft import InverseSTFT, OverlapAdd, hann
from .ops import gelu, layer_norm, linear

Array = Any

MAX_MAGNITUDE = 100.0  # the reference clips each bin's magnitude here
PIECE_TOKENS = 128  # whole utterances go through in pieces, so that activations stay a few megabytes


@dataclass
class Block:
    """One ConvNeXt block's weights; the depthwise kernel is (taps, dim), matrices are (out, in)."""

    depthwise: Array
    depthwise_bias: Array
    norm: Array
    norm_bias: Array
    expand: Array
    expand_bias: Array
    contract: Array
    contract_bias: Array
    gamma: Array


class Weights:
    """All weights of a decoder on one device, in float32 or float64."""

    def __init__(self, file: TensorFile, config: DecoderConfig, xp: Any, dtype: str) -> None:
        self._file, self._xp, self._dtype = file, xp, dtype
        dim, c = config.dim, config
        embed = self._pop("decoder.embed.weight", dim, c.input_size, c.embed_kernel)
        self.embed = xp.ascontiguousarray(embed.transpose(2, 0, 1))  # (taps, dim, input)
        self.embed_bias = self._pop("decoder.embed.bias", dim)
        self.norm, self.norm_bias = self._norm("decoder.norm", dim)
        self.blocks = [self._block(f"decoder.convnext.{i}.", c) for i in range(c.num_blocks)]
        self.final_norm, self.final_norm_bias = self._norm("decoder.final_layer_norm", dim)
        self.head = self._pop("head.out.weight", c.n_fft + 2, dim)
        self.head_bias = self._pop("head.out.bias", c.n_fft + 2)
        self.window = stored_window(file, c.n_fft)
        file.finish()

    def _pop(self, name: str, *shape: int) -> Array:
        return self._xp.asarray(self._file.pop(name, shape, self._dtype))

    def _norm(self, prefix: str, size: int) -> tuple[Array, Array]:
        return self._pop(prefix + ".weight", size), self._pop(prefix + ".bias", size)

    def _block(self, prefix: str, c: DecoderConfig) -> Block:
        depthwise = self._pop(prefix + "dwconv.weight", c.dim, 1, c.block_kernel)
        return Block(
            depthwise=self._xp.ascontiguousarray(depthwise[:, 0].T),
            depthwise_bias=self._pop(prefix + "dwconv.bias", c.dim),
            norm=self._pop(prefix + "norm.weight", c.dim),
            norm_bias=self._pop(prefix + "norm.bias", c.dim),
            expand=self._pop(prefix + "pwconv1.weight", c.intermediate_size, c.dim),
            expand_bias=self._pop(prefix + "pwconv1.bias", c.intermediate_size),
            contract=self._pop(prefix + "pwconv2.weight", c.dim, c.intermediate_size),
            contract_bias=self._pop(prefix + "pwconv2.bias", c.dim),
            gamma=self._pop(prefix + "gamma", c.dim),
        )


def stored_window(file: TensorFile, n_fft: int) -> np.ndarray:
    """The checkpoint's own window (n_fft,) float64, or the periodic Hann window where it holds none.

    The reference multiplies by the window that the checkpoint stores, rounded to the checkpoint's dtype: in a
    float16 decoder that is 1e-4 away from the exact one. One that is no Hann window at all is refused.
    """
    exact = hann(n_fft)
    if "head.istft.window" not in file:
        return exact
    window = file.pop("head.istft.window", (n_fft,), "float64")
    if not np.abs(window - exact).max() < 5e-3:  # bfloat16 rounds by up to 2e-3
        raise CheckpointError(f"{file.path}: head.istft.window is not a Hann window; download the checkpoint again")
    return window


class PortableDecoder(DecoderRunner):
    """Runs in float32 or, as the oracle, in float64."""

    def __init__(self, file: TensorFile, config: DecoderConfig, device: str, dtype: str, reason: str) -> None:
        self.config, self.device, self.dtype, self.reason = config, device, dtype, reason
        self._xp = array_module(device)
        self._weights = Weights(file, config, self._xp, dtype)
        self._istft = InverseSTFT(self._weights.window, config.hop_length, self._xp, dtype)

    def decode(self, states: Array) -> Array:
        states = self._xp.asarray(states, self.dtype)
        voice = Voice(self, len(states))
        pieces = [
            voice.push(states[:, start : start + PIECE_TOKENS]) for start in range(0, states.shape[1], PIECE_TOKENS)
        ]
        return self._xp.concatenate([*pieces, voice.finish()], axis=1)

    def stream(self) -> DecoderStream:
        return PortableStream(self)

    def interpolate(self, states: Array, *, first: bool) -> Array:
        """(B, T, H) states to (B, 4(T-1), H) frames, the last of each four being a state itself.

        Linear interpolation with aligned corners; the very first frame of an utterance, which is the
        first state, comes in front when `first` is set.
        """
        count = self.config.frames_per_token
        shares = self._xp.arange(1, count + 1, dtype=self.dtype)[:, None] / count
        left, right = states[:, :-1, None], states[:, 1:, None]
        frames = (left * (1 - shares) + right * shares).reshape(len(states), -1, states.shape[-1])
        return self._xp.concatenate((states[:, :1], frames), axis=1) if first else frames

    def embed(self, frames: Array) -> Array:
        """The first convolution and its norm, where the whole window lies inside `frames`."""
        w = self._weights
        length = frames.shape[1] - len(w.embed) + 1
        x = linear(frames[:, :length], w.embed[0], w.embed_bias)
        for tap in range(1, len(w.embed)):
            x += linear(frames[:, tap : tap + length], w.embed[tap])
        return layer_norm(x, w.norm, w.norm_bias)

    def block(self, index: int, frames: Array) -> Array:
        """One ConvNeXt block, where the whole window lies inside `frames`."""
        w = self._weights.blocks[index]
        margin = len(w.depthwise) // 2
        length = frames.shape[1] - 2 * margin
        x = frames[:, :length] * w.depthwise[0] + w.depthwise_bias
        for tap in range(1, len(w.depthwise)):
            x += frames[:, tap : tap + length] * w.depthwise[tap]
        x = layer_norm(x, w.norm, w.norm_bias)
        x = linear(gelu(linear(x, w.expand, w.expand_bias)), w.contract, w.contract_bias)
        x *= w.gamma
        x += frames[:, margin : margin + length]
        return x

    def spectrum(self, frames: Array) -> Array:
        """(B, F, dim) frames to (B, F, bins) complex bins; the first and the last bin are zero."""
        w, xp = self._weights, self._xp
        x = linear(layer_norm(frames, w.final_norm, w.final_norm_bias), w.head, w.head_bias)
        bins = self.config.num_bins
        magnitude = xp.minimum(xp.exp(xp.minimum(x[..., :bins], 80.0)), MAX_MAGNITUDE)
        magnitude[..., 0] = 0
        magnitude[..., -1] = 0
        result = xp.empty(magnitude.shape, xp.result_type(magnitude.dtype, xp.complex64))
        result.real = magnitude * xp.cos(x[..., bins:])
        result.imag = magnitude * xp.sin(x[..., bins:])
        return result


class Voice:
    """`batch` utterances on their way: what every window still needs of the frames before."""

    def __init__(self, decoder: PortableDecoder, batch: int) -> None:
        self._decoder, self._batch, self._xp = decoder, batch, decoder._xp
        config = decoder.config
        stages = [(config.input_size, config.embed_kernel)] + [(config.dim, config.block_kernel)] * config.num_blocks
        self._margins = [kernel // 2 for _, kernel in stages]
        self._tails = [self._zeros(kernel // 2, size) for size, kernel in stages]
        self._last_state: Array = None
        self._overlap = OverlapAdd(decoder._istft, batch)

    def push(self, states: Array) -> Array:
        """Take (B, T, input) further states; return the (B, n) samples that are final now."""
        first = self._last_state is None
        if not first:
            states = self._xp.concatenate((self._last_state, states), axis=1)
        self._last_state = states[:, -1:]
        return self._run(self._decoder.interpolate(states, first=first), start=0)

    def finish(self) -> Array:
        """The samples that waited for a right neighbour, which is zero now."""
        pieces = []
        if self._last_state is not None:
            for stage, margin in enumerate(self._margins):
                if margin:
                    zeros = self._zeros(margin, self._tails[stage].shape[-1])
                    pieces.append(self._run(zeros, stage))
        return self._xp.concatenate([*pieces, self._overlap.finish()], axis=1)

    def _zeros(self, frames: int, size: int) -> Array:
        return self._xp.zeros((self._batch, frames, size), self._decoder.dtype)

    def _run(self, frames: Array, start: int) -> Array:
        """Send frames through the stages from `start` on; each keeps the part of its window still needed."""
        decoder = self._decoder
        for stage in range(start, len(self._margins)):
            margin = self._margins[stage]
            window = self._xp.concatenate((self._tails[stage], frames), axis=1)
            length = window.shape[1]
            self._tails[stage] = window[:, max(length - 2 * margin, 0) :]
            if length <= 2 * margin:
                return self._zeros(0, 1)[..., 0]
            frames = decoder.embed(window) if stage == 0 else decoder.block(stage - 1, window)
        return self._overlap.push(decoder.spectrum(frames))


class PortableStream(DecoderStream):
    """One utterance, piece by piece; each token's frames are computed once."""

    def __init__(self, decoder: PortableDecoder) -> None:
        self._decoder = decoder
        self._voice = Voice(decoder, 1)

    def push(self, states: Array) -> np.ndarray:
        if len(states) == 0:
            return np.empty(0, np.float32)
        return self._samples(self._voice.push(self._decoder._xp.asarray(states, self._decoder.dtype)[None]))

    def finish(self) -> np.ndarray:
        return self._samples(self._voice.finish())

    def _samples(self, audio: Array) -> np.ndarray:
        return to_host(audio[0]).astype(np.float32, copy=False)

"""The Vocos decoder on packed weights: `csrc/decode.c` behind the decoder's interface."""

from __future__ import annotations

import numpy as np

from ..checkpoint import TensorFile
from ..config import DecoderConfig
from ..errors import ParameterError
from ..portable.vocos import stored_window
from ..runner import DecoderRunner, DecoderStream
from . import _engine
from .features import choose_isa
from .threads import use_wanted_threads

# int8 weights leave 37 dB of the audio at the 80M decoder's size, bfloat16 ones 44 dB in the same time.
KEPT_AS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}


class CpuDecoder(DecoderRunner):
    """Runs a decoder with its matrices packed as float32 or bfloat16; all other arithmetic is float32.

    dtype: int8 is taken as bfloat16. Whole utterances are streams of 32 tokens a piece, so the two agree bit for
    bit and activations stay small. They go one after the other: 128 frames keep the matrix units as busy as any number
    would (a token takes as long in an utterance of 16 tokens as in one of 256), so there is nothing to gain from rows
    of several utterances in one product.
    """

    def __init__(
        self, file: TensorFile, config: DecoderConfig, dtype: str = "float32", reason: str = "", isa: str | None = None
    ) -> None:
        if dtype not in KEPT_AS:
            raise ParameterError(f"dtype = {dtype!r} is not available for the decoder; use one of {', '.join(KEPT_AS)}")
        isa, isa_reason = choose_isa(isa)
        threads = use_wanted_threads()
        self.config, self.device, self.dtype = config, "cpu", KEPT_AS[dtype]
        self.reason = f"{reason or 'asked for'}; {isa} kernels ({isa_reason}), {threads} thread(s)"
        self._model = _pack(file, config, self.dtype, isa)

    def decode(self, states: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(states, np.float32)
        return np.stack([_engine.Utterance(self._model).push(one, finish=True) for one in rows])

    def stream(self) -> DecoderStream:
        return CpuStream(self._model, self.config.token_samples)

    @property
    def weight_bytes(self) -> int:
        """Memory of all packed weights."""
        return int(self._model.weight_bytes)


class CpuStream(DecoderStream):
    """One utterance, piece by piece; each token's four frames are computed once.

    States wait until they make `least` samples final: the first audio costs one pass over the weights, not one a
    token.
    """

    def __init__(self, model: _engine.VocosModel, least: int) -> None:
        self._utterance, self._least = _engine.Utterance(model), least
        self._waiting = np.empty((0, model.input_size), np.float32)

    def push(self, states: np.ndarray) -> np.ndarray:
        return self._take(np.asarray(states, np.float32), finish=False)

    def finish(self) -> np.ndarray:
        return self._take(self._waiting[:0], finish=True)

    def _take(self, states: np.ndarray, *, finish: bool) -> np.ndarray:
        if states.ndim != 2 or states.shape[1] != self._waiting.shape[1]:
            raise ParameterError(f"states of shape {states.shape} must be (n, {self._waiting.shape[1]})")
        if self._utterance.finished:
            raise ParameterError("the utterance has ended; begin a new stream")
        waiting = np.concatenate((self._waiting, states))
        if not finish and self._utterance.samples(len(waiting)) < self._least:
            self._waiting = waiting
            return np.empty(0, np.float32)
        self._waiting = waiting[:0]
        samples: np.ndarray = self._utterance.push(waiting, finish=finish)
        return samples


def _pack(file: TensorFile, config: DecoderConfig, dtype: str, isa: str) -> _engine.VocosModel:
    """Read and pack tensor after tensor."""
    dim, inner, taps = config.dim, config.intermediate_size, config.embed_kernel
    model = _engine.VocosModel(config, dtype, isa)
    embed = file.view("decoder.embed.weight", (dim, config.input_size, taps))
    model.set_embedding(
        np.ascontiguousarray(embed.transpose(2, 0, 1)).reshape(taps * dim, config.input_size),
        file.pop("decoder.embed.bias", (dim,)),
        *_norm(file, "decoder.norm", dim),
    )
    del embed
    file.release_views()
    for index in range(config.num_blocks):
        prefix = f"decoder.convnext.{index}."
        kernel = file.pop(prefix + "dwconv.weight", (dim, 1, config.block_kernel))
        model.set_convolution(
            index,
            np.ascontiguousarray(kernel[:, 0].T),
            file.pop(prefix + "dwconv.bias", (dim,)),
            *_norm(file, prefix + "norm", dim),
        )
        model.set_mlp(
            index,
            file.view(prefix + "pwconv1.weight", (inner, dim)),
            file.pop(prefix + "pwconv1.bias", (inner,)),
            file.view(prefix + "pwconv2.weight", (dim, inner)),
            file.pop(prefix + "pwconv2.bias", (dim,)),
            file.pop(prefix + "gamma", (dim,)),
        )
        file.release_views()
    model.set_head(
        *_norm(file, "decoder.final_layer_norm", dim),
        file.view("head.out.weight", (config.n_fft + 2, dim)),
        file.pop("head.out.bias", (config.n_fft + 2,)),
    )
    model.set_window(stored_window(file, config.n_fft))
    file.finish()
    _engine.trim_memory()
    return model


def _norm(file: TensorFile, prefix: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    return file.pop(prefix + ".weight", (size,)), file.pop(prefix + ".bias", (size,))

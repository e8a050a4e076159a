"""Random weights that behave: what `soprano_cupy.testing` fills its checkpoints with."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ..config import DecoderConfig, ModelConfig
from .convert_dtype import float32_to_bfloat16
from .shapes import WINDOW, Shapes

LOGIT_STD = 4.0
STATE_STEP = 1000.0  # L1 distance of two unrelated states; the loop check calls under 300 stuck
STUCK_STATE_STEP = 100.0
AUDIO_RMS = 0.1
LOG_MAGNITUDE_STD = 1.0
STOP_HANDICAP = 1.35  # found by trying: its repetition penalty of 1.2, as it is in every prompt, and a little more


class Weights:
    """Random tensors by name; each has its own random numbers, so their order does not matter."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        raise NotImplementedError

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> np.ndarray:
        """float32 of `shape`, scaled in place."""
        values = np.random.default_rng([self.seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        return values

    def write(self, writer: Callable[..., None], path: Path, shapes: Shapes, dtype: str) -> None:
        def read(name: str) -> np.ndarray:
            values = self.tensor(name, shapes[name])
            return float32_to_bfloat16(values) if dtype == "bfloat16" else values

        writer(path, {name: (dtype, shape) for name, shape in shapes.items()}, read)


class LanguageModelWeights(Weights):
    """Unit variance from layer to layer; the final norm sets how far apart states are, the head the logits."""

    def __init__(self, seed: int, config: ModelConfig, mean_tokens: int | None, stuck: bool) -> None:
        super().__init__(seed)
        self.config = config
        self.mean_tokens = mean_tokens
        step = STUCK_STATE_STEP if stuck else STATE_STEP
        # Two unrelated states of H normal values differ by 2 / sqrt(pi) per value on average.
        self.state_scale = step / (config.hidden_size * 2 / math.sqrt(math.pi))
        self.head_std = LOGIT_STD / (self.state_scale * math.sqrt(config.hidden_size))
        # What embeddings and layers add to the residual stream, each as much as the others.
        self.residual_std = self.head_std if config.tie_embeddings else 1.0

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        head = "model.embed_tokens.weight" if self.config.tie_embeddings else "lm_head.weight"
        if name == head:
            values = self.normal(name, shape, self.head_std)
            values[self.config.eos_token_id] *= self._stop_gain()
            return values
        if name == "model.norm.weight":
            return self._final_norm(name, shape)
        if len(shape) == 1:
            return self.normal(name, shape, 0.1, 1.0)
        if "embed" in name:
            return self.normal(name, shape, self.residual_std)
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        return self.normal(name, shape, (self.residual_std if adds else 1.0) / math.sqrt(shape[1]))

    def _final_norm(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Half of the signs are negative with tied embeddings, else each token would call for itself again:
        its embedding is in the state and would meet itself in the head."""
        values = self.normal(name, shape, 0.1 * self.state_scale, self.state_scale)
        if self.config.tie_embeddings:
            values[::2] *= -1
        return values

    def _stop_gain(self) -> float:
        """How much larger the stop token's logits are, for it to win one step in `mean_tokens`."""
        if self.mean_tokens is None:
            return 0.1
        best_of_others = NormalDist().inv_cdf(1 - 1 / self.config.vocab_size)
        needed = NormalDist().inv_cdf(1 - 1 / max(self.mean_tokens, 3))
        return STOP_HANDICAP * best_of_others / needed


class DecoderWeights(Weights):
    """Unit variance through the blocks; the head's bias sets the loudness."""

    def __init__(self, seed: int, config: DecoderConfig, state_scale: float) -> None:
        super().__init__(seed)
        self.config = config
        self.state_scale = state_scale

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == WINDOW:
            return np.hanning(shape[0] + 1)[:-1].astype(np.float32)
        if name == "head.out.bias":
            return self._head_bias(name, shape)
        if name == "decoder.embed.weight":
            return self.normal(name, shape, 1 / (self.state_scale * math.sqrt(shape[1] * shape[2])))
        if name.endswith("gamma"):
            return self.normal(name, shape, 0.1, 0.5)
        if name.endswith("norm.weight"):
            return self.normal(name, shape, 0.1, 1.0)
        if name.endswith("bias"):
            return self.normal(name, shape, 0.1)
        return self.normal(name, shape, 1 / math.sqrt(math.prod(shape[1:])))

    def _head_bias(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Log-magnitudes around the loudness wanted, phases all around the circle.

        With magnitudes of mean square M, n_fft of them make frames of variance M / n_fft, and overlapping
        windows leave 1 / 1.5 of that: M = 1.5 n_fft rms^2 = exp(2 mean + 2 std^2).
        """
        bias = self.normal(name, shape, math.pi)
        mean = math.log(1.5 * self.config.n_fft * AUDIO_RMS**2) / 2 - LOG_MAGNITUDE_STD**2
        bias[: self.config.num_bins] = self.normal(f"{name}.magnitude", (self.config.num_bins,), 0.3, mean)
        return bias

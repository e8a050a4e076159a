"""The language model as users meet it: load a folder, run it forward, generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import open_language_model
from .config import ModelConfig
from .device import resolve_device, to_host
from .errors import ParameterError
from .generation import Generation, Request, generate
from .runner import Array, LanguageModelRunner
from .sampling import SamplingParams
from .select import select_language_model


class Qwen3:
    """A Qwen3 language model on one device.

    `config` holds its sizes; `runner` computes; `runner.reason` says why that one and why its attention.
    """

    def __init__(self, runner: LanguageModelRunner) -> None:
        self.runner = runner
        self.config = runner.config

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: str = "float32", attention: str = "auto") -> Qwen3:
        """Read `config.json` and `model.safetensors` of a checkpoint folder.

        device: auto, cpu, cuda or cuda:N. dtype: what weights are kept in; auto takes the device's best.
        attention: auto, flash or standard. Raises `CheckpointError`, `DeviceError`, `ParameterError` or
        `AttentionUnavailable` with what is wrong and what to do.
        """
        config = ModelConfig.from_folder(folder)
        where, _ = resolve_device(device)
        with open_language_model(folder) as file:
            return cls(select_language_model(file, config, where, dtype, attention))

    def forward(self, ids: Any) -> tuple[Array, Array]:
        """Hidden states and logits of every position.

        ids: integers (B, S) or (S,), 0 to vocab_size - 1. Returns states (B, S, hidden_size), after the final
        norm, and logits (B, S, vocab_size), on the model's device; without the batch axis for (S,).
        """
        tokens = self._check_ids(np.asarray(to_host(ids)), dimensions=(1, 2))
        batch = tokens.reshape(-1, tokens.shape[-1])
        count, length = batch.shape
        cache = self.runner.new_cache(count, length)
        starts = np.arange(count + 1, dtype=np.int32) * length
        states = self.runner.extend(cache, batch.ravel(), starts)
        logits = self.runner.logits(states)
        shape = tokens.shape
        return states.reshape(*shape, -1), logits.reshape(*shape, -1)

    def generate(
        self,
        ids: Any,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        repetition_penalty: float = 1.2,
        seed: int | None = None,
    ) -> Any:
        """Continue a prompt (S,), or several: (B, S) or a list of prompts of any lengths.

        Returns a `Generation` (tokens, states, finish_reason), or a list of them for several prompts. The
        parameters are those of `SamplingParams`; sequence i of a batch draws from stream i of `seed`.
        """
        params = SamplingParams(temperature, top_p, repetition_penalty, max_new_tokens, seed).seeded()
        single, prompts = self._check_prompts(ids)
        requests = [Request(prompt, params, stream) for stream, prompt in enumerate(prompts)]
        results: list[Generation] = generate(self.runner, requests)
        return results[0] if single else results

    def _check_prompts(self, ids: Any) -> tuple[bool, list[np.ndarray]]:
        """Whether one prompt was given, and all of them as (S,) int32 arrays."""
        if isinstance(ids, Sequence) and len(ids) and not np.isscalar(ids[0]):
            return False, [self._check_ids(np.asarray(to_host(row)), dimensions=(1,)) for row in ids]
        array = self._check_ids(np.asarray(to_host(ids)), dimensions=(1, 2))
        return array.ndim == 1, list(array.reshape(-1, array.shape[-1]))

    def _check_ids(self, ids: np.ndarray, dimensions: tuple[int, ...]) -> np.ndarray:
        if ids.ndim not in dimensions or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ParameterError(
                f"ids of shape {ids.shape} and dtype {ids.dtype} must be integers (S,) or (B, S) with S >= 1"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            wrong = int(ids.max() if ids.min() >= 0 else ids.min())
            raise ParameterError(f"ids holds {wrong}; this model knows ids 0 to {self.config.vocab_size - 1}")
        if ids.shape[-1] > self.config.max_positions:
            raise ParameterError(
                f"ids has {ids.shape[-1]} tokens; this model reads at most {self.config.max_positions}: split the text"
            )
        return ids.astype(np.int32)

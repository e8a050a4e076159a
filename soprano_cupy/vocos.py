"""The decoder as users meet it: load a folder, turn hidden states into samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import decoder_config, open_decoder
from .device import array_module, resolve_device
from .errors import ParameterError
from .runner import DecoderRunner, DecoderStream
from .select import select_decoder


class VocosDecoder:
    """A Vocos decoder on one device: `config` holds its sizes, `runner` computes."""

    def __init__(self, runner: DecoderRunner) -> None:
        self.runner = runner
        self.config = runner.config

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: str = "float32") -> VocosDecoder:
        """Read `decoder.safetensors`, or else `decoder.pth`, of a checkpoint folder.

        device: auto, cpu, cuda or cuda:N. dtype: what weights are kept in: float32, bfloat16 or int8 on the CPU,
        where the arithmetic around them is float32; float32 on a GPU; float64 as a reference. Raises
        `CheckpointError`, `DeviceError` or `ParameterError`.
        """
        where, _ = resolve_device(device)
        with open_decoder(folder) as file:
            return cls(select_decoder(file, decoder_config(file), where, dtype))

    def __call__(self, states: Any) -> Any:
        """Samples in about -1 to 1 for the hidden states of whole utterances.

        states: (B, T, input_size) or (T, input_size), T >= 2, NumPy or CuPy. Returns (B, (T - 1) * 2048) samples
        at 32 kHz on the decoder's device, in the decoder's dtype; without the batch axis for (T, input_size).
        """
        xp = array_module(self.runner.device)
        array = xp.asarray(states)
        size = self.config.input_size
        if array.ndim not in (2, 3) or array.shape[-1] != size or array.shape[-2] < 2 or array.dtype.kind not in "fV":
            raise ParameterError(
                f"states of shape {array.shape} and dtype {array.dtype} must be floats (B, T, {size}) with T >= 2"
            )
        audio = self.runner.decode(array if array.ndim == 3 else array[None])
        return audio if array.ndim == 3 else audio[0]

    def stream(self) -> DecoderStream:
        """A fresh state for one utterance that arrives in pieces; the pieces' samples, joined, are the whole's."""
        return self.runner.stream()

"""The peer "graph": a Qwen3 decode step and a Vocos decoder in plain torch operations, the step in a CUDA graph.

What a PyTorch program reaches without kernels of its own: 16-bit weights, one product for queries, keys and values
and one for gate and up, scaled_dot_product_attention on a static cache, the most likely token fed back on the device.
Two choices favour it: the query heads of one key-value head are given to attention as rows, which saves repeating
the keys, and the length of the context is baked into the graph, so that no mask and no unused key is read.
The decoder is float32, as the PyTorch package runs it.

Job: {"folder", "device", "dtype", "context", "batches", "steps", "repeats", "voices": [[voices, tokens], ...],
"check": FILE.npz}. The file holds ids (n, S), logits (n, vocab) behind each sequence, states (1, T, hidden) and audio
(1, samples); the answer tells how far these are, before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.workers import job, tell
from soprano_cupy.checkpoint import TensorFile, decoder_config, open_decoder, open_language_model
from soprano_cupy.config import SAMPLE_RATE_HZ, ModelConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class LanguageModel:
    """Weights on the device, matrices stacked where they share their input."""

    def __init__(self, file: TensorFile, config: ModelConfig, device: str, dtype: str) -> None:
        self.config, self.device, self.dtype = config, device, DTYPES[dtype]
        self._file = file
        c = config
        self.embeddings = self._matrix("model.embed_tokens", c.vocab_size, c.hidden_size)
        self.head = self.embeddings if c.tie_embeddings else self._matrix("lm_head", c.vocab_size, c.hidden_size)
        self.norm = self._gain("model.norm", c.hidden_size)
        self.layers = [self._layer(f"model.layers.{i}.") for i in range(c.num_layers)]
        angles = np.arange(c.max_positions)[:, None] * c.rope_frequencies()
        self.cos, self.sin = (self._table(np.concatenate((f(angles),) * 2, axis=1)) for f in (np.cos, np.sin))

    def _table(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, self.dtype)

    def _gain(self, name: str, size: int) -> torch.Tensor:
        return torch.from_numpy(self._file.pop(name + ".weight", (size,))).to(self.device, self.dtype)

    def _matrix(self, name: str, rows: int, columns: int) -> torch.Tensor:
        return torch.from_numpy(self._file.pop(name + ".weight", (rows, columns))).to(self.device, self.dtype)

    def _layer(self, prefix: str) -> dict[str, torch.Tensor]:
        c, attention, mlp = self.config, prefix + "self_attn.", prefix + "mlp."
        projections = (("q_proj", c.q_size), ("k_proj", c.kv_size), ("v_proj", c.kv_size))
        gates = ("gate_proj", "up_proj")
        return {
            "input_norm": self._gain(prefix + "input_layernorm", c.hidden_size),
            "qkv": torch.cat([self._matrix(attention + name, size, c.hidden_size) for name, size in projections]),
            "q_norm": self._gain(attention + "q_norm", c.head_dim),
            "k_norm": self._gain(attention + "k_norm", c.head_dim),
            "o": self._matrix(attention + "o_proj", c.hidden_size, c.q_size),
            "post_norm": self._gain(prefix + "post_attention_layernorm", c.hidden_size),
            "gate_up": torch.cat([self._matrix(mlp + name, c.intermediate_size, c.hidden_size) for name in gates]),
            "down": self._matrix(mlp + "down_proj", c.hidden_size, c.intermediate_size),
        }


class DecodeStep:
    """One token for each of `batch` sequences of the same length; `ids` holds the tokens that go in, then those out."""

    def __init__(self, model: LanguageModel, batch: int, capacity: int) -> None:
        self.model = model
        c = model.config
        shape = (c.num_layers, batch, c.num_kv_heads, capacity, c.head_dim)
        self.keys = torch.randn(shape, device=model.device, dtype=model.dtype)
        self.values = torch.randn(shape, device=model.device, dtype=model.dtype)
        self.ids = torch.randint(4, c.vocab_size, (batch,), device=model.device)

    def run(self, position: int) -> torch.Tensor:
        """The logits (batch, vocab) of the tokens in `ids`, which stand at `position`; the best ones replace them."""
        model = self.model
        x = functional.embedding(self.ids, model.embeddings)
        for index, layer in enumerate(model.layers):
            attended = self._attend(index, layer, self._norm(x, layer["input_norm"]), position)
            x = x + functional.linear(attended, layer["o"])
            gate, up = functional.linear(self._norm(x, layer["post_norm"]), layer["gate_up"]).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, layer["down"])
        logits = functional.linear(self._norm(x, model.norm), model.head)
        self.ids.copy_(logits.argmax(dim=-1))
        return logits

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], gain, self.model.config.rms_norm_eps)

    def _attend(self, index: int, layer: dict[str, torch.Tensor], x: torch.Tensor, position: int) -> torch.Tensor:
        c = self.model.config
        parts = functional.linear(x, layer["qkv"]).split([c.q_size, c.kv_size, c.kv_size], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, c.head_dim)) for part in parts)
        q = self._rotate(self._norm(q, layer["q_norm"]), position)
        k = self._rotate(self._norm(k, layer["k_norm"]), position)
        keys, values = self.keys[index], self.values[index]
        keys[:, :, position] = k
        values[:, :, position] = v
        rows = q.unflatten(1, (c.num_kv_heads, c.group_size))  # the heads that read the same keys, as rows of queries
        seen = slice(0, position + 1)
        return functional.scaled_dot_product_attention(rows, keys[:, :, seen], values[:, :, seen]).flatten(1)

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * self.model.cos[position] + torch.cat((-high, low), dim=-1) * self.model.sin[position]


class Decoder:
    """Vocos in float32: (B, T, hidden) states to (B, (T - 1) * 2048) samples."""

    def __init__(self, folder: str, device: str) -> None:
        with open_decoder(folder) as file:
            self.config = decoder_config(file)
            names = [name for name in file.names() if "window" not in name]
            arrays = {name: file.pop(name, file.shape(name)) for name in names}
        self.weights = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        self.window = torch.hann_window(self.config.n_fft, device=device)

    def run(self, states: torch.Tensor) -> torch.Tensor:
        c = self.config
        frames = c.frames_per_token * (states.shape[1] - 1) + 1
        x = functional.interpolate(states.transpose(1, 2), size=frames, mode="linear", align_corners=True)
        x = self._conv(x, "decoder.embed", c.embed_kernel)
        x = self._norm(x.transpose(1, 2), "decoder.norm")
        for index in range(c.num_blocks):
            x = x + self._block(x, f"decoder.convnext.{index}.")
        head = self._linear(self._norm(x, "decoder.final_layer_norm"), "head.out").transpose(1, 2)
        magnitude, phase = head.exp().clip(max=100.0)[:, : c.num_bins], head[:, c.num_bins :]
        spectrum = torch.polar(magnitude, phase)
        spectrum[:, 0] = spectrum[:, -1] = 0
        return torch.istft(spectrum, c.n_fft, c.hop_length, c.n_fft, self.window, center=True)

    def _block(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        c = self.config
        y = self._conv(x.transpose(1, 2), prefix + "dwconv", c.block_kernel, groups=c.dim).transpose(1, 2)
        y = functional.gelu(self._linear(self._norm(y, prefix + "norm"), prefix + "pwconv1"))
        return self._linear(y, prefix + "pwconv2") * self.weights[prefix + "gamma"]

    def _conv(self, x: torch.Tensor, name: str, width: int, groups: int = 1) -> torch.Tensor:
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return functional.conv1d(x, weight, bias, padding=width // 2, groups=groups)

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gain, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return functional.layer_norm(x, x.shape[-1:], gain, bias, 1e-6)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])


# ---- how far it is from what it must be ----


def logits_error(model: LanguageModel, ids: np.ndarray, exact: np.ndarray) -> float:
    """Relative error (Frobenius) of the logits behind sequences of equal length (n, S), token after token."""
    step = DecodeStep(model, *ids.shape)
    step.keys.fill_(torch.nan)
    step.values.fill_(torch.nan)
    tokens = torch.from_numpy(ids.astype(np.int64)).to(model.device)
    for position in range(ids.shape[1]):
        step.ids.copy_(tokens[:, position])
        logits = step.run(position)
    return relative_error(logits.double().cpu().numpy(), exact)


def audio_error(decoder: Decoder, states: np.ndarray, exact: np.ndarray, device: str) -> float:
    return relative_error(decoder.run(torch.from_numpy(states).to(device)).cpu().numpy(), exact)


def relative_error(values: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(values - exact) / np.linalg.norm(exact))


# ---- time ----


def step_us(model: LanguageModel, batch: int, context: int, steps: int, repeats: int) -> float:
    """Median microseconds of a step whose sequences have `context` tokens, its own included."""
    step = DecodeStep(model, batch, context)
    if model.device == "cpu":
        return median_us(lambda: step.run(context - 1), steps, repeats, lambda: None)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which fills the tokens and the caches
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run(context - 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step.run(context - 1)
    with torch.cuda.stream(side):
        return median_us(graph.replay, steps, repeats, side.synchronize)


def median_us(call: Callable[[], Any], calls: int, repeats: int, wait: Callable[[], Any]) -> float:
    """Median over `repeats` of the microseconds of one of `calls` calls in a row, after as many to warm up."""
    samples = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        samples.append((time.perf_counter() - start) * 1e6 / calls)
    return median(samples[1:])


def real_time_factor(decoder: Decoder, voices: int, tokens: int, device: str, repeats: int) -> float:
    """Seconds of sound for each second, states and samples on the device."""
    states = torch.randn((voices, tokens + 1, decoder.config.input_size), device=device)
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    seconds = median_us(lambda: decoder.run(states), 1, repeats, wait) / 1e6
    return voices * tokens * decoder.config.token_samples / SAMPLE_RATE_HZ / seconds


@torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not looked at where this is checked
def measure(asked: dict[str, Any]) -> dict[str, Any]:
    folder, device, repeats = asked["folder"], asked["device"], asked["repeats"]
    config = ModelConfig.from_folder(folder)
    with open_language_model(folder) as file:
        model = LanguageModel(file, config, device, asked["dtype"])
    decoder = Decoder(folder, device)
    known = np.load(asked["check"])
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "logits_error": logits_error(model, known["ids"], known["logits"]),
        "audio_error": audio_error(decoder, known["states"], known["audio"], device),
        "step_us": {},
        "vocos": {},
    }
    for batch in asked["batches"]:
        result["step_us"][batch] = step_us(model, batch, asked["context"], asked["steps"], repeats)
    for voices, tokens in asked["voices"]:
        result["vocos"][f"B{voices}/T{tokens}"] = real_time_factor(decoder, voices, tokens, device, repeats)
    return result


if __name__ == "__main__":
    tell(measure(job()))

"""The least that a GPU has to do: bytes that must be read or written once, arithmetic of the matrix products.

Divided by what the same GPU reached in a large copy and in a large matrix product, the larger of the two times is
the limit that a result stands beside. Weights and caches count two bytes an element, samples four.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from soprano_cupy.config import DecoderConfig, ModelConfig

ELEMENT_BYTES = 2
SAMPLE_BYTES = 4


@dataclass(frozen=True)
class Work:
    """Bytes that move through memory, and floating-point operations."""

    moved: float
    flops: float

    def seconds(self, limits: Mapping[str, float]) -> float:
        """The time of the larger of the two at `limits`, which hold copy_tb_s and matmul_tflop_s."""
        return max(self.moved / limits["copy_tb_s"], self.flops / limits["matmul_tflop_s"]) / 1e12


def language_model_parameters(config: ModelConfig) -> int:
    """Elements of the matrices that one step multiplies with: all but the embeddings."""
    c = config
    layer = c.hidden_size * (2 * c.q_size + 2 * c.kv_size + 3 * c.intermediate_size)
    return c.num_layers * layer + c.vocab_size * c.hidden_size


def cache_bytes(config: ModelConfig) -> int:
    """Keys and values of one token in all layers."""
    return config.num_layers * 2 * config.kv_size * ELEMENT_BYTES


def step_work(config: ModelConfig, batch: int, context: float) -> Work:
    """One token for each of `batch` voices that have `context` tokens each, their own included."""
    parameters = language_model_parameters(config)
    moved = parameters * ELEMENT_BYTES + batch * context * cache_bytes(config)
    return Work(moved, batch * (2 * parameters + _attention_flops(config, context)))


def prefill_work(config: ModelConfig, prompts: Sequence[int]) -> Work:
    """Prompts of these lengths together, with the logits of their last tokens alone."""
    head = config.vocab_size * config.hidden_size
    parameters = language_model_parameters(config)
    tokens = sum(prompts)
    attention = sum(_attention_flops(config, (length + 1) / 2) * length for length in prompts)
    flops = 2 * (parameters - head) * tokens + 2 * head * len(prompts) + attention
    return Work(parameters * ELEMENT_BYTES + tokens * cache_bytes(config), flops)


def decoder_work(config: DecoderConfig, voices: int, tokens: int) -> Work:
    """`voices` utterances of `tokens` tokens of sound each; the first layer, of width 1, runs once a token."""
    blocks = config.num_blocks * 2 * config.dim * config.intermediate_size
    embed = config.embed_kernel * config.input_size * config.dim
    head = config.dim * (config.n_fft + 2)
    embed_rows = 1 if config.embed_kernel == 1 else config.frames_per_token
    per_token = embed_rows * embed + config.frames_per_token * (blocks + head)
    samples = voices * tokens * config.token_samples
    states = voices * (tokens + 1) * config.input_size
    moved = (blocks + embed + head + states) * ELEMENT_BYTES + samples * SAMPLE_BYTES
    return Work(moved, 2 * per_token * voices * tokens)


def speech_seconds(
    model: ModelConfig, decoder: DecoderConfig, prompts: Sequence[int], tokens: int, limits: Mapping[str, float]
) -> float:
    """The limit of whole sentences spoken together: their prompts, `tokens` steps less the prompt's, the decoder."""
    batch, mean = len(prompts), sum(prompts) / len(prompts)
    steps = sum(step_work(model, batch, mean + step).seconds(limits) for step in range(1, tokens))
    first = prefill_work(model, prompts).seconds(limits)
    return first + steps + decoder_work(decoder, batch, max(tokens - 1, 1)).seconds(limits)


def _attention_flops(config: ModelConfig, context: float) -> float:
    """Scores and weighted sums of one query token."""
    return 4 * config.num_layers * config.q_size * context

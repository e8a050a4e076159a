"""Which tensors a checkpoint holds and how large each is: the published names, from one configuration."""

from __future__ import annotations

import math

from ..config import FRAMES_PER_TOKEN, DecoderConfig, ModelConfig
from ..errors import CheckpointError
from .tensors import TensorFile

Shapes = dict[str, tuple[int, ...]]

HOPS_PER_WINDOW = 4  # n_fft = 4 hops: the overlap of every Soprano decoder
WINDOW = "head.istft.window"  # the Hann window, kept in some files though it follows from n_fft
MAX_BLOCKS = 1024


def language_model_shapes(config: ModelConfig) -> Shapes:
    """Every tensor of `model.safetensors`; a matrix is (outputs, inputs)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (config.q_size, hidden),
            f"{name}.self_attn.k_proj.weight": (config.kv_size, hidden),
            f"{name}.self_attn.v_proj.weight": (config.kv_size, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, config.q_size),
            f"{name}.self_attn.q_norm.weight": (config.head_dim,),
            f"{name}.self_attn.k_norm.weight": (config.head_dim,),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.mlp.gate_proj.weight": (inner, hidden),
            f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def decoder_shapes(config: DecoderConfig) -> Shapes:
    """Every tensor of a decoder; a convolution is (outputs, inputs per group, width)."""
    dim, inner = config.dim, config.intermediate_size
    shapes: Shapes = {
        "decoder.embed.weight": (dim, config.input_size, config.embed_kernel),
        "decoder.embed.bias": (dim,),
        "decoder.norm.weight": (dim,),
        "decoder.norm.bias": (dim,),
    }
    for block in range(config.num_blocks):
        name = f"decoder.convnext.{block}"
        shapes |= {
            f"{name}.gamma": (dim,),
            f"{name}.dwconv.weight": (dim, 1, config.block_kernel),
            f"{name}.dwconv.bias": (dim,),
            f"{name}.norm.weight": (dim,),
            f"{name}.norm.bias": (dim,),
            f"{name}.pwconv1.weight": (inner, dim),
            f"{name}.pwconv1.bias": (inner,),
            f"{name}.pwconv2.weight": (dim, inner),
            f"{name}.pwconv2.bias": (dim,),
        }
    return shapes | {
        "decoder.final_layer_norm.weight": (dim,),
        "decoder.final_layer_norm.bias": (dim,),
        "head.out.weight": (config.n_fft + 2, dim),
        "head.out.bias": (config.n_fft + 2,),
        WINDOW: (config.n_fft,),
    }


def decoder_config(file: TensorFile) -> DecoderConfig:
    """The sizes of a decoder, inferred from its tensors' shapes and checked against all of them.

    The head gives n_fft / 2 + 1 log-magnitudes and as many phases, so it has n_fft + 2 rows; one hop is a
    quarter of n_fft. The window tensor may be absent.
    """
    blocks = {name.split(".")[2] for name in file.names() if name.startswith("decoder.convnext.")}
    if not 1 <= len(blocks) <= MAX_BLOCKS:
        raise CheckpointError(f"{file.path} has {len(blocks)} ConvNeXt blocks; is it a Soprano decoder?")
    dim, input_size, embed_kernel = _sizes(file, "decoder.embed.weight", 3)
    _, _, block_kernel = _sizes(file, "decoder.convnext.0.dwconv.weight", 3)
    intermediate_size, _ = _sizes(file, "decoder.convnext.0.pwconv1.weight", 2)
    rows, _ = _sizes(file, "head.out.weight", 2)
    n_fft = rows - 2
    if n_fft < HOPS_PER_WINDOW or n_fft % HOPS_PER_WINDOW:
        raise CheckpointError(
            f"{file.path}: head.out.weight has {rows} rows; n_fft + 2 with n_fft a multiple of 4 expected"
        )
    if not embed_kernel % 2 or not block_kernel % 2:
        raise CheckpointError(
            f"{file.path}: convolutions of even width {embed_kernel}, {block_kernel} are not supported"
        )
    config = DecoderConfig(
        input_size=input_size,
        dim=dim,
        intermediate_size=intermediate_size,
        num_blocks=len(blocks),
        embed_kernel=embed_kernel,
        block_kernel=block_kernel,
        n_fft=n_fft,
        hop_length=n_fft // HOPS_PER_WINDOW,
        frames_per_token=FRAMES_PER_TOKEN,
    )
    check_shapes(file, decoder_shapes(config), optional={WINDOW})
    return config


def check_shapes(file: TensorFile, expected: Shapes, optional: set[str] | frozenset[str] = frozenset()) -> None:
    """`CheckpointError` naming the first tensor that is missing or of another shape."""
    for name, shape in expected.items():
        if (name in file or name not in optional) and file.shape(name) != shape:
            raise CheckpointError(f"{file.path}: tensor {name} has shape {file.shape(name)}, expected {shape}")


def parameter_count(shapes: Shapes) -> int:
    """Number of weights, the window not counted."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name != WINDOW)


def _sizes(file: TensorFile, name: str, dimensions: int) -> tuple[int, ...]:
    shape = file.shape(name)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"{file.path}: tensor {name} has shape {shape}; {dimensions} sizes of at least 1 expected"
        )
    return shape

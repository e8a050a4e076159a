"""Which implementation computes on a device, and why: the one place where that is decided.

CPU: the compiled engine of `cpu/`, or the array code of `portable/` for float64, for matmul-softmax attention, and
where the extension modules are missing. GPU: the engine of `gpu/` in 16-bit weights, or the array code on CuPy, with
the flash-attention kernels where they work, for wider weights, for matmul-softmax attention, and where the engine
cannot run.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TypeVar

from .attention import select_attention
from .checkpoint import TensorFile
from .config import DecoderConfig, ModelConfig
from .device import cuda_index
from .errors import DeviceError, ParameterError
from .runner import DecoderRunner, LanguageModelRunner

logger = logging.getLogger(__name__)

Runner = TypeVar("Runner", LanguageModelRunner, DecoderRunner)

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16", "int8")
CPU_ENGINE_DTYPES = ("float32", "bfloat16", "int8")
CPU_AUTO = "bfloat16"  # the checkpoints' own precision: nothing is rounded, and half of float32's memory is read
GPU_ENGINE_DTYPES = ("bfloat16", "float16")
GPU_AUTO = "bfloat16"  # of array code


def select_language_model(
    file: TensorFile, config: ModelConfig, device: str, dtype: str, attention: str
) -> LanguageModelRunner:
    """The runner for a checkpoint's language model on `cpu` or `cuda:N`.

    `ParameterError` names a dtype that the device cannot run; `AttentionUnavailable` says why flash attention,
    asked for explicitly, cannot.
    """
    _check_dtype(dtype)
    if device == "cpu" and dtype in ("auto", *CPU_ENGINE_DTYPES) and attention != "standard":
        problem = cpu_engine_problem()
        if problem is None:
            from .cpu.qwen3 import CpuLanguageModel

            chosen = CPU_AUTO if dtype == "auto" else dtype
            return _told(CpuLanguageModel(file, config, chosen, f"compiled engine, {_asked(dtype)}"))
        _warn_slow("the CPU engine", problem)
    if device != "cpu" and dtype in ("auto", *GPU_ENGINE_DTYPES) and attention != "standard":
        runner = _gpu_language_model(file, config, device, dtype)
        if runner is not None:
            return _told(runner)
    from .portable.qwen3 import PortableLanguageModel

    chosen = _portable_dtype(device, dtype)
    choice = select_attention(
        attention,
        device=device,
        dtype=chosen,
        head_dim=config.head_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
    )
    reason = f"array code, {_asked(dtype)}; attention {choice.name}: {choice.reason}"
    return _told(PortableLanguageModel(file, config, device, chosen, choice, reason))


def select_decoder(file: TensorFile, config: DecoderConfig, device: str, dtype: str) -> DecoderRunner:
    """The runner for a checkpoint's decoder on `cpu` or `cuda:N`; `ParameterError` as above."""
    _check_dtype(dtype)
    if device == "cpu" and dtype in ("auto", *CPU_ENGINE_DTYPES) and cpu_engine_problem() is None:
        from .cpu.vocos import CpuDecoder

        chosen = "float32" if dtype == "auto" else dtype
        return _told(CpuDecoder(file, config, chosen, f"compiled engine, {_asked(dtype)}"))
    if device != "cpu" and dtype in ("auto", *GPU_ENGINE_DTYPES):
        runner = _gpu_decoder(file, config, device, dtype)
        if runner is not None:
            return _told(runner)
    from .portable.vocos import PortableDecoder

    # Array code keeps the decoder wide on every device: phases do not bear bfloat16's 8 bits.
    chosen = "float64" if dtype == "float64" else "float32"
    return _told(PortableDecoder(file, config, device, chosen, f"array code, {_asked(dtype)}"))


def _gpu_language_model(file: TensorFile, config: ModelConfig, device: str, dtype: str) -> LanguageModelRunner | None:
    """The GPU engine's runner; None, with the reason in the log, where it cannot run."""
    from .cuda.module import device_facts
    from .gpu.qwen3 import GpuLanguageModel, best_dtype, engine_problem

    chosen = best_dtype(device_facts(cuda_index(device)).capability) if dtype == "auto" else dtype
    problem = engine_problem(config, device, chosen)
    try:
        if problem is None:
            return GpuLanguageModel(file, config, device, chosen, f"GPU engine, {_asked(dtype)}")
    except DeviceError as error:
        if error.sticky:
            raise
        problem = str(error)
        file.rewind()
    _warn_slow("the GPU engine", problem)
    return None


def _gpu_decoder(file: TensorFile, config: DecoderConfig, device: str, dtype: str) -> DecoderRunner | None:
    from .gpu.vocos import GpuDecoder, decoder_problem

    problem = decoder_problem(config, device)
    try:
        if problem is None:
            return GpuDecoder(file, config, device, f"GPU engine, {_asked(dtype)}; its matrices are float16")
    except DeviceError as error:
        if error.sticky:
            raise
        problem = str(error)
        file.rewind()
    _warn_slow("the GPU decoder", problem)
    return None


def _warn_slow(what: str, problem: str) -> None:
    logger.warning("%s is off: %s; array code is used, which is slower", what, problem)


@lru_cache(maxsize=1)
def cpu_engine_problem() -> str | None:
    """Why the compiled CPU engine cannot run, as one line; None when it can."""
    try:
        from .cpu import _engine  # noqa: F401
    except ImportError as error:
        return f"its extension module cannot be loaded ({error}); install again where there is a C compiler"
    return None


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ParameterError(f"dtype = {dtype!r} is not known; use one of {', '.join(DTYPES)}")


def _portable_dtype(device: str, dtype: str) -> str:
    if device == "cpu":
        if dtype not in ("auto", "float64", "float32"):
            raise ParameterError(
                f"dtype = {dtype!r} is not available on the CPU here; use auto or float32, or bfloat16 or int8 "
                "with attention auto"
            )
        return "float32" if dtype == "auto" else dtype
    if dtype == "int8":
        raise ParameterError("dtype = 'int8' is not available on a GPU; use bfloat16, float16 or float32")
    return GPU_AUTO if dtype == "auto" else dtype


def _asked(dtype: str) -> str:
    return "by default" if dtype == "auto" else f"{dtype} asked for"


def _told(runner: Runner) -> Runner:
    logger.info("%s on %s in %s: %s", type(runner).__name__, runner.device, runner.dtype, runner.reason)
    return runner

"""Attention for every shape of the model: flash kernels on NVIDIA GPUs, matmul-softmax everywhere."""

from __future__ import annotations

from .dispatch import AttentionChoice, attention, flash_attention, select_attention
from .problem import Problem
from .standard import standard_attention

__all__ = ["AttentionChoice", "Problem", "attention", "flash_attention", "select_attention", "standard_attention"]

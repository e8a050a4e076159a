"""The GPU engine: the whole path from token ids to samples on one NVIDIA GPU, in our own kernels."""

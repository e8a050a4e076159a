"""CUDA kernels from source text to launch: NVRTC, a disk cache, loading into CuPy's device.

source.py joins a kernel with its headers, compiler.py calls NVRTC, cache.py keeps the binaries on disk, and
module.py loads them into the current device. Nothing here imports CuPy before a device is asked for.
"""

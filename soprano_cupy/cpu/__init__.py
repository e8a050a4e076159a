"""The optimised CPU engine: C kernels behind Cython."""

"""The readable reference: the model in array code that runs alike on NumPy and CuPy.

It stays for good: as the oracle of the tests (in float64), as the fallback on a GPU whose kernels cannot
run, and as the definition of what the optimised engines compute.
"""

// The layers of benchmarks/exchange.py, for the emulated machine.
#include "emulation/persistent_device.cuh"

#include "experiments/layers.cu"

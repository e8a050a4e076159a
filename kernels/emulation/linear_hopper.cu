// linear_hopper.cu for the host: its hardware is emulation/hopper.cuh.
#include "hopper.cuh"

#include "../linear_hopper.cu"

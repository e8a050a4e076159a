// The persistent decode kernel, for the emulated machine.
#include "emulation/persistent_device.cuh"

#include "decode_persistent.cu"

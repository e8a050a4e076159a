// The persistent decode kernel, for the emulated machine.
#include "emulation/persistent_device.cuh"

#include "decode_persistent.cu"

// What the planner must count likewise.
extern "C" unsigned persistent_shared_bytes() { return PERSISTENT_SHARED_BYTES; }
extern "C" int persistent_words() { return ALL_WORDS_OF_LAUNCH; }
extern "C" unsigned persistent_params_bytes() { return sizeof(PersistentParams); }

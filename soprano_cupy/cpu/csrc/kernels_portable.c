/* The kernels for the baseline of each architecture: SSE2 on x86-64, NEON on aarch64, plain C elsewhere. */
#include <math.h>

#include "kernels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define VEC_FLOATS 4
#include "kernels.inc.h"

const Kernels kernels_portable = {
    .name = "portable",
    .enter = enter_nothing,
    .leave = enter_nothing,
    .prepare = {prepare_floats, prepare_floats, prepare_words},
    .multiply = {multiply_float32, multiply_bfloat16, multiply_int8},
    COMMON_KERNELS,
};

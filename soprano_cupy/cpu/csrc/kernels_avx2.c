/* The kernels for AVX2 with FMA: x86-64 since 2013 (Haswell, Zen). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "kernels.h"

#include "target.h"
TARGET_BEGIN("avx2,fma")

#define VEC_FLOATS 8
#include "kernels.inc.h"

const Kernels kernels_avx2 = {
    .name = "avx2",
    .enter = enter_nothing,
    .leave = enter_nothing,
    .prepare = {prepare_floats, prepare_floats, prepare_words},
    .multiply = {multiply_float32, multiply_bfloat16, multiply_int8},
    COMMON_KERNELS,
};

TARGET_END
#endif

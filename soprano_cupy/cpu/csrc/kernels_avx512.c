/* The kernels for AVX-512 (F, BW, DQ, VL), and the tables that replace its integer and bfloat16 products: VNNI
 * (Cascade Lake, Ice Lake, Zen 4 and later) and AMX (Sapphire Rapids and later). */
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "kernels.h"
#include "products_amx.h"
#include "products_vnni.h"

#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#define VEC_FLOATS 16
#include "kernels.inc.h"

/* Row r of an int8 operand as the high and low bytes of its whole numbers, for byte dot products. */
static void prepare_bytes(const float *row, int inputs, Operand *x, int r) {
    float magnitude = row_magnitude(row, inputs);
    float inverse = row_inverse(magnitude);
    x->scales[r] = magnitude / INT15_LIMIT;
    int8_t *high = operand_high(x, r), *low = high + operand_low_offset(x);
    for (int t = 0; t < x->tiles; t++) {
        int32_t whole[INT8_GROUP];
        __m512i sum = _mm512_setzero_si512();
        round_group(row + t * INT8_GROUP, inputs - t * INT8_GROUP, inverse, whole);
        for (int i = 0; i < INT8_GROUP; i += 16) {
            __m512i w = _mm512_loadu_si512(whole + i);
            _mm_storeu_si128((__m128i *)(high + t * INT8_GROUP + i), _mm512_cvtepi32_epi8(_mm512_srai_epi32(w, 7)));
            __m512i rest = _mm512_and_si512(w, _mm512_set1_epi32(127));
            _mm_storeu_si128((__m128i *)(low + t * INT8_GROUP + i), _mm512_cvtepi32_epi8(rest));
            sum = _mm512_add_epi32(sum, w);
        }
        x->sums[(size_t)r * x->tiles + t] = _mm512_reduce_add_epi32(_mm512_slli_epi32(sum, 7));
    }
}

/* Row r of a bfloat16 operand. */
static void prepare_bits(const float *row, int inputs, Operand *x, int r) {
    uint16_t *target = x->bits + (size_t)r * x->stride;
    int i = 0;
    for (; i + VEC_FLOATS <= inputs; i += VEC_FLOATS) v_narrow(target + i, v_load(row + i));
    float rest[VEC_FLOATS] = {0};
    for (; i < x->stride; i += VEC_FLOATS) {
        int count = inputs - i > 0 ? inputs - i : 0;
        memset(rest, 0, sizeof rest);
        memcpy(rest, row + i, count * sizeof *row);
        v_narrow(target + i, v_load(rest));
    }
}

const Kernels kernels_avx512 = {
    .name = "avx512",
    .enter = enter_nothing,
    .leave = enter_nothing,
    .prepare = {prepare_floats, prepare_floats, prepare_words},
    .multiply = {multiply_float32, multiply_bfloat16, multiply_int8},
    COMMON_KERNELS,
};

const Kernels kernels_vnni = {
    .name = "vnni",
    .enter = enter_nothing,
    .leave = enter_nothing,
    .prepare = {prepare_floats, prepare_floats, prepare_bytes},
    .multiply = {multiply_float32, multiply_bfloat16, multiply_int8_vnni},
    COMMON_KERNELS,
};

#if AMX_COMPILER
const Kernels kernels_amx = {
    .name = "amx",
    .enter = enter_nothing,
    .leave = amx_release,
    .prepare = {prepare_floats, prepare_bits, prepare_bytes},
    .multiply = {multiply_float32, multiply_bfloat16_amx, multiply_int8_amx},
    COMMON_KERNELS,
};
#endif

TARGET_END
#endif

/* Vectors of VEC_FLOATS floats in the compiler's own vector extension, and the functions of the model on them.
 *
 * The including file defines VEC_FLOATS (4, 8 or 16) and selects the instruction set; everything here is inlined
 * into it, so one text serves SSE2, NEON, AVX2 and AVX-512. Polynomials are minimax fits (Remez) made for this
 * file; the error bounds in the comments are checked by tests/test_cpu_math.py. */
#ifndef SOPRANO_SIMD_H
#define SOPRANO_SIMD_H

#include <stdint.h>
#include <string.h>

#include "target.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* every vector function is inlined: no ABI is crossed */
#endif

#define INLINE static inline __attribute__((always_inline, unused))

typedef float vf __attribute__((vector_size(4 * VEC_FLOATS)));
typedef int32_t vi __attribute__((vector_size(4 * VEC_FLOATS)));
typedef uint32_t vu __attribute__((vector_size(4 * VEC_FLOATS)));
typedef int16_t vs __attribute__((vector_size(4 * VEC_FLOATS)));
typedef uint16_t vh __attribute__((vector_size(2 * VEC_FLOATS)));

INLINE vf v_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void v_store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf v_set(float x) { return x - (vf){0}; }

INLINE vi v_set_int(int32_t x) { return x - (vi){0}; }

/* mask ? a : b, for a mask of all-zeros and all-ones lanes as comparisons give. */
INLINE vf v_select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE vf v_abs(vf x) { return (vf)((vi)x & v_set_int(0x7fffffff)); }

INLINE vf v_max(vf a, vf b) { return v_select(a > b, a, b); }

/* bfloat16 is the upper half of float32. */
INLINE vf v_widen(const uint16_t *bits) {
    vh halves;
    memcpy(&halves, bits, sizeof halves);
    return (vf)(__builtin_convertvector(halves, vu) << 16);
}

/* The lower and the upper bfloat16 of each 32-bit word. */
INLINE vf v_low_half(vu words) { return (vf)(words << 16); }

INLINE vf v_high_half(vu words) { return (vf)(words & 0xffff0000u); }

/* Round to nearest even; finite values and infinities only. */
INLINE vu v_bfloat16(vf x) {
    vu word = (vu)x;
    return (word + 0x7fff + ((word >> 16) & 1)) >> 16;
}

INLINE void v_narrow(uint16_t *bits, vf x) {
    vh halves = __builtin_convertvector(v_bfloat16(x), vh);
    memcpy(bits, &halves, sizeof halves);
}

/* Sum and maximum of the lanes, halving: the order is fixed. */
INLINE float v_sum(vf x) {
    float lanes[VEC_FLOATS];
    v_store(lanes, x);
    for (int width = VEC_FLOATS / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

INLINE float v_largest(vf x) {
    float lanes[VEC_FLOATS];
    v_store(lanes, x);
    for (int width = VEC_FLOATS / 2; width; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    }
    return lanes[0];
}

/* The nearest whole number, for |x| < 2^22; adding the magic constant pushes the fraction out of the
 * significand (so -ffast-math is not for these files). */
INLINE vf v_round(vf x) {
    const vf magic = v_set(12582912.0f);
    return (x + magic) - magic;
}

/* 2^n for whole n in [-252, 252] times x: two factors, so that neither leaves the normal range. */
INLINE vf v_scale(vf x, vf n) {
    vi exponent = __builtin_convertvector(n, vi);
    vi half = exponent >> 1;
    return x * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
}

/* exp(r) for |r| <= ln(2)/2, relative error 1e-8 before rounding. */
INLINE vf v_exp_reduced(vf r) {
    vf p = v_set(1.39421665e-3f);
    p = p * r + 8.36377614e-3f;
    p = p * r + 4.16663634e-2f;
    p = p * r + 1.66665734e-1f;
    p = p * r + 0.5f;
    return p * (r * r) + r + 1.0f;
}

#define LOG2_E 1.44269504f
#define LN2_HIGH 0.693145752f /* 15 bits: n * LN2_HIGH is exact for |n| < 512 */
#define LN2_LOW 1.42860677e-6f

/* exp(x) within 2 units in the last place, 0 below -104 and infinity above 89; NaN stays NaN. */
INLINE vf v_exp(vf x) {
    x = v_select(x > 89.0f, v_set(89.0f), x);
    x = v_select(x < -104.0f, v_set(-104.0f), x);
    vf n = v_round(x * LOG2_E);
    vf r = (x - n * LN2_HIGH) - n * LN2_LOW;
    return v_scale(v_exp_reduced(r), n);
}

/* x / (1 + exp(-x)). */
INLINE vf v_silu(vf x) { return x / (1.0f + v_exp(-x)); }

/* a Q(a) for 0 <= a <= 15, where Q(a) = erfc(a / sqrt 2) / 2 is the upper tail of the normal distribution:
 * exp(-a^2 / 2) times a polynomial in (a - 4) / (a + 4) that carries Mills' ratio. a^2 is taken apart into an
 * exact head (of 12 bits of a) and a small rest, as its rounding error would be magnified. */
INLINE vf v_times_tail(vf a) {
    vf head = (vf)((vi)a & v_set_int((int32_t)0xfffff000));
    vf square = head * head * -0.5f;
    vf rest = (a - head) * (a + head) * -0.5f;
    vf n = v_round(square * LOG2_E);
    vf r = ((square - n * LN2_HIGH) - n * LN2_LOW) + rest;
    vf t = (a - 4.0f) / (a + 4.0f);
    vf p = v_set(-4.83958190e-5f);
    p = p * t - 6.01169774e-5f;
    p = p * t + 4.32620714e-4f;
    p = p * t - 1.73874690e-5f;
    p = p * t - 3.35136287e-3f;
    p = p * t + 1.00095304e-2f;
    p = p * t - 1.32786525e-2f;
    p = p * t - 1.49213506e-3f;
    p = p * t + 4.71134974e-2f;
    p = p * t - 1.18811746e-1f;
    p = p * t + 3.58760437e-1f;
    return v_scale(v_exp_reduced(r) * p * a / (a * 0.7f + 1.0f), n);
}

/* The exact Gaussian error linear unit x * Phi(x) = relu(x) - |x| * Q(|x|), without tanh or a table. */
INLINE vf v_gelu(vf x) {
    vf a = v_abs(x);
    a = v_select(a > 15.0f, v_set(15.0f), a);
    return v_select(x < 0.0f, v_set(0.0f), x) - v_times_tail(a);
}

#endif

/* bfloat16, the upper half of a float32, kept as its 16 bits. */
#ifndef SOPRANO_BFLOAT16_H
#define SOPRANO_BFLOAT16_H

#include <stdint.h>
#include <string.h>

static inline float bfloat16_value(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* Rounded to nearest even; NaN stays NaN. */
static inline uint16_t bfloat16_nearest(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if ((word & 0x7fffffff) > 0x7f800000) return (uint16_t)(word >> 16 | 0x40);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

/* The smallest bfloat16 that is not below a value >= 0. */
static inline uint16_t bfloat16_above(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return (uint16_t)((word + 0xffff) >> 16);
}

#endif

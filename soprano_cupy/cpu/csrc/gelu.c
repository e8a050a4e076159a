#include "gelu.h"

#include <math.h>

#define VEC_FLOATS 4
#include "simd.h"

void soprano_gelu_f32(const float *x, float *out, size_t count) {
    size_t i = 0;
    for (; i + VEC_FLOATS <= count; i += VEC_FLOATS) v_store(out + i, v_gelu(v_load(x + i)));
    if (i < count) {
        float last[VEC_FLOATS] = {0};
        memcpy(last, x + i, (count - i) * sizeof *x);
        v_store(last, v_gelu(v_load(last)));
        memcpy(out + i, last, (count - i) * sizeof *x);
    }
}

void soprano_gelu_f64(const double *x, double *out, size_t count) {
    for (size_t i = 0; i < count; i++) {
        double value = x[i];
        out[i] = isinf(value) ? (value > 0 ? value : 0.0) : 0.5 * value * erfc(value * -0.70710678118654752440);
    }
}

/* The exact Gaussian error linear unit over an array; `out` may be `x`. */
#ifndef SOPRANO_GELU_H
#define SOPRANO_GELU_H

#include <stddef.h>

void soprano_gelu_f32(const float *x, float *out, size_t count);
void soprano_gelu_f64(const double *x, double *out, size_t count);

#endif

#include "fft.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static const double TWO_PI = 6.28318530717958647692;

/* The next factor of a length: 4 while it divides, then the smallest prime. */
static int next_radix(int length) {
    if (length % 4 == 0) return 4;
    for (int radix = 2; radix * radix <= length; radix++) {
        if (length % radix == 0) return radix;
    }
    return length;
}

/* exp(2 pi i numerator / denominator), reduced first so that large products stay exact. */
static void unit_root(long numerator, long denominator, float *target) {
    double angle = TWO_PI * (double)(numerator % denominator) / (double)denominator;
    target[0] = (float)cos(angle);
    target[1] = (float)sin(angle);
}

/* Lay out all tables from `memory` on, or only count the floats when it is NULL. */
static size_t lay_out(FftPlan *plan, float *memory) {
    size_t used = 2 * (size_t)plan->half;
    plan->split = memory;
    for (int i = 0; i < plan->passes; i++) {
        FftPass *pass = &plan->pass[i];
        if (memory) {
            pass->twiddles = memory + used;
            pass->roots = pass->twiddles + 2 * (size_t)pass->groups * pass->radix;
        }
        used += 2 * (size_t)pass->groups * pass->radix + 2 * (size_t)pass->radix;
    }
    return used;
}

static void fill_tables(FftPlan *plan) {
    for (int k = 0; k < plan->half; k++) unit_root(k, plan->length, plan->split + 2 * k);
    for (int i = 0; i < plan->passes; i++) {
        FftPass *pass = &plan->pass[i];
        long size = (long)pass->groups * pass->radix;
        for (long p = 0; p < pass->groups; p++) {
            for (long k = 0; k < pass->radix; k++) unit_root(p * k, size, pass->twiddles + 2 * (p * pass->radix + k));
        }
        for (int k = 0; k < pass->radix; k++) unit_root(k, pass->radix, pass->roots + 2 * k);
    }
}

int fft_plan(FftPlan *plan, int length) {
    memset(plan, 0, sizeof *plan);
    plan->length = length;
    plan->half = length / 2;
    for (int rest = plan->half; rest > 1; plan->passes++) {
        FftPass *pass = &plan->pass[plan->passes];
        pass->radix = next_radix(rest);
        rest /= pass->radix;
        pass->groups = rest;
    }
    plan->memory = malloc(lay_out(plan, NULL) * sizeof(float));
    if (!plan->memory) return -1;
    lay_out(plan, plan->memory);
    fill_tables(plan);
    return 0;
}

void fft_free(FftPlan *plan) {
    free(plan->memory);
    plan->memory = NULL;
}

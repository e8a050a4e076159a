/* From the decoder's head to windowed frames: VEC_FLOATS frames at a time, one in each lane, so that every step of
 * the transform is a whole-vector operation whatever its stride. */

/* sine and cosine of `angles`: reduced in double, polynomials in float; within 2 units in the last place of 1. */
static void sine_cosine(const float *restrict angles, int count, float *restrict sines, float *restrict cosines) {
    const double two_over_pi = 0.63661977236758134308, half_pi = 1.57079632679489655800, rest = 6.123233995736766e-17;
    const double magic = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to a whole number */
    float largest = 0;
    for (int i = 0; i < count; i++) {
        double angle = angles[i], turns = (angle * two_over_pi + magic) - magic;
        float r = (float)((angle - turns * half_pi) - turns * rest), square = r * r;
        int32_t quadrant = (int32_t)turns;
        float sine = r + r * square * (-0.166666645f + square * (8.33272539e-3f - square * 1.95829534e-4f));
        float cosine = 1.0f - 0.5f * square +
                       square * square * (4.16666645e-2f + square * (-1.38882792e-3f + square * 2.45428800e-5f));
        float s = quadrant & 1 ? cosine : sine, c = quadrant & 1 ? sine : cosine;
        sines[i] = quadrant & 2 ? -s : s;
        cosines[i] = (quadrant + 1) & 2 ? -c : c;
    }
    for (int i = 0; i < count; i++) largest = fabsf(angles[i]) > largest ? fabsf(angles[i]) : largest;
    if (largest < 1e6f) return;
    for (int i = 0; i < count; i++) { /* far out, the C library's exact reduction */
        if (fabsf(angles[i]) < 1e6f) continue;
        sines[i] = (float)sin(angles[i]);
        cosines[i] = (float)cos(angles[i]);
    }
}

/* One frame's complex bins from log-magnitudes and phases; the magnitude is clipped, the outer bins are zero. */
static void polar_bins(const float *log_magnitudes, const float *phases, int bins, float *real, float *imaginary) {
    sine_cosine(phases, bins, imaginary, real);
    for (int i = 0; i < bins; i += VEC_FLOATS) {
        int count = bins - i < VEC_FLOATS ? bins - i : VEC_FLOATS;
        float values[VEC_FLOATS] = {0};
        memcpy(values, log_magnitudes + i, count * sizeof *values);
        vf magnitude = v_exp(v_load(values));
        v_store(values, v_select(magnitude > MAX_MAGNITUDE, v_set(MAX_MAGNITUDE), magnitude));
        for (int j = 0; j < count; j++) {
            real[i + j] *= values[j];
            imaginary[i + j] *= values[j];
        }
    }
    real[0] = imaginary[0] = real[bins - 1] = imaginary[bins - 1] = 0;
}

typedef struct Complex {
    vf re, im;
} Complex;

INLINE Complex load_complex(const float *p) { return (Complex){v_load(p), v_load(p + VEC_FLOATS)}; }

INLINE void store_complex(float *p, Complex z) {
    v_store(p, z.re);
    v_store(p + VEC_FLOATS, z.im);
}

INLINE Complex times(Complex z, const float *w) {
    return (Complex){z.re * w[0] - z.im * w[1], z.re * w[1] + z.im * w[0]};
}

INLINE Complex plus(Complex a, Complex b) { return (Complex){a.re + b.re, a.im + b.im}; }

INLINE Complex minus(Complex a, Complex b) { return (Complex){a.re - b.re, a.im - b.im}; }

#define COMPLEX (2 * VEC_FLOATS) /* floats of one complex number in all lanes */

/* y[q + s (4 p + k)] = w^(p k) sum over j of i^(j k) x[q + s (p + groups j)]. */
static void pass_radix4(const FftPass *pass, int s, const float *x, float *y) {
    size_t quarter = (size_t)s * pass->groups * COMPLEX, step = (size_t)s * COMPLEX;
    for (int p = 0; p < pass->groups; p++) {
        const float *w = pass->twiddles + 8 * p;
        for (int q = 0; q < s; q++) {
            const float *from = x + (size_t)(q + s * p) * COMPLEX;
            float *to = y + (size_t)(q + 4 * s * p) * COMPLEX;
            Complex a = load_complex(from), b = load_complex(from + quarter);
            Complex c = load_complex(from + 2 * quarter), d = load_complex(from + 3 * quarter);
            Complex sum = plus(a, c), difference = minus(a, c), other = plus(b, d), turned = minus(b, d);
            turned = (Complex){-turned.im, turned.re}; /* times i */
            store_complex(to, plus(sum, other));
            store_complex(to + step, times(plus(difference, turned), w + 2));
            store_complex(to + 2 * step, times(minus(sum, other), w + 4));
            store_complex(to + 3 * step, times(minus(difference, turned), w + 6));
        }
    }
}

/* The same for any radix, by its definition. */
static void pass_any_radix(const FftPass *pass, int s, const float *x, float *y) {
    int radix = pass->radix;
    for (int p = 0; p < pass->groups; p++) {
        for (int k = 0; k < radix; k++) {
            for (int q = 0; q < s; q++) {
                Complex sum = load_complex(x + (size_t)(q + s * p) * COMPLEX);
                for (int j = 1; j < radix; j++) {
                    Complex a = load_complex(x + (size_t)(q + s * (p + pass->groups * j)) * COMPLEX);
                    sum = plus(sum, times(a, pass->roots + 2 * ((long)j * k % radix)));
                }
                sum = times(sum, pass->twiddles + 2 * ((size_t)p * radix + k));
                store_complex(y + (size_t)(q + s * (radix * p + k)) * COMPLEX, sum);
            }
        }
    }
}

/* Pack the bins of a real signal for a complex transform of half its length: even samples become real parts, odd
 * ones imaginary parts. z: (half + 1) complex numbers in all lanes; the transform's factor 1 / length is left out. */
static void pack_half(const FftPlan *plan, float *z) {
    for (int k = 0; 2 * k <= plan->half; k++) {
        int mirror = plan->half - k;
        Complex a = load_complex(z + (size_t)k * COMPLEX), b = load_complex(z + (size_t)mirror * COMPLEX);
        Complex even = {a.re + b.re, a.im - b.im}, odd = {a.re - b.re, a.im + b.im};
        Complex turned = times(odd, plan->split + 2 * k);
        store_complex(z + (size_t)k * COMPLEX, (Complex){even.re - turned.im, even.im + turned.re});
        if (k == 0 || mirror == k) continue;
        store_complex(z + (size_t)mirror * COMPLEX, (Complex){even.re + turned.im, turned.re - even.im});
    }
}

/* Windowed frames of up to VEC_FLOATS rows of the head's output.
 *
 * head: (count, stride), log-magnitudes then phases. window: (length,), the transform's factor included. frames:
 * (count, length). scratch: 4 (half + 1) VEC_FLOATS floats + 2 bins. */
static void synthesise_frames(const FftPlan *plan, const float *head, ptrdiff_t stride, int count, const float *window,
                              float *frames, float *scratch) {
    int half = plan->half, bins = half + 1, s = 1;
    float *x = scratch, *y = x + (size_t)bins * COMPLEX, *real = y + (size_t)bins * COMPLEX, *imaginary = real + bins;
    if (count < VEC_FLOATS) memset(x, 0, (size_t)bins * COMPLEX * sizeof *x);
    for (int lane = 0; lane < count; lane++) {
        polar_bins(head + lane * stride, head + lane * stride + bins, bins, real, imaginary);
        for (int k = 0; k < bins; k++) {
            x[(size_t)k * COMPLEX + lane] = real[k];
            x[(size_t)k * COMPLEX + VEC_FLOATS + lane] = imaginary[k];
        }
    }
    pack_half(plan, x);
    for (int i = 0; i < plan->passes; i++) {
        const FftPass *pass = &plan->pass[i];
        (pass->radix == 4 ? pass_radix4 : pass_any_radix)(pass, s, x, y);
        s *= pass->radix;
        float *swap = x;
        x = y;
        y = swap;
    }
    for (int lane = 0; lane < count; lane++) {
        float *frame = frames + (size_t)lane * plan->length;
        for (int k = 0; k < half; k++) {
            frame[2 * k] = x[(size_t)k * COMPLEX + lane] * window[2 * k];
            frame[2 * k + 1] = x[(size_t)k * COMPLEX + VEC_FLOATS + lane] * window[2 * k + 1];
        }
    }
}

static size_t synthesis_scratch(const FftPlan *plan) { return (size_t)(plan->half + 1) * (2 * COMPLEX + 2); }

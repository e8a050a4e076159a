// The inverse Fourier transform of POINTS complex numbers in shared memory, by POINTS / 8 threads that hold eight of them:
// passes of radix 8 and a last one of what is left, each of which leaves its results in order (Stockham, 1966).
//
// After passes whose radices multiply to DONE, butterfly j of the next pass of radix R takes the points j + r POINTS / R,
// multiplies them by exp(2 pi i r k / (DONE R)) with k = j mod DONE, transforms them and leaves them at
// (j - k) R + k + r DONE.
#pragma once

#include "device.cuh"

constexpr int POINTS = N_FFT / 2;
constexpr int HELD = 8;                     // points of a thread
constexpr int BUTTERFLIES = POINTS / HELD;  // threads of a frame
constexpr int FRAME_BYTES = (POINTS + POINTS / 8) * 8;

// A complex number after every eight keeps the strides of the first passes off each other's banks.
DEVICE unsigned point_offset(int point) { return static_cast<unsigned>(point + point / 8) * 8; }
DEVICE float2 load_point(unsigned frame_smem, int point) {
    return load_shared<float2>(frame_smem + point_offset(point));
}
DEVICE void store_point(unsigned frame_smem, int point, float2 value) {
    store_shared<float2>(frame_smem + point_offset(point), value);
}

DEVICE float2 add2(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
DEVICE float2 subtract2(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
DEVICE float2 times_i(float2 a) { return make_float2(-a.y, a.x); }
DEVICE float2 conjugate(float2 a) { return make_float2(a.x, -a.y); }
DEVICE float2 multiply2(float2 a, float2 b) {
    return make_float2(fused_multiply_add(a.x, b.x, -a.y * b.y), fused_multiply_add(a.x, b.y, a.y * b.x));
}

// exp(2 pi i index / N_FFT), index below N_FFT / 2. Read anew for each frame: there are not the registers to keep them.
DEVICE float2 root(const float* roots, int index) { return load_global<float2>(roots + 2 * opaque(index)); }

// The transforms of 2, 4 and 8 points from v[0], v[STEP], ...; results in order.
DEVICE void transform2(float2* v) {
    const float2 a = v[0];
    v[0] = add2(a, v[1]);
    v[1] = subtract2(a, v[1]);
}

DEVICE void transform4(float2* v) {
    const float2 even = add2(v[0], v[2]), odd = subtract2(v[0], v[2]);
    const float2 sum = add2(v[1], v[3]), turned = times_i(subtract2(v[1], v[3]));
    v[0] = add2(even, sum);
    v[1] = add2(odd, turned);
    v[2] = subtract2(even, sum);
    v[3] = subtract2(odd, turned);
}

DEVICE void transform8(float2* v) {
    constexpr float HALF_SQRT2 = 0.70710678f;
    float2 even[4] = {add2(v[0], v[4]), add2(v[1], v[5]), add2(v[2], v[6]), add2(v[3], v[7])};
    float2 odd[4] = {subtract2(v[0], v[4]), subtract2(v[1], v[5]), subtract2(v[2], v[6]), subtract2(v[3], v[7])};
    // odd[r] times exp(2 pi i r / 8)
    odd[1] = make_float2((odd[1].x - odd[1].y) * HALF_SQRT2, (odd[1].x + odd[1].y) * HALF_SQRT2);
    odd[2] = times_i(odd[2]);
    odd[3] = make_float2((odd[3].x + odd[3].y) * -HALF_SQRT2, (odd[3].x - odd[3].y) * HALF_SQRT2);
    transform4(even);
    transform4(odd);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = even[i];
        v[2 * i + 1] = odd[i];
    }
}

template <int RADIX> DEVICE void transform(float2* v) {
    if (RADIX == 2) transform2(v);
    if (RADIX == 4) transform4(v);
    if (RADIX == 8) transform8(v);
}

// v[r] *= w^r
template <int RADIX> DEVICE void twiddle(float2* v, float2 w) {
    v[1] = multiply2(v[1], w);
    if (RADIX == 2) return;
    const float2 w2 = multiply2(w, w), w3 = multiply2(w2, w);
    v[2] = multiply2(v[2], w2);
    v[3] = multiply2(v[3], w3);
    if (RADIX == 4) return;
    const float2 w4 = multiply2(w2, w2);
    v[4] = multiply2(v[4], w4);
    v[5] = multiply2(v[5], multiply2(w4, w));
    v[6] = multiply2(v[6], multiply2(w4, w2));
    v[7] = multiply2(v[7], multiply2(w4, w3));
}

// One pass by thread `thread` of a frame's; `works` is false in threads without a frame.
template <int RADIX, int DONE> DEVICE void fft_pass(unsigned frame_smem, int thread, const float* roots, bool works) {
    constexpr bool LAST = DONE * RADIX == POINTS;
    float2 v[HELD];
    if (works) {
#pragma unroll
        for (int i = 0; i < HELD / RADIX; ++i) {
#pragma unroll
            for (int r = 0; r < RADIX; ++r) {
                v[i * RADIX + r] = load_point(frame_smem, thread + i * BUTTERFLIES + r * (POINTS / RADIX));
            }
        }
    }
    if (!LAST) sync_block();  // everybody has read; the last pass leaves each point where its thread took one
    if (works) {
#pragma unroll
        for (int i = 0; i < HELD / RADIX; ++i) {
            const int butterfly = thread + i * BUTTERFLIES, k = butterfly % DONE;
            if (DONE > 1) twiddle<RADIX>(v + i * RADIX, root(roots, k * (N_FFT / (DONE * RADIX))));
            transform<RADIX>(v + i * RADIX);
#pragma unroll
            for (int r = 0; r < RADIX; ++r) {
                store_point(frame_smem, (butterfly - k) * RADIX + k + r * DONE, v[i * RADIX + r]);
            }
        }
    }
    sync_block();  // this pass is written
}

// All passes from DONE on.
template <int DONE> DEVICE void inverse_fft(unsigned frame_smem, int thread, const float* roots, bool works) {
    constexpr int LEFT = POINTS / DONE, RADIX = LEFT < 8 ? LEFT : 8;
    fft_pass<RADIX, DONE>(frame_smem, thread, roots, works);
    if constexpr (LEFT > RADIX) inverse_fft<DONE * RADIX>(frame_smem, thread, roots, works);
}

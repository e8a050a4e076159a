// Random numbers without a state: Philox4x32-10 (Salmon et al., 2011), as soprano_cupy/sampling.py computes it.
#pragma once

#include "device.cuh"

// The upper 24 bits of the first word for key `seed` and counter (position, stream): a uniform number times 2^24.
DEVICE unsigned random_24_bits(unsigned long long seed, unsigned long long stream, unsigned position) {
    unsigned c0 = position, c1 = 0u, c2 = static_cast<unsigned>(stream), c3 = static_cast<unsigned>(stream >> 32);
    unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned first = multiply_high(0xd2511f53u, c0), second = multiply_high(0xcd9e8d57u, c2);
        const unsigned low = 0xd2511f53u * c0, high = 0xcd9e8d57u * c2;
        c0 = second ^ c1 ^ k0;
        c2 = first ^ c3 ^ k1;
        c1 = high;
        c3 = low;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c0 >> 8;
}

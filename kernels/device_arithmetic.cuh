// Part of device.cuh: arithmetic, the bits of numbers, and values whose origin the compiler does not see.
#pragma once

DEVICE float infinity() { return __int_as_float(0x7f800000); }

// 2^x in one instruction, relative error below 2^-22; 0 at -inf.
DEVICE float exp2_fast(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// log2(x) in one instruction; -inf at 0.
DEVICE float log2_fast(float x) {
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 1 / x, relative error below 2^-22; 0 at infinity.
DEVICE float reciprocal_fast(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 1 / sqrt(x), relative error below 2^-22.
DEVICE float inverse_sqrt(float x) { return rsqrtf(x); }

// The error function, to 2 units in the last place.
DEVICE float error_function(float x) { return erff(x); }

// The nearest whole number; ties to the even one.
DEVICE float round_to_even(float x) { return rintf(x); }

DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float bits_to_float(int bits) { return __int_as_float(bits); }
DEVICE unsigned float_to_bits(float value) { return __float_as_uint(value); }
DEVICE double bits_to_double(unsigned long long bits) { return __longlong_as_double(static_cast<long long>(bits)); }
DEVICE unsigned multiply_high(unsigned a, unsigned b) { return __umulhi(a, b); }    // the upper word of a product
DEVICE int lowest_bit(unsigned mask) { return __ffs(static_cast<int>(mask)) - 1; }  // of a mask other than 0

// The value itself, of which the compiler does not see where it came from: what is computed from it is not computed
// ahead and kept in registers.
DEVICE unsigned opaque(unsigned value) {
    asm volatile("" : "+r"(value));
    return value;
}
// The same of an address in global memory.
template <typename T> DEVICE T* opaque_global(T* pointer) {
    unsigned long long address = __cvta_generic_to_global(pointer);
    asm volatile("" : "+l"(address));
    return static_cast<T*>(__cvta_global_to_generic(address));
}

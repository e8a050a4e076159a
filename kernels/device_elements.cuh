// Part of device.cuh: element formats.
// Two half-precision numbers travel in one register, the lower index in the lower half.
#pragma once

#if defined(DTYPE_FP32)

typedef float Element;
DEVICE float to_float(Element value) { return value; }
DEVICE Element from_float(float value) { return value; }

#else

typedef unsigned short Element;  // the bits of one fp16 or bf16 number

#if defined(DTYPE_FP16)

DEVICE float to_float(Element value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
}

DEVICE Element from_float(float value) {
    Element result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
}

#else  // DTYPE_BF16: the upper half of an fp32 number

DEVICE float to_float(Element value) { return __int_as_float(static_cast<int>(value) << 16); }

DEVICE Element from_float(float value) {
#if __CUDA_ARCH__ >= 800
    Element result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
#else
    // Round to nearest, ties to even, on the bits; a NaN keeps its class whatever its payload.
    const unsigned bits = static_cast<unsigned>(__float_as_int(value));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<Element>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

#endif

// (low, high) rounded to nearest even into one register.
DEVICE unsigned pack2(float low, float high) {
#if __CUDA_ARCH__ >= 800
    unsigned result;
#if defined(DTYPE_FP16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#endif
    return result;
#else
    return static_cast<unsigned>(from_float(low)) | (static_cast<unsigned>(from_float(high)) << 16);
#endif
}

DEVICE float unpack_low(unsigned pair) { return to_float(static_cast<Element>(pair & 0xffffu)); }
DEVICE float unpack_high(unsigned pair) { return to_float(static_cast<Element>(pair >> 16)); }

#endif

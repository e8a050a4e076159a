// fp16 and bf16 on the host: the bits to float and back, rounding to nearest even as the hardware does.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulation {

inline std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float bf16_to_float(std::uint16_t bits) { return float_of_bits(std::uint32_t(bits) << 16); }

inline std::uint16_t float_to_bf16(float value) {
    const std::uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float fp16_to_float(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16;
    const std::uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Reading the shifted bits as a float scales by 2^-112, subnormals included; the product puts that right.
    const float value = float_of_bits(magnitude << 13) * 0x1p112f;
    return float_of_bits(sign | float_bits(value));
}

inline std::uint16_t float_to_fp16(float value) {
    const std::uint32_t bits = float_bits(value);
    const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000u);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return std::uint16_t(sign | 0x7c00u);  // 65,520 and more round to infinity
    if (magnitude < 0x38800000u) {
        // Below 2^-14: the half has steps of 2^-24, so adding 0.5 (steps of 2^-24 in fp32) rounds in the right place.
        const std::uint32_t rounded = float_bits(float_of_bits(magnitude) + 0.5f);
        return std::uint16_t(sign | (rounded - 0x3f000000u));
    }
    const std::uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
    return std::uint16_t(sign | (rounded >> 13));
}

}  // namespace emulation

// device.cuh for the host: the same names in C++17, so that the kernels' own source runs on a machine without a GPU.
//
// Every thread of a block is a fiber (machine.cpp); the collectives stop the fiber until its partners have arrived.
// Force-included before a kernel (g++ -include emulation/device.cuh), it takes the place of the hardware's header.
// __CUDA_ARCH__, DTYPE_* and the tile constants come from the command line as they do for NVRTC.
#ifndef SOPRANO_DEVICE_CUH
#define SOPRANO_DEVICE_CUH

#include <cmath>

#include "formats.hpp"
#include "machine.hpp"

#define DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

#if defined(DTYPE_FP16)
#define HAS_MMA (__CUDA_ARCH__ >= 750)
#elif defined(DTYPE_BF16)
#define HAS_MMA (__CUDA_ARCH__ >= 800)
#else
#define HAS_MMA 0
#endif

using emulation::blockDim;
using emulation::blockIdx;
using emulation::gridDim;
using emulation::threadIdx;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int WARP_LANES = 32;

#if defined(DTYPE_FP16)
constexpr float NORM_SCALE = 0.0625f;
#else
constexpr float NORM_SCALE = 1.0f;
#endif
inline int lane_index() { return int(threadIdx.x % WARP_LANES); }
inline int warp_index() { return int(threadIdx.x / WARP_LANES); }

// ---- Element formats
#if defined(DTYPE_FP32)
typedef float Element;
inline float to_float(Element value) { return value; }
inline Element from_float(float value) { return value; }
#else
typedef unsigned short Element;
#if defined(DTYPE_FP16)
inline float to_float(Element value) { return emulation::fp16_to_float(value); }
inline Element from_float(float value) { return emulation::float_to_fp16(value); }
#else
inline float to_float(Element value) { return emulation::bf16_to_float(value); }
inline Element from_float(float value) { return emulation::float_to_bf16(value); }
#endif
inline unsigned pack2(float low, float high) { return from_float(low) | unsigned(from_float(high)) << 16; }
inline float unpack_low(unsigned pair) { return to_float(Element(pair)); }
inline float unpack_high(unsigned pair) { return to_float(Element(pair >> 16)); }
#endif

// ---- Memory
inline unsigned shared_base() { return emulation::SHARED_BASE; }

template <typename T> T load_shared(unsigned address) {
    T value;
    emulation::read_shared(address, &value, sizeof(T));
    return value;
}
template <typename T> void store_shared(unsigned address, T value) {
    emulation::write_shared(address, &value, sizeof(T));
}
inline unsigned atomic_add_shared(unsigned address, unsigned value) { return emulation::add_shared(address, value); }
template <typename T> T load_global(const void* address) {
    T value;
    emulation::read_global(address, &value, sizeof(T));
    return value;
}
template <typename T> T load_global_fresh(const void* address) { return load_global<T>(address); }
template <typename T> T load_global_in_place(const void* address) { return load_global<T>(address); }
inline uint4 load_global_once(const void* address) { return load_global<uint4>(address); }
template <typename T> void store_global(void* address, T value) { emulation::write_global(address, &value, sizeof(T)); }
inline void prefetch_l2(const void* address) {
    char byte;
    emulation::read_global(address, &byte, 1);  // a hint may point anywhere; ours stay inside their buffers
}
inline void publish(void* address, unsigned long long value) { store_global(address, value); }
inline unsigned atomic_increment(unsigned* counter, unsigned limit) {
    const unsigned old = load_global<unsigned>(counter);
    store_global<unsigned>(counter, old >= limit ? 0 : old + 1);
    return old;
}
inline void fence_device() {}

#if __CUDA_ARCH__ >= 800
inline void copy_async_16(unsigned shared_address, const void* source, bool valid) {
    emulation::copy_async(shared_address, source, valid);
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int PENDING> void copy_async_wait() { emulation::copy_async_wait(PENDING); }
#else
inline void copy_async_16(unsigned shared_address, const void* source, bool valid) {
    store_shared<uint4>(shared_address, valid ? load_global<uint4>(source) : uint4{0, 0, 0, 0});
}
inline void copy_async_commit() {}
template <int PENDING> void copy_async_wait() {}
#endif

// ---- Barriers
// Launches of the emulated machine follow one another.
inline void grid_dependency_launch() {}
inline void grid_dependency_wait() {}

inline void sync_block() { emulation::sync_block(); }
inline void sync_warp() { emulation::sync_warp(); }
inline void sync_named(int id, int threads) { emulation::sync_named(id, threads); }
#if __CUDA_ARCH__ >= 900
inline unsigned cluster_rank() { return emulation::cluster_rank(); }
inline void sync_cluster() { emulation::sync_cluster(); }
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }
inline void transfer_init(unsigned barrier) { emulation::transfer_init(barrier); }
inline void transfer_expect(unsigned barrier, unsigned bytes) { emulation::transfer_expect(barrier, bytes); }
inline void transfer_store(unsigned address, unsigned barrier, unsigned rank, float4 value) {
    emulation::transfer_store(address, barrier, rank, &value);
}
inline void transfer_wait(unsigned barrier) { emulation::transfer_wait(barrier); }
inline float load_shared_of(unsigned address, unsigned rank) {
    float value;
    emulation::read_shared_of(address, rank, &value, sizeof value);
    return value;
}
inline float4 load_shared4_of(unsigned address, unsigned rank) {
    float4 value;
    emulation::read_shared_of(address, rank, &value, sizeof value);
    return value;
}
#endif

// ---- Warp exchanges
inline unsigned shuffle(unsigned value, int source_lane) { return emulation::shuffle(value, source_lane % WARP_LANES); }
inline float shuffle(float value, int source_lane) {
    return emulation::float_of_bits(shuffle(emulation::float_bits(value), source_lane));
}
inline float shuffle_xor(float value, int mask) { return shuffle(value, lane_index() ^ mask); }
inline unsigned shuffle_xor(unsigned value, int mask) { return shuffle(value, lane_index() ^ mask); }
inline bool any_lane(bool predicate) { return emulation::ballot(predicate) != 0; }
inline unsigned lanes_where(bool predicate) { return emulation::ballot(predicate); }
inline unsigned max_of_lanes(unsigned value) {
    for (int mask = 16; mask > 0; mask /= 2) {
        const unsigned other = shuffle_xor(value, mask);
        value = other > value ? other : value;
    }
    return value;
}
inline unsigned min_of_lanes(unsigned value) { return ~max_of_lanes(~value); }
inline unsigned sum_of_lanes(unsigned value) {
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// ---- Matrix fragments
#if __CUDA_ARCH__ >= 750 && !defined(DTYPE_FP32)
inline void load_matrix_x1(unsigned& r, unsigned address) { emulation::load_matrix(&r, 1, false, address); }
inline void load_matrix_x2(unsigned (&r)[2], unsigned address) { emulation::load_matrix(r, 2, false, address); }
inline void load_matrix_x4(unsigned (&r)[4], unsigned address) { emulation::load_matrix(r, 4, false, address); }
inline void load_matrix_x1_trans(unsigned& r, unsigned address) { emulation::load_matrix(&r, 1, true, address); }
inline void load_matrix_x2_trans(unsigned (&r)[2], unsigned address) { emulation::load_matrix(r, 2, true, address); }
inline void load_matrix_x4_trans(unsigned (&r)[4], unsigned address) { emulation::load_matrix(r, 4, true, address); }

#if defined(DTYPE_FP16)
constexpr bool EMULATED_BF16 = false;
#else
constexpr bool EMULATED_BF16 = true;
#endif

inline void mma_16x8x8(float (&d)[4], unsigned a0, unsigned a1, unsigned b) {
    const unsigned a[2] = {a0, a1};
    emulation::mma(d, a, &b, 8, EMULATED_BF16);
}
inline void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    const unsigned b[2] = {b0, b1};
    emulation::mma(d, a, b, 16, EMULATED_BF16);
#else
    mma_16x8x8(d, a[0], a[1], b0);
    mma_16x8x8(d, a[2], a[3], b1);
#endif
}
#endif

// ---- Arithmetic
inline float infinity() { return __builtin_huge_valf(); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
inline float inverse_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline float error_function(float x) { return std::erf(x); }
inline float round_to_even(float x) { return std::rint(x); }
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned opaque(unsigned value) { return value; }
template <typename T> T* opaque_global(T* pointer) { return pointer; }
inline float bits_to_float(int bits) { return emulation::float_of_bits(unsigned(bits)); }
inline unsigned float_to_bits(float value) { return emulation::float_bits(value); }
inline double bits_to_double(unsigned long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned multiply_high(unsigned a, unsigned b) {
    return unsigned((static_cast<unsigned long long>(a) * b) >> 32);
}
inline int lowest_bit(unsigned mask) { return __builtin_ctz(mask); }

#endif  // SOPRANO_DEVICE_CUH

// Every device primitive that the kernels use, one file of them for each noun: shared-memory access, asynchronous
// copies, matrix fragments, tensor-core products, warp exchanges, barriers, conversions and exponentials.
//
// The kernels speak to the hardware only through these functions. kernels/emulation/device.cuh defines the same
// names in host C++; it is included first when a kernel is built for the CPU and its guard
// keeps this file out with the parts that it includes.
//
// Conventions
//   * Shared memory is dynamic only and is named by 32-bit byte addresses counted from shared_base().
//   * DTYPE_FP16, DTYPE_BF16 or DTYPE_FP32 picks `Element`, the storage type of q, k, v and out.
//   * Lanes of a warp call the collectives (load_matrix_*, mma_*, shuffle*, any_lane, sync_warp) together.
#ifndef SOPRANO_DEVICE_CUH
#define SOPRANO_DEVICE_CUH

#define DEVICE __device__ __forceinline__

// Whether this architecture and dtype have matrix products: fp16 from Turing on, bf16 from Ampere on.
#if defined(DTYPE_FP16)
#define HAS_MMA (__CUDA_ARCH__ >= 750)
#elif defined(DTYPE_BF16)
#define HAS_MMA (__CUDA_ARCH__ >= 800)
#else
#define HAS_MMA 0
#endif

constexpr int WARP_LANES = 32;

// What a norm's output is multiplied by while it waits, unnormalised, in 16 bits: fp16 ends at 65,504.
#if defined(DTYPE_FP16)
constexpr float NORM_SCALE = 0.0625f;
#else
constexpr float NORM_SCALE = 1.0f;
#endif

DEVICE int lane_index() { return threadIdx.x & (WARP_LANES - 1); }
DEVICE int warp_index() { return threadIdx.x / WARP_LANES; }

#include "device_elements.cuh"
#include "device_memory.cuh"
#include "device_barriers.cuh"
#include "device_cluster.cuh"
#include "device_warp.cuh"
#include "device_matrix.cuh"
#include "device_arithmetic.cuh"

#endif  // SOPRANO_DEVICE_CUH

// Blocks of 512 bytes from wherever they lie, side by side: weights in the order in which the persistent kernel reads them.
//
// Compile-time: DTYPE_*, for device.cuh alone. Launch (soprano_cupy/gpu/persistent_weights.py): a warp for each block; any
// multiple of 32 threads.
#include "device.cuh"

struct GatherBlocksParams {
    const unsigned long long* sources;  // (count,) addresses, multiples of 16; 0: zeros
    uint4* target;                      // (count, 32)
    long long count;
};

extern "C" __global__ void __launch_bounds__(256) gather_blocks(const __grid_constant__ GatherBlocksParams params) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int lane = threadIdx.x % 32;
    const long long block = blockIdx.x * static_cast<long long>(blockDim.x / 32) + threadIdx.x / 32;
    if (block >= params.count) return;
    const uint4* source = reinterpret_cast<const uint4*>(load_global<unsigned long long>(params.sources + block));
    uint4 words = make_uint4(0, 0, 0, 0);
    if (source != nullptr) words = load_global<uint4>(source + lane);
    store_global<uint4>(params.target + block * 32 + lane, words);
}

// hopper.cuh and linear_hopper_products.cuh for the host. Copies by tensor map land when they are issued, and products are
// done when they are asked for; that nobody reads them earlier than a GPU would let him is checked through the barriers.
// A tensor map is the plain record below, not a CUtensorMap.
#ifndef SOPRANO_HOPPER_CUH
#define SOPRANO_HOPPER_CUH
#define SOPRANO_HOPPER_PRODUCTS_CUH

#include <algorithm>
#include <cmath>

#include "device.cuh"

#define __device__
#define __forceinline__ inline
#define __cluster_dims__(...)

using u32 = unsigned int;
using u64 = unsigned long;
using std::min;

constexpr int WARPGROUP = 128;
constexpr int PANEL_COLUMNS = 64;
constexpr int PANEL_ROW_BYTES = 128;
constexpr int SWIZZLE_ROWS = 8;

struct alignas(16) TensorMap {
    const unsigned char* address;
    long shape[3], strides[3];  // elements; bytes, the first is an element's 2
    int box[3], swizzled;
    unsigned char unused[128 - 8 - 6 * 8 - 4 * 4];
};
static_assert(sizeof(TensorMap) == 128, "as large as a CUtensorMap");

// ---- barriers and registers
inline void mbarrier_init(u32 barrier, int arrivals) { emulation::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(u32 barrier) { emulation::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(u32 barrier, u32 bytes) { emulation::mbarrier_arrive(barrier, long(bytes)); }
inline void mbarrier_wait(u32 barrier, u32 parity) { emulation::mbarrier_wait(barrier, parity); }
inline void named_barrier_sync(int id, int threads) { emulation::sync_named(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emulation::arrive_named(id, threads); }
inline void __syncthreads() { emulation::sync_block(); }
inline void __syncwarp() { emulation::sync_warp(); }
inline unsigned __shfl_sync(unsigned, unsigned value, int lane) { return emulation::shuffle(value, lane); }
inline bool elect_one() { return lane_index() == 0; }
template <int REGISTERS> void registers_release() {}
inline void cluster_sync() { emulation::sync_cluster(); }
// A shared address in another block: its rank above the address.
constexpr int RANK_SHIFT = 24;
inline u32 cluster_address(u32 address, u32 rank) { return address | rank << RANK_SHIFT; }
inline void cluster_store(u32 address, float value) {
    emulation::write_shared_of(address & ((1u << RANK_SHIFT) - 1), address >> RANK_SHIFT, &value, sizeof value);
}
inline float shared_load(u32 address) { return load_shared<float>(address); }
template <int REGISTERS> void registers_claim() {}

// ---- copies by tensor map: a box, its innermost rows one after the other; zeros where it leaves the array
inline void tma_prefetch_map(const TensorMap*) {}

inline void tma_load(u32 destination, const TensorMap* map, u32 barrier, int c0, int c1, int c2) {
    const int origin[3] = {c0, c1, c2};
    u32 at = destination;
    for (int k = 0; k < map->box[2]; ++k)
        for (int j = 0; j < map->box[1]; ++j)
            for (int i = 0; i < map->box[0]; i += 8, at += 16) {
                unsigned short words[8] = {};
                for (int e = 0; e < 8; ++e) {
                    const long place[3] = {origin[0] + i + e, origin[1] + j, origin[2] + k};
                    bool inside = true;
                    const unsigned char* source = map->address;
                    for (int axis = 0; axis < 3; ++axis) {
                        inside = inside && place[axis] >= 0 && place[axis] < map->shape[axis];
                        source += place[axis] * map->strides[axis];
                    }
                    if (inside) emulation::read_global(source, &words[e], 2);
                }
                emulation::write_shared(map->swizzled ? at ^ (at >> 3 & 0x70) : at, words, 16);
            }
    emulation::mbarrier_complete(barrier, long(at - destination));
}
inline void tma_load_rows(u32 destination, const TensorMap* map, u32 barrier, int column, int row) {
    tma_load(destination, map, barrier, column, row, 0);
}
inline void tma_load_tiles(u32 destination, const TensorMap* map, u32 barrier, int c1, int c2) {
    tma_load(destination, map, barrier, 0, c1, c2);
}
inline void tma_prefetch_tiles(const TensorMap*, int, int) {}

// ---- products
constexpr int ACCUMULATORS = TILE_ROWS / 2;

constexpr u64 descriptor_k_major(u32 address) {
    return u64((address & 0x3FFFF) >> 4) | 1ul << 16 | u64(SWIZZLE_ROWS * PANEL_ROW_BYTES >> 4) << 32 | 1ul << 62;
}
inline void product(float (&d)[ACCUMULATORS], const u32 (&a)[4], u64 b, int accumulate) {
    emulation::warpgroup_product(d, a, b, TILE_ROWS, accumulate != 0, EMULATED_BF16);
}
inline void products_fence() {}
inline void wgmma_commit() {}
template <int PENDING> void products_wait() {}
inline void hold_accumulators(float (&)[ACCUMULATORS]) {}

inline void store_matrix_x4_trans(u32 address, u32 w0, u32 w1, u32 w2, u32 w3) {
    const u32 words[4] = {w0, w1, w2, w3};
    emulation::store_matrix_trans(address, words);
}
inline float4 load_ahead(const float* address) { return load_global<float4>(address); }
inline float reciprocal(float x) { return 1.0f / x; }

#endif  // SOPRANO_HOPPER_CUH

// The matrix product and the copies of the Hopper linear kernel: W from registers, the activations from shared memory.
#pragma once

#include "hopper.cuh"

#ifndef SOPRANO_HOPPER_PRODUCTS_CUH  // nor is this file the host's
#define SOPRANO_HOPPER_PRODUCTS_CUH

constexpr int ACCUMULATORS = TILE_ROWS / 2;  // of a thread, for 64 features of TILE_ROWS rows

// A statement of N = TILE_ROWS names its accumulators, four words of A, the descriptor of B, and whether to accumulate.
#if TILE_ROWS == 64
#define PRODUCT_SHAPE "m64n64k16"
#define PRODUCT_REGISTERS(d) REGISTERS_32(d)
#define PRODUCT_NAMES NAMES_32
#define PRODUCT_OPERANDS "{%32,%33,%34,%35}, %36"
#define PRODUCT_ACCUMULATE "%37"
#elif TILE_ROWS == 96
#define PRODUCT_SHAPE "m64n96k16"
#define PRODUCT_REGISTERS(d) REGISTERS_32(d), REGISTERS_8(d, 32), REGISTERS_8(d, 40)
#define PRODUCT_NAMES NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define PRODUCT_OPERANDS "{%48,%49,%50,%51}, %52"
#define PRODUCT_ACCUMULATE "%53"
#elif TILE_ROWS == 128
#define PRODUCT_SHAPE "m64n128k16"
#define PRODUCT_REGISTERS(d) REGISTERS_64(d)
#define PRODUCT_NAMES NAMES_64
#define PRODUCT_OPERANDS "{%64,%65,%66,%67}, %68"
#define PRODUCT_ACCUMULATE "%69"
#elif TILE_ROWS == 192
#define PRODUCT_SHAPE "m64n192k16"
#define PRODUCT_REGISTERS(d) \
    REGISTERS_64(d), REGISTERS_8(d, 64), REGISTERS_8(d, 72), REGISTERS_8(d, 80), REGISTERS_8(d, 88)
#define PRODUCT_NAMES                                                                   \
    NAMES_64                                                                            \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83," \
    "%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define PRODUCT_OPERANDS "{%96,%97,%98,%99}, %100"
#define PRODUCT_ACCUMULATE "%101"
#elif TILE_ROWS == 256
#define PRODUCT_SHAPE "m64n256k16"
#define PRODUCT_REGISTERS(d)                                                                         \
    REGISTERS_64(d), REGISTERS_8(d, 64), REGISTERS_8(d, 72), REGISTERS_8(d, 80), REGISTERS_8(d, 88), \
        REGISTERS_8(d, 96), REGISTERS_8(d, 104), REGISTERS_8(d, 112), REGISTERS_8(d, 120)
#define PRODUCT_NAMES                                                                                   \
    NAMES_64                                                                                            \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87," \
    "%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,"     \
    "%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define PRODUCT_OPERANDS "{%128,%129,%130,%131}, %132"
#define PRODUCT_ACCUMULATE "%133"
#else
#error "TILE_ROWS must be 64, 96, 128, 192 or 256"
#endif

// D (64 features x TILE_ROWS rows) += A B, or = A B; both 16-bit and contiguous along the depth, which is 16.
__device__ __forceinline__ void product(float (&d)[ACCUMULATORS], const u32 (&a)[4], u64 b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " PRODUCT_ACCUMULATE
                 ", 0;\n"
                 "wgmma.mma_async.sync.aligned." PRODUCT_SHAPE "." WGMMA_TYPES " {" PRODUCT_NAMES "}, " PRODUCT_OPERANDS
                 ", p, 1, 1, 0;\n}\n"
                 : PRODUCT_REGISTERS(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// Registers written before this are seen by the products after it.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// All but the last PENDING groups of products are complete, and their operands may be overwritten.
template <int PENDING> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The accumulators are not touched ahead of this point, nor after it by what stands before.
__device__ __forceinline__ void hold_accumulators(float (&d)[ACCUMULATORS]) {
    asm volatile("" : PRODUCT_REGISTERS(d)::"memory");
}

// A box of a two-dimensional array, (column, row) its first element; completes on the barrier.
__device__ __forceinline__ void tma_load_rows(u32 destination, const TensorMap* map, u32 barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// The same of a three-dimensional array whose innermost axis is loaded whole.
__device__ __forceinline__ void tma_load_tiles(u32 destination, const TensorMap* map, u32 barrier, int c1, int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(0), "r"(c1), "r"(c2)
        : "memory");
}

// The same box as far as the L2 cache.
__device__ __forceinline__ void tma_prefetch_tiles(const TensorMap* map, int c1, int c2) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map), "r"(0), "r"(c1),
                 "r"(c2)
                 : "memory");
}

// Stores the transposes of four 8 x 8 matrices of 16-bit elements: word i of lane l is (l / 4, 2 (l % 4)) and the next of
// matrix i, and lane 8 i + c passes the address of column c of matrix i: 16 bytes.
__device__ __forceinline__ void store_matrix_x4_trans(u32 address, u32 w0, u32 w1, u32 w2, u32 w3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w0),
                 "r"(w1), "r"(w2), "r"(w3)
                 : "memory");
}

// Four floats that another kernel wrote. Issued where it stands, so that it can run under a main loop.
__device__ __forceinline__ float4 load_ahead(const float* address) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(address));
    return v;
}

// 1 / x in one instruction, relative error below 2^-22.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif  // SOPRANO_HOPPER_PRODUCTS_CUH

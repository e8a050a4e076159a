// Hopper's own instructions (sm_90a) as inline PTX: mbarriers, tensor-map copies, named barriers, register
// reallocation, and the warpgroup matrix product. Names and semantics are those of the PTX ISA; no headers needed.
//
// Tiles in shared memory. A tile of R rows and D 16-bit columns is D / 64 panels, each R rows of 128 bytes, as a
// tensor-map copy with the 128-byte swizzle writes it: the 16-byte chunk c of row r lies at
// panel + 128 * r + 16 * (c ^ (r & 7)). Panels start on multiples of 1024 bytes.
#pragma once
#ifndef SOPRANO_HOPPER_CUH  // kernels/emulation/hopper.cuh may have taken this file's place
#define SOPRANO_HOPPER_CUH

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int WARPGROUP = 128;     // threads that issue one wgmma together
constexpr int PANEL_COLUMNS = 64;  // 16-bit elements in a 128-byte swizzled row
constexpr int PANEL_ROW_BYTES = 128;
constexpr int SWIZZLE_ROWS = 8;                         // the swizzle repeats every 8 rows: 1024 bytes
constexpr long long SPIN_LIMIT_CYCLES = 20000000000LL;  // about 10 s: a wait this long is a bug, so trap

struct alignas(64) TensorMap {
    unsigned char bytes[128];  // a CUtensorMap, encoded by the host
};

__device__ __forceinline__ u32 smem_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers: a phase completes when its arrivals and its announced bytes are in ----

__device__ __forceinline__ void mbarrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine; a __syncthreads must follow for the other threads.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// Waits for the phase of this parity to complete. A fresh barrier counts as having completed parity 1.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
    if (mbarrier_try_wait(barrier, parity)) return;
    const long long start = clock64();
    while (!mbarrier_try_wait(barrier, parity)) {
        if (clock64() - start > SPIN_LIMIT_CYCLES) __trap();
    }
}

// True in one lane of a warp, all of whose lanes call this. The compiler knows it to be one.
__device__ __forceinline__ bool elect_one() {
    u32 elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

// ---- copies by tensor map: one box from global memory into shared memory, completing on an mbarrier ----

__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load(u32 destination, const TensorMap* map, u32 barrier, int c0, int c1, int c2,
                                         int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// Ordinary shared-memory stores of this thread become visible to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- named barriers (1 to 15; 0 is __syncthreads) ----

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters: blocks that run at once and write each other's shared memory ----

#ifndef SOPRANO_DEVICE_CUH  // which has it too
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
#endif

// All threads of the cluster that have not ended arrive and wait; stores before it are seen after it.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// The address, in block `rank` of the cluster, of what lies at `address` here.
__device__ __forceinline__ u32 cluster_address(u32 address, u32 rank) {
    u32 remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

__device__ __forceinline__ void cluster_store(u32 address, float value) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ float shared_load(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

// ---- registers: a warpgroup hands registers back to the block, or takes them ----

template <int REGISTERS> __device__ __forceinline__ void registers_release() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS> __device__ __forceinline__ void registers_claim() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- wgmma: D (64 x N, float32 in registers) += A (64 x 16) B (16 x N) ----
//
// Accumulators of lane l in warp w of the warpgroup: d[4 j + 2 i + e] is row 16 w + l / 4 + 8 i and column
// 8 j + 2 (l % 4) + e. A from registers holds the same rows: a[i] has columns 2 (l % 4) + {0, 1}, a[2 + i] those + 8.

// Bits 0-13 start, 16-29 leading offset, 32-45 stride offset, all in 16 bytes; 62-63 the swizzle, 1 = 128 bytes.
// Rows are contiguous along the product's K axis. The stride offset leads from 8 rows to the next 8; the leading
// offset is unused. A step of 16 columns inside a panel adds 2 to the start.
__device__ __forceinline__ constexpr u64 descriptor_k_major(u32 address) {
    constexpr u64 STRIDE = SWIZZLE_ROWS * PANEL_ROW_BYTES >> 4;
    return static_cast<u64>((address & 0x3FFFF) >> 4) | (1ull << 16) | (STRIDE << 32) | (1ull << 62);
}

// Rows are contiguous along N (a transposed B): the leading offset leads from a panel of 64 columns to the next,
// the stride offset from 8 rows of K to the next 8. A step of 16 rows adds 128 to the start.
template <int PANEL_BYTES> __device__ __forceinline__ constexpr u64 descriptor_n_major(u32 address) {
    constexpr u64 LEADING = PANEL_BYTES >> 4;
    constexpr u64 STRIDE = SWIZZLE_ROWS * PANEL_ROW_BYTES >> 4;
    return static_cast<u64>((address & 0x3FFFF) >> 4) | (LEADING << 16) | (STRIDE << 32) | (1ull << 62);
}

#if defined(DTYPE_BF16)
#define WGMMA_TYPES "f32.bf16.bf16"
#elif defined(DTYPE_FP16)
#define WGMMA_TYPES "f32.f16.f16"
#else
#error "define DTYPE_BF16 or DTYPE_FP16"
#endif

#define REGISTERS_8(d, i)                                                                                   \
    "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3]), "+f"((d)[i + 4]), "+f"((d)[i + 5]), \
        "+f"((d)[i + 6]), "+f"((d)[i + 7])
#define REGISTERS_32(d) REGISTERS_8(d, 0), REGISTERS_8(d, 8), REGISTERS_8(d, 16), REGISTERS_8(d, 24)
#define REGISTERS_64(d) REGISTERS_32(d), REGISTERS_8(d, 32), REGISTERS_8(d, 40), REGISTERS_8(d, 48), REGISTERS_8(d, 56)
#define NAMES_32                                                                     \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
    "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64                                                                    \
    NAMES_32                                                                        \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50," \
    "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// The accumulators named here hold their values before the products that follow: nothing on them moves past.
__device__ __forceinline__ void wgmma_fence(float (&d)[64]) {
    asm volatile("wgmma.fence.sync.aligned;" : REGISTERS_64(d)::"memory");
}
__device__ __forceinline__ void wgmma_fence(float (&d)[32]) {
    asm volatile("wgmma.fence.sync.aligned;" : REGISTERS_32(d)::"memory");
}

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the last PENDING groups are complete; `d`, written by one of those, may be read from here on.
template <int PENDING> __device__ __forceinline__ void wgmma_wait(float (&d)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : REGISTERS_64(d) : "n"(PENDING) : "memory");
}
template <int PENDING> __device__ __forceinline__ void wgmma_wait(float (&d)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : REGISTERS_32(d) : "n"(PENDING) : "memory");
}

// Computes the values of `d` here, not later: keeps arithmetic on them in front of a wait for other products.
__device__ __forceinline__ void hold(float (&d)[64]) { asm volatile("" : REGISTERS_64(d)::"memory"); }

// A and B in shared memory, both contiguous along K; ACCUMULATE false starts from zero. N = 128 and N = 64.
template <bool ACCUMULATE> __device__ __forceinline__ void wgmma_shared(float (&d)[64], u64 a, u64 b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " {" NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
        : REGISTERS_64(d)
        : "l"(a), "l"(b), "n"(ACCUMULATE ? 1 : 0));
}
template <bool ACCUMULATE> __device__ __forceinline__ void wgmma_shared(float (&d)[32], u64 a, u64 b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {" NAMES_32 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        : REGISTERS_32(d)
        : "l"(a), "l"(b), "n"(ACCUMULATE ? 1 : 0));
}

// A in registers, B in shared memory contiguous along N (transposed); always accumulates.
__device__ __forceinline__ void wgmma_registers(float (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " {" NAMES_64
        "}, {%64,%65,%66,%67}, %68, p, 1, 1, 1;\n}\n"
        : REGISTERS_64(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}
__device__ __forceinline__ void wgmma_registers(float (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {" NAMES_32
        "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;\n}\n"
        : REGISTERS_32(d)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
}

// ---- arithmetic ----

#ifndef SOPRANO_DEVICE_CUH
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// Two floats rounded to the 16-bit type, `low` in the lower half: the order of two neighbouring columns.
__device__ __forceinline__ u32 pack_pair(float low, float high) {
    u32 packed;
#if defined(DTYPE_BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

#endif  // SOPRANO_HOPPER_CUH

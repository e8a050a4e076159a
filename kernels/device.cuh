// Every device primitive that the attention kernels use, in one place: shared-memory access, asynchronous
// copies, matrix fragments, tensor-core products, warp exchanges, barriers, conversions and exponentials.
//
// The kernels speak to the hardware only through these functions. kernels/emulation/device.cuh defines the same
// names in host C++; it is included first when a kernel is built for the CPU and its guard keeps this file out.
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

// ---------------------------------------------------------------------------------------------------------------
// Element formats. Two half-precision numbers travel in one register, the lower index in the lower half.

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

// ---------------------------------------------------------------------------------------------------------------
// Shared memory.

// Byte address of the launch's dynamic shared memory, aligned to 1,024 bytes.
DEVICE unsigned shared_base() {
    extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
    return static_cast<unsigned>(__cvta_generic_to_shared(dynamic_shared_memory));
}

template <typename T> DEVICE T load_shared(unsigned address);
template <typename T> DEVICE void store_shared(unsigned address, T value);

template <> DEVICE unsigned load_shared<unsigned>(unsigned address) {
    unsigned v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
template <> DEVICE float load_shared<float>(unsigned address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}
template <> DEVICE float2 load_shared<float2>(unsigned address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}
template <> DEVICE float4 load_shared<float4>(unsigned address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
template <> DEVICE uint2 load_shared<uint2>(unsigned address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
template <> DEVICE uint4 load_shared<uint4>(unsigned address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

template <> DEVICE void store_shared<unsigned>(unsigned address, unsigned v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
template <> DEVICE void store_shared<float>(unsigned address, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
template <> DEVICE void store_shared<float2>(unsigned address, float2 v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}
template <> DEVICE void store_shared<float4>(unsigned address, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}
template <> DEVICE void store_shared<uint2>(unsigned address, uint2 v) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
template <> DEVICE void store_shared<uint4>(unsigned address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Adds to a word, and returns what it was.
DEVICE unsigned atomic_add_shared(unsigned address, unsigned value) {
    unsigned old;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(old) : "r"(address), "r"(value) : "memory");
    return old;
}

// ---------------------------------------------------------------------------------------------------------------
// Global memory. T is a plain value of 2, 4, 8 or 16 bytes; the pointer is aligned to its size.

// Reads data that no thread writes during the launch.
template <typename T> DEVICE T load_global(const void* address) { return __ldg(static_cast<const T*>(address)); }

// Reads data that other blocks of this launch may have written (after fence_device and an atomic of theirs).
template <typename T> DEVICE T load_global_fresh(const void* address) { return __ldcg(static_cast<const T*>(address)); }

// As load_global_fresh, and the load is issued where the call stands: compilers like to put a load that is needed late
// behind arithmetic that waits for others.
template <typename T> DEVICE T load_global_in_place(const void* address);

template <> DEVICE unsigned load_global_in_place<unsigned>(const void* address) {
    unsigned v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
}
template <> DEVICE float load_global_in_place<float>(const void* address) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(address));
    return v;
}
template <> DEVICE float2 load_global_in_place<float2>(const void* address) {
    float2 v;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(address));
    return v;
}
template <> DEVICE float4 load_global_in_place<float4>(const void* address) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(address));
    return v;
}

// Reads 16 bytes of constants that this multiprocessor needs once, past the first-level cache. Ahead of
// grid_dependency_wait it is issued ahead of it; loads of the non-coherent kind (load_global) may be moved behind.
DEVICE uint4 load_global_once(const void* address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

template <typename T> DEVICE void store_global(void* address, T value) { *static_cast<T*>(address) = value; }

// Asks for the 128 bytes around an address to be brought into the second-level cache. A hint: it reads nothing.
DEVICE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Writes a word of mapped host memory, behind everything that this thread has written or seen written before.
DEVICE void publish(void* address, unsigned long long value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// *counter = (*counter >= limit) ? 0 : *counter + 1, returning the old value: a counter that resets itself.
DEVICE unsigned atomic_increment(unsigned* counter, unsigned limit) { return atomicInc(counter, limit); }

// Orders this thread's global reads and writes before and after, as seen by the whole device; behind a barrier also
// those of the threads that it waited for. With an atomic after it it releases, before it acquires.
DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// ---------------------------------------------------------------------------------------------------------------
// Asynchronous copies, global to shared, 16 bytes each (both sides aligned to 16). Where `valid` is false nothing
// is read and zeros are written, so padded rows of any content never enter the arithmetic. A copy has landed for
// the thread that issued it after copy_async_wait, and for others after a barrier behind that. Below Ampere the
// copy is a plain load and store, already complete.

DEVICE void copy_async_16(unsigned shared_address, const void* source, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    uint4 value = make_uint4(0u, 0u, 0u, 0u);
    if (valid) value = load_global<uint4>(source);
    store_shared<uint4>(shared_address, value);
#endif
}

// Closes the group of copies issued since the last commit.
DEVICE void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's most recent groups are still in flight.
template <int PENDING> DEVICE void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// Barriers.

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// Waits for `threads` threads (a multiple of 32) at barrier `id` (1 to 15).
DEVICE void sync_named(int id, int threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

#if __CUDA_ARCH__ >= 900
// Thread-block clusters: the blocks of a cluster read each other's shared memory.
DEVICE unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A barrier of the cluster in two halves that orders no memory: behind the wait all blocks have begun, so that their
// shared memory may be written, and every transfer_init before the arrival is done. A block may end without waiting.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Transfers: 16-byte writes into the shared memory of a block of the cluster, counted by a barrier there (8 bytes of
// its shared memory). transfer_wait returns, and what was sent is seen, once as many bytes as expected have come. It serves
// once. One thread of the receiving block calls init, and later expect; which may come after the first bytes.
DEVICE void transfer_init(unsigned barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(barrier)
                 : "memory");
}
DEVICE void transfer_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// address and barrier: as in this block, and meant in the block of rank `rank`.
DEVICE void transfer_store(unsigned address, unsigned barrier, unsigned rank, float4 v) {
    asm volatile(
        "{\n.reg .u32 there, counted;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 counted, %1, "
        "%2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [counted];\n}" ::
            "r"(address),
        "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
        : "memory");
}
DEVICE void transfer_wait(unsigned barrier) {
    constexpr long long MOST_CYCLES = 20'000'000'000;  // about 10 s: an error, which must not hang the GPU
    const long long start = clock64();
    unsigned done = 0;
    while (done == 0) {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier)
            : "memory");
        if (done == 0 && clock64() - start > MOST_CYCLES) __trap();
    }
}

// Reads a float at this block's shared `address` in the block of rank `rank`.
DEVICE float load_shared_of(unsigned address, unsigned rank) {
    float v;
    asm volatile(
        "{\n.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\n"
        "ld.shared::cluster.f32 %0, [remote];\n}"
        : "=f"(v)
        : "r"(address), "r"(rank)
        : "memory");
    return v;
}
DEVICE float4 load_shared4_of(unsigned address, unsigned rank) {
    float4 v;
    asm volatile(
        "{\n.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(address), "r"(rank)
        : "memory");
    return v;
}
#endif

// Programmatic dependent launch (PTX griddepcontrol): the next kernel of the stream may begin once every block of this one
// has called grid_dependency_launch; grid_dependency_wait returns when the kernels before are done and their writes seen.
DEVICE void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// Warp exchanges, over all 32 lanes.

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE float shuffle(float value, int source_lane) { return __shfl_sync(0xffffffffu, value, source_lane); }
DEVICE unsigned shuffle(unsigned value, int source_lane) { return __shfl_sync(0xffffffffu, value, source_lane); }
DEVICE unsigned shuffle_xor(unsigned value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE bool any_lane(bool predicate) { return __any_sync(0xffffffffu, predicate); }
// Bit l: the predicate of lane l.
DEVICE unsigned lanes_where(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Over all lanes, for all lanes.
#if __CUDA_ARCH__ >= 800
DEVICE unsigned max_of_lanes(unsigned value) { return __reduce_max_sync(0xffffffffu, value); }
DEVICE unsigned min_of_lanes(unsigned value) { return __reduce_min_sync(0xffffffffu, value); }
DEVICE unsigned sum_of_lanes(unsigned value) { return __reduce_add_sync(0xffffffffu, value); }
#else
DEVICE unsigned max_of_lanes(unsigned value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value = max(value, shuffle_xor(value, mask));
    return value;
}
DEVICE unsigned min_of_lanes(unsigned value) { return ~max_of_lanes(~value); }
DEVICE unsigned sum_of_lanes(unsigned value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}
#endif

// ---------------------------------------------------------------------------------------------------------------
// Matrix fragments: 8 x 8 matrices of 2-byte elements. Lane l passes the address of row l % 8 of matrix l / 8 (16
// aligned bytes; x1 uses lanes 0-7, x2 lanes 0-15). Register i of lane l receives elements (l / 4, 2 (l % 4)) and
// the next of matrix i; with _trans, of its transpose.

#if __CUDA_ARCH__ >= 750 && !defined(DTYPE_FP32)

DEVICE void load_matrix_x1(unsigned& r, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(address) : "memory");
}
DEVICE void load_matrix_x2(unsigned (&r)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrix_x4(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrix_x1_trans(unsigned& r, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(address) : "memory");
}
DEVICE void load_matrix_x2_trans(unsigned (&r)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrix_x4_trans(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d (16 x 8, fp32) += a (16 x 8) b (8 x 8). a: rows l / 4 and l / 4 + 8; b: column l / 4; d: rows l / 4 (d[0], d[1]) and
// l / 4 + 8 (d[2], d[3]), columns 2 (l % 4) and the next.
DEVICE void mma_16x8x8(float (&d)[4], unsigned a0, unsigned a1, unsigned b) {
#if defined(DTYPE_FP16)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
#endif
}

// d (16 x 8, fp32) += a (16 x 16) b (16 x 8). a: {rows l / 4, rows l / 4 + 8} of k 0-7, then of k 8-15; b: column
// l / 4 of k 0-7 and k 8-15, each lane the pair of k from 2 (l % 4). Turing forms it from two products of depth 8.
DEVICE void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
#if defined(DTYPE_FP16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
#else
    mma_16x8x8(d, a[0], a[1], b0);
    mma_16x8x8(d, a[2], a[3], b1);
#endif
}

#endif

// ---------------------------------------------------------------------------------------------------------------
// Arithmetic.

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

#endif  // SOPRANO_DEVICE_CUH

// What kernels that stay on the GPU for many tokens ask of the hardware beside device.cuh: barriers in shared memory that
// count bytes, bulk copies, stores into other blocks of a cluster, and words that carry their own flag.
#ifndef SOPRANO_PERSISTENT_DEVICE_CUH
#define SOPRANO_PERSISTENT_DEVICE_CUH

#include "device.cuh"

#define DEVICE_CALL __device__ __noinline__  // a function of its own: its registers are not the caller's

typedef unsigned long long Word;  // a float in the lower half, the number of its exchange in the upper

// ---- barriers in shared memory: a phase ends when its arrivals and its announced bytes are in ----

DEVICE void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Other blocks of the cluster and the copy engine see the barriers initialised; a barrier of the cluster follows.
DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes to come.
DEVICE void barrier_expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Whether the phase of this parity has ended; may take a moment. A fresh barrier has ended parity 1. The bytes that the
// phase counted are seen by whoever sees its end; a wider scope than the block's own would empty the first-level cache.
DEVICE bool barrier_done(unsigned barrier, unsigned parity) {
    unsigned done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// ---- copies and stores that complete on a barrier ----

// What this thread has written to shared memory is written before what a copy that starts later brings there.
DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Constants that each block reads once: the second-level cache may drop them first.
DEVICE void copy_bulk(unsigned shared_address, const void* source, unsigned bytes, unsigned barrier) {
    asm volatile(
        "{\n.reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "policy;\n}\n" ::"r"(shared_address),
        "l"(source), "r"(bytes), "r"(barrier)
        : "memory");
}

// Brings what will be copied later into the second-level cache.
DEVICE void prefetch_bulk(const void* source, unsigned bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// The address, in the block of rank `rank`, of what lies at `address` here.
DEVICE unsigned address_in(unsigned address, unsigned rank) {
    unsigned remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}

// 16 or 4 bytes into a block of the cluster; its barrier there counts them.
DEVICE void send_16(unsigned address, uint4 v, unsigned barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            address),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
        : "memory");
}
DEVICE void send_4(unsigned address, unsigned v, unsigned barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
                 "r"(v), "r"(barrier)
                 : "memory");
}

// ---- words in global memory that other blocks wait for ----

DEVICE Word make_word(unsigned value, unsigned number) { return static_cast<Word>(number) << 32 | value; }
DEVICE unsigned word_value(Word word) { return static_cast<unsigned>(word); }
DEVICE unsigned word_number(Word word) { return static_cast<unsigned>(word >> 32); }

DEVICE void store_word(Word* address, Word word) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(word) : "memory");
}
DEVICE Word load_word(const Word* address) {
    Word word;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(address) : "memory");
    return word;
}
DEVICE void store_words(Word* address, Word first, Word second) {
    asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second) : "memory");
}
DEVICE void load_words(const Word* address, Word& first, Word& second) {
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(address) : "memory");
}
DEVICE unsigned load_flag(const unsigned* address) {
    unsigned value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
DEVICE void store_flag(unsigned* address, unsigned value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

template <> DEVICE void store_shared<unsigned short>(unsigned address, unsigned short v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}

// A word in shared memory that other warps of the block watch. Accesses of one warp to shared memory happen in their order,
// so what the warp has read from there before it stores the word, it has read. (A release would wait for all loads.)
DEVICE void store_flag_shared(unsigned address, unsigned value) {
    asm volatile("st.relaxed.cta.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE unsigned load_flag_shared(unsigned address) {
    unsigned value;
    asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

// The same, ordering all that was written before it.
DEVICE void store_release(unsigned address, unsigned value) {
    asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE unsigned load_acquire(unsigned address) {
    unsigned value;
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

DEVICE bool all_lanes(bool predicate) { return __all_sync(0xffffffffu, predicate); }
DEVICE void launch_given_up() {}  // for the emulated machine: what is computed from here on is for nobody

DEVICE int bits_set(unsigned mask) { return __popc(mask); }
template <> DEVICE unsigned short load_shared<unsigned short>(unsigned address) {
    unsigned short v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
    return v;
}

// The compiler forgets where this value comes from, so that what is derived from it is not kept in registers over a loop.
DEVICE void forget(unsigned& value) { asm volatile("" : "+r"(value)); }
DEVICE void forget(int& value) { asm volatile("" : "+r"(value)); }

DEVICE long long clock_cycles() { return clock64(); }
DEVICE void pause() {}  // a thread that waits lets others run: nothing to do on a GPU

#endif

// Part of device.cuh: thread-block clusters, their barriers, and the shared memory of their other blocks.
#pragma once

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

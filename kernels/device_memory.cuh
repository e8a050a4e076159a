// Part of device.cuh: shared memory, global memory, and asynchronous copies from global to shared.
#pragma once

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

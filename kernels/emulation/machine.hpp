// The emulated machine: what emulation/device.cuh asks of it. Each function acts for the thread (fiber) that is
// running; collectives return once all partners have taken part. Any misuse (a race, an address out of bounds or
// misaligned, lanes that diverge, a barrier that some thread never reaches) ends the launch with a message.
#pragma once

#include <cstddef>

namespace emulation {

struct Dim3 {
    unsigned x = 0, y = 0, z = 0;
};

extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

// Shared addresses start here, so that an address of 0 (a forgotten base) is out of bounds.
constexpr unsigned SHARED_BASE = 1024;

void read_shared(unsigned address, void* destination, unsigned bytes);
void write_shared(unsigned address, const void* source, unsigned bytes);
unsigned add_shared(unsigned address, unsigned value);  // atomically; the old value
void read_shared_of(unsigned address, unsigned rank, void* destination, unsigned bytes);
void write_shared_of(unsigned address, unsigned rank, const void* source, unsigned bytes);
void read_global(const void* address, void* destination, unsigned bytes);
void write_global(void* address, const void* source, unsigned bytes);

// Copies land at the wait that covers their group, never earlier; until then any access to their target is an error.
void copy_async(unsigned shared_address, const void* source, bool valid);
void copy_async_commit();
void copy_async_wait(int pending_groups);

void sync_warp();
void sync_block();
void sync_named(int id, int threads);
void sync_cluster();
void cluster_arrive();
void cluster_wait();
void transfer_init(unsigned barrier);
void transfer_expect(unsigned barrier, unsigned bytes);
void transfer_store(unsigned address, unsigned barrier, unsigned rank, const void* source);  // 16 bytes
void transfer_wait(unsigned barrier);
unsigned cluster_rank();

// Arrives at a named barrier without waiting.
void arrive_named(int id, int threads);

// An mbarrier at a shared address. A phase completes when its arrivals and its announced bytes are in; what came before
// is then ordered before what a thread does that waited for it.
void mbarrier_init(unsigned address, int arrivals);
void mbarrier_arrive(unsigned address, long announced_bytes);
void mbarrier_complete(unsigned address, long bytes);
void mbarrier_wait(unsigned address, unsigned parity);

// D (64 x rows of the warpgroup; this warp's 16) += or = A (fragments) B: `rows` rows of 16 elements, contiguous along the
// depth, as a matrix descriptor with the 128-byte swizzle finds them. d[4 j + 2 i + e]: see hopper.cuh.
void warpgroup_product(float* d, const unsigned* a, unsigned long descriptor, int rows, bool accumulate, bool bf16);

// Four 8 x 8 matrices, transposed on their way: lane 8 i + c passes the address of column c of matrix i.
void store_matrix_trans(unsigned address, const unsigned* words);

// For spins: other threads run on. What a warp did before it signals a key is ordered before what others do after they
// observe it.
void yield();
void signal(unsigned long long key);
void observe(unsigned long long key);
void forgive_races();  // from now on: the launch has given up
[[noreturn]] void fail(const char* format, ...);

unsigned shuffle(unsigned value, int source_lane);
unsigned ballot(bool predicate);
void load_matrix(unsigned* registers, int matrices, bool transposed, unsigned address);
void mma(float* d, const unsigned* a, const unsigned* b, int depth, bool bf16);

}  // namespace emulation

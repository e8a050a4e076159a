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
void write_shared_of(unsigned address, unsigned rank, const void* source, unsigned bytes);
void read_shared_of(unsigned address, unsigned rank, void* destination, unsigned bytes);
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
unsigned cluster_rank();

unsigned shuffle(unsigned value, int source_lane);
unsigned ballot(bool predicate);
void load_matrix(unsigned* registers, int matrices, bool transposed, unsigned address);
void mma(float* d, const unsigned* a, const unsigned* b, int depth, bool bf16);

}  // namespace emulation

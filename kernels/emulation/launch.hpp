// What the host passes to the emulated machine; tests/emulation.py holds the same fields in the same order.
#pragma once

#include <cstddef>

namespace emulation {

// A kernel's one struct, whatever its type. Both the x86-64 and the AArch64 convention hand over a large struct by its
// address or on the stack, where a kernel finds the fields of its own, smaller one at the start.
struct alignas(16) ParameterBlock {
    unsigned char bytes[512];
};

typedef void (*Kernel)(ParameterBlock);

// A range of global memory that the kernel may touch.
struct Buffer {
    const void* start;
    size_t bytes;
    int writable;
};

struct Options {
    unsigned grid[3];
    unsigned threads;       // of a block; a multiple of 32
    unsigned shared_bytes;  // of a block; a multiple of 16
    unsigned cluster;       // blocks of a cluster along x; 1: none
    int reverse;            // 1: later threads run first
    // Sabotage, to prove that a fault is caught: every thread ignores its n-th barrier, wait or warp barrier; -1: none.
    int skip_barrier, skip_wait, skip_warp_barrier;
    int num_buffers;  // 0: global accesses are not checked
    const Buffer* buffers;
};

}  // namespace emulation

// Runs the whole grid. 0: done; 1: `message` says what went wrong and where.
extern "C" int emulation_launch(emulation::Kernel kernel, const void* params, size_t params_bytes,
                                const emulation::Options* options, char* message, size_t message_bytes);

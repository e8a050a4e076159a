// The emulated machine runs a grid: clusters of blocks of fibers, each in turn, so global memory has one writer at a
// time. Built once for all kernels, with machine_memory.cpp, machine_barriers.cpp and machine_warps.cpp.
#include "machine.hpp"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine_state.hpp"

namespace emulation {

Dim3 threadIdx, blockIdx, blockDim, gridDim;
Machine machine;

namespace {

void describe(char* out, size_t bytes, int thread) {
    const int local = thread % machine.block_threads();
    std::snprintf(out, bytes, "block (%u, %u, %u) thread %d (warp %d lane %d)", blockIdx.x, blockIdx.y, blockIdx.z,
                  local, local / LANES, local % LANES);
}

void select(int fiber) {
    const unsigned threads = machine.options->threads;
    const unsigned flat = machine.first_block + unsigned(fiber) / threads;
    threadIdx.x = unsigned(fiber) % threads;
    blockIdx.x = flat % gridDim.x;
    blockIdx.y = flat / gridDim.x % gridDim.y;
    blockIdx.z = flat / gridDim.x / gridDim.y;
}

void enter() { machine.kernel(machine.params); }

void deadlock() {
    for (size_t t = 0; t < machine.threads.size(); ++t) {
        if (machine.fibers.finished(int(t))) continue;
        char who[128];
        select(int(t));
        describe(who, sizeof who, int(t));
        std::snprintf(machine.message, machine.message_bytes, "deadlock: %s waits for ever at %s", who,
                      machine.fibers.reason(int(t)));
        break;
    }
    machine.failed = true;
}

void run_cluster(unsigned first_block) {
    const Options& options = *machine.options;
    const int threads = int(options.threads * options.cluster);
    machine.first_block = first_block;
    machine.threads.assign(threads, Thread{});
    machine.warps.assign(threads / LANES, Warp{});
    machine.barriers.assign(options.cluster * BARRIERS + 1, Barrier{});
    machine.mbarriers.clear();
    machine.signals.clear();
    machine.phase = ClusterPhase{};
    machine.transfers.clear();
    machine.shared.reset(int(options.cluster), options.shared_bytes, threads / LANES);
    machine.fibers.run(threads, enter, select, deadlock, options.reverse != 0);
}

}  // namespace

[[noreturn]] void fail(const char* format, ...) {
    char what[384], who[128];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    describe(who, sizeof who, machine.thread());
    std::snprintf(machine.message, machine.message_bytes, "%s, in %s", what, who);
    machine.failed = true;
    machine.fibers.abandon();
}

void yield() { machine.fibers.yield(); }
void signal(unsigned long long key) { machine.shared.release(machine.warp(), machine.signals[key]); }
void forgive_races() { machine.shared.forgive(); }
void observe(unsigned long long key) {
    const auto found = machine.signals.find(key);
    if (found != machine.signals.end()) machine.shared.acquire(machine.warp(), found->second);
}

}  // namespace emulation

int emulation_launch(emulation::Kernel kernel, const void* params, size_t params_bytes,
                     const emulation::Options* options, char* message, size_t message_bytes) {
    using namespace emulation;
    machine.kernel = kernel;
    if (params_bytes <= 16 || params_bytes > sizeof machine.params.bytes) {
        std::snprintf(message, message_bytes, "parameters of %zu bytes: 17 to %zu can be passed", params_bytes,
                      sizeof machine.params.bytes);
        return 1;
    }
    std::memcpy(machine.params.bytes, params, params_bytes);
    machine.options = options;
    machine.message = message;
    machine.message_bytes = message_bytes;
    machine.failed = false;
    blockDim = {options->threads, 1, 1};
    gridDim = {options->grid[0], options->grid[1], options->grid[2]};
    const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
    for (unsigned first = 0; first < blocks && !machine.failed; first += options->cluster) run_cluster(first);
    return machine.failed ? 1 : 0;
}

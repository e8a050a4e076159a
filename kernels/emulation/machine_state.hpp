// The state of the emulated machine: what its threads, warps, blocks and clusters have done and wait for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fibers.hpp"
#include "launch.hpp"
#include "machine.hpp"
#include "shared_memory.hpp"

namespace emulation {

constexpr int LANES = 32, BARRIERS = 16;

struct Copy {
    unsigned offset;
    const void* source;  // null: zeros
};

struct Thread {
    std::vector<Copy> open;                          // copies issued since the last commit
    std::deque<std::vector<Copy>> groups;            // committed and still in flight, oldest first
    int barriers = 0, waits = 0, warp_barriers = 0;  // how many it has met, for Options::skip_*
    int cluster_arrivals = 0;
};

struct Warp {
    const char* operation = nullptr;
    int detail = 0, arrived = 0;
    void* slots[LANES];
};

struct Barrier {
    std::vector<int> waiting;
    int expected = 0, arrived = 0;       // threads in all; of those, how many do not wait
    std::vector<std::uint32_t> joining;  // clocks of those, see SharedMemory
};

struct Mbarrier {
    int expected = 0, pending = 0;
    long bytes = 0;       // announced and not yet there
    unsigned phases = 0;  // completed
    std::vector<int> waiting;
    std::vector<std::uint32_t> joining, released;
};

// A cluster's barrier in two halves, which orders no memory.
struct ClusterPhase {
    int completed = 0, arrived = 0;
    std::vector<int> waiting;
};

// A barrier that counts bytes.
struct Transfer {
    bool expected = false;
    long long missing = 0;              // bytes expected and not here yet; below 0 before they are expected
    std::vector<int> waiting;           // threads
    std::vector<std::uint32_t> clocks;  // of the senders, see SharedMemory

    bool done() const { return expected && missing == 0; }
};

struct Machine {
    Fibers fibers;
    ClusterPhase phase;
    std::map<std::pair<int, unsigned>, Transfer> transfers;  // by block and shared address
    SharedMemory shared;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::map<std::pair<int, unsigned>, Mbarrier> mbarriers;  // by block and address
    std::unordered_map<unsigned long long, std::vector<std::uint32_t>> signals;
    std::vector<Barrier> barriers;  // BARRIERS for each block; one for the cluster at the end
    const Options* options = nullptr;
    ParameterBlock params;
    Kernel kernel = nullptr;
    unsigned first_block = 0;
    char* message = nullptr;
    size_t message_bytes = 0;
    bool failed = false;

    int block_threads() const { return int(options->threads); }
    int thread() const { return fibers.current(); }
    int lane() const { return thread() % LANES; }
    int warp() const { return thread() / LANES; }
    int block() const { return thread() / block_threads(); }
    Actor actor() const { return {warp(), lane()}; }
};

extern Machine machine;

}  // namespace emulation

// The emulated machine's barriers: of a block, named ones, of a cluster, and those that count arrivals and bytes.
#include "machine.hpp"

#include <cstdint>
#include <vector>

#include "machine_state.hpp"

namespace emulation {

namespace {

// Whether this thread is the last to come.
bool is_last(Barrier& barrier, int expected, const char* name) {
    const int there = int(barrier.waiting.size()) + barrier.arrived;
    if (there > 0 && barrier.expected != expected)
        fail("%s: one thread waits for %d threads, another for %d", name, barrier.expected, expected);
    barrier.expected = expected;
    return there + 1 == expected;
}

void open_barrier(Barrier& barrier) {
    std::vector<int> warps;
    for (int thread : barrier.waiting) {
        if (thread % LANES == 0) warps.push_back(thread / LANES);
        machine.fibers.wake(thread);
    }
    machine.shared.sync_warps(warps);
    if (barrier.arrived > 0)
        for (int warp : warps) machine.shared.acquire(warp, barrier.joining);
    barrier = Barrier{};
}

void meet_barrier(Barrier& barrier, int expected, const char* name) {
    const bool last = is_last(barrier, expected, name);
    barrier.waiting.push_back(machine.thread());
    if (!last) return machine.fibers.block(name);
    open_barrier(barrier);
}

Mbarrier& mbarrier_at(unsigned address) {
    const auto found = machine.mbarriers.find({machine.block(), address});
    if (found == machine.mbarriers.end()) fail("there is no mbarrier at %u", address - SHARED_BASE);
    return found->second;
}

void complete_if_due(Mbarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.expected;
    ++barrier.phases;
    barrier.released = barrier.joining;
    for (int thread : barrier.waiting) machine.fibers.wake(thread);
    barrier.waiting.clear();
}

Transfer& find_transfer(int block, unsigned barrier) {
    const auto found = machine.transfers.find({block, barrier});
    if (found == machine.transfers.end())
        fail("a transfer to block %d of the cluster, whose barrier is not ready", block);
    return found->second;
}

void wake_if_done(Transfer& transfer) {
    if (!transfer.done()) return;
    for (int waiting : transfer.waiting) machine.fibers.wake(waiting);
    transfer.waiting.clear();
}

}  // namespace

void sync_block() {
    if (machine.threads[machine.thread()].barriers++ == machine.options->skip_barrier) return;
    meet_barrier(machine.barriers[machine.block() * BARRIERS], machine.block_threads(), "sync_block");
}

void sync_named(int id, int threads) {
    if (id < 1 || id >= BARRIERS || threads % LANES != 0) fail("sync_named(%d, %d) is not a barrier", id, threads);
    if (machine.threads[machine.thread()].barriers++ == machine.options->skip_barrier) return;
    meet_barrier(machine.barriers[machine.block() * BARRIERS + id], threads, "sync_named");
}

void arrive_named(int id, int threads) {
    if (id < 1 || id >= BARRIERS || threads % LANES != 0) fail("arrive_named(%d, %d) is not a barrier", id, threads);
    if (machine.threads[machine.thread()].barriers++ == machine.options->skip_barrier) return;
    Barrier& barrier = machine.barriers[machine.block() * BARRIERS + id];
    const bool last = is_last(barrier, threads, "arrive_named");
    ++barrier.arrived;
    machine.shared.release(machine.warp(), barrier.joining);
    if (last) open_barrier(barrier);
}

void mbarrier_init(unsigned address, int arrivals) {
    if (address % 8 != 0) fail("an mbarrier at %u, which is no multiple of 8", address);
    Mbarrier& barrier = machine.mbarriers[{machine.block(), address}];
    barrier = Mbarrier{};
    barrier.expected = barrier.pending = arrivals;
}

void mbarrier_arrive(unsigned address, long announced_bytes) {
    Mbarrier& barrier = mbarrier_at(address);
    if (barrier.pending <= 0)
        fail("more arrivals at the mbarrier at %u than the %d expected", address, barrier.expected);
    machine.shared.release(machine.warp(), barrier.joining);
    barrier.bytes += announced_bytes;
    --barrier.pending;
    complete_if_due(barrier);
}

void mbarrier_complete(unsigned address, long bytes) {
    Mbarrier& barrier = mbarrier_at(address);
    machine.shared.release(machine.warp(), barrier.joining);
    barrier.bytes -= bytes;
    complete_if_due(barrier);
}

void mbarrier_wait(unsigned address, unsigned parity) {
    if (machine.threads[machine.thread()].waits++ == machine.options->skip_wait) return;
    Mbarrier& barrier = mbarrier_at(address);
    // a phase is waited for by its parity alone, as the hardware does
    while ((barrier.phases & 1) == parity) {
        barrier.waiting.push_back(machine.thread());
        machine.fibers.block("mbarrier_wait");
    }
    if (!barrier.released.empty()) machine.shared.acquire(machine.warp(), barrier.released);
}

void sync_cluster() {
    if (machine.threads[machine.thread()].barriers++ == machine.options->skip_barrier) return;
    meet_barrier(machine.barriers.back(), int(machine.threads.size()), "sync_cluster");
}

void cluster_arrive() {
    Thread& thread = machine.threads[machine.thread()];
    if (thread.barriers++ == machine.options->skip_barrier) return;
    ++thread.cluster_arrivals;
    ClusterPhase& phase = machine.phase;
    if (++phase.arrived < int(machine.threads.size())) return;
    phase.arrived = 0;
    ++phase.completed;
    for (int waiting : phase.waiting) machine.fibers.wake(waiting);
    phase.waiting.clear();
}

void cluster_wait() {
    if (machine.phase.completed >= machine.threads[machine.thread()].cluster_arrivals) return;
    machine.phase.waiting.push_back(machine.thread());
    machine.fibers.block("cluster_wait");
}

void transfer_init(unsigned barrier) {
    const unsigned char zeros[8] = {};
    write_shared(barrier, zeros, sizeof zeros);
    machine.transfers[{machine.block(), barrier}] = Transfer{};
}

void transfer_expect(unsigned barrier, unsigned bytes) {
    Transfer& transfer = find_transfer(machine.block(), barrier);
    if (transfer.expected) fail("a transfer is expected twice");
    transfer.expected = true;
    transfer.missing += bytes;
    wake_if_done(transfer);
}

void transfer_store(unsigned address, unsigned barrier, unsigned rank, const void* source) {
    if (rank >= machine.options->cluster) fail("block %u of a cluster of %u", rank, machine.options->cluster);
    Transfer& transfer = find_transfer(int(rank), barrier);
    machine.shared.write(int(rank), address - SHARED_BASE, source, 16, machine.actor());
    machine.shared.release(machine.warp(), transfer.clocks);
    transfer.missing -= 16;
    if (transfer.expected && transfer.missing < 0) fail("more bytes were sent to block %u than it expects", rank);
    wake_if_done(transfer);
}

void transfer_wait(unsigned barrier) {
    if (machine.threads[machine.thread()].waits++ == machine.options->skip_wait) return;
    Transfer& transfer = find_transfer(machine.block(), barrier);
    if (!transfer.done()) {
        transfer.waiting.push_back(machine.thread());
        machine.fibers.block("transfer_wait");
    }
    machine.shared.acquire(machine.warp(), transfer.clocks);
}

unsigned cluster_rank() { return unsigned(machine.block()); }

}  // namespace emulation

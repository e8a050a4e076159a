// The emulated machine: blocks of fibers, warp collectives, barriers, asynchronous copies, and the launch.
// Blocks run one cluster after the other, so global memory has one writer at a time; built once for all kernels.
#include "machine.hpp"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <unordered_map>
#include <utility>

#include "fibers.hpp"
#include "formats.hpp"
#include "launch.hpp"
#include "shared_memory.hpp"

namespace emulation {

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

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
} machine;

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

// Meets the other lanes of the warp; the last to come runs finish(warp) for all.
template <typename Finish> void meet_warp(const char* operation, int detail, void* slot, Finish finish) {
    Warp& warp = machine.warps[machine.warp()];
    if (warp.arrived != 0 && (warp.operation != operation || warp.detail != detail))
        fail("lanes of one warp diverge: one is at %s, another at %s", warp.operation, operation);
    warp.operation = operation;
    warp.detail = detail;
    warp.slots[machine.lane()] = slot;
    if (++warp.arrived < LANES) return machine.fibers.block(operation);
    warp.arrived = 0;
    finish(warp);
    const int first = machine.warp() * LANES;
    for (int lane = 0; lane < LANES; ++lane) machine.fibers.wake(first + lane);
}

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

void check_global(const void* address, unsigned bytes, bool write) {
    const char* at = static_cast<const char*>(address);
    if (reinterpret_cast<std::uintptr_t>(at) % bytes != 0)
        fail("global %s of %u bytes at %p is misaligned", write ? "write" : "read", bytes, address);
    if (machine.options->num_buffers == 0) return;
    for (int i = 0; i < machine.options->num_buffers; ++i) {
        const Buffer& buffer = machine.options->buffers[i];
        const char* start = static_cast<const char*>(buffer.start);
        if (at < start || at + bytes > start + buffer.bytes) continue;
        if (write && !buffer.writable) fail("global write into an input (buffer %d, byte %zd)", i, at - start);
        return;
    }
    fail("global %s of %u bytes lies outside every buffer", write ? "write" : "read", bytes);
}

float element(std::uint32_t pair, int index, bool bf16) {
    const std::uint16_t bits = std::uint16_t(index == 0 ? pair : pair >> 16);
    return bf16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

struct MmaSlot {
    float* d;
    const unsigned *a, *b;
};

// d (16 x 8) += a (16 x depth) b (depth x 8), gathered from the lanes' fragments.
void multiply(Warp& warp, int depth, bool bf16) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < LANES; ++lane) {
        const MmaSlot& slot = *static_cast<MmaSlot*>(warp.slots[lane]);
        const int row = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            for (int k8 = 0; k8 < depth / 8; ++k8) {
                a[row][8 * k8 + pair + i] = element(slot.a[2 * k8], i, bf16);
                a[row + 8][8 * k8 + pair + i] = element(slot.a[2 * k8 + 1], i, bf16);
                b[8 * k8 + pair + i][row] = element(slot.b[k8], i, bf16);
            }
            d[row][pair + i] = slot.d[i];
            d[row + 8][pair + i] = slot.d[2 + i];
        }
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < depth; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < LANES; ++lane) {
        const MmaSlot& slot = *static_cast<MmaSlot*>(warp.slots[lane]);
        const int row = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            slot.d[i] = d[row][pair + i];
            slot.d[2 + i] = d[row + 8][pair + i];
        }
    }
}

struct MatrixSlot {
    unsigned* registers;
    unsigned address;
};

void distribute(Warp& warp, int matrices, bool transposed) {
    std::uint16_t rows[4][8][8];
    for (int i = 0; i < matrices * 8; ++i) {
        const unsigned address = static_cast<MatrixSlot*>(warp.slots[i])->address;
        machine.shared.read(machine.block(), address - SHARED_BASE, rows[i / 8][i % 8], 16, {machine.warp(), NO_LANE});
    }
    for (int lane = 0; lane < LANES; ++lane) {
        const int row = lane / 4, column = lane % 4 * 2;
        for (int m = 0; m < matrices; ++m) {
            const unsigned low = transposed ? rows[m][column][row] : rows[m][row][column];
            const unsigned high = transposed ? rows[m][column + 1][row] : rows[m][row][column + 1];
            static_cast<MatrixSlot*>(warp.slots[lane])->registers[m] = low | high << 16;
        }
    }
}

struct ProductSlot {
    float* d;
    const unsigned* a;
    unsigned long descriptor;
};

// Byte address of element (n, k) of a right operand: address bits 4 to 6 are exclusive-ored with bits 7 to 9.
unsigned operand_address(unsigned long descriptor, int n, int k) {
    if (descriptor >> 62 != 1) fail("a matrix descriptor without the 128-byte swizzle");
    const unsigned start = unsigned(descriptor & 0x3fff) << 4, stride = unsigned(descriptor >> 32 & 0x3fff) << 4;
    const unsigned plain = start + unsigned(n / 8) * stride + unsigned(n % 8) * 128 + unsigned(k) * 2;
    return plain ^ (plain >> 3 & 0x70);
}

void multiply_rows(Warp& warp, int rows, bool accumulate, bool bf16) {
    const ProductSlot& first = *static_cast<ProductSlot*>(warp.slots[0]);
    float a[16][16];
    for (int lane = 0; lane < LANES; ++lane) {
        const ProductSlot& slot = *static_cast<ProductSlot*>(warp.slots[lane]);
        if (slot.descriptor != first.descriptor) fail("lanes of one warp pass different matrix descriptors");
        for (int word = 0; word < 4; ++word)
            for (int e = 0; e < 2; ++e)
                a[lane / 4 + word % 2 * 8][lane % 4 * 2 + word / 2 * 8 + e] = element(slot.a[word], e, bf16);
    }
    for (int n = 0; n < rows; ++n) {
        std::uint16_t bits[16];
        for (int k = 0; k < 16; k += 8)
            machine.shared.read(machine.block(), operand_address(first.descriptor, n, k) - SHARED_BASE, bits + k, 16,
                                {machine.warp(), NO_LANE});
        float b[16];
        for (int k = 0; k < 16; ++k) b[k] = bf16 ? bf16_to_float(bits[k]) : fp16_to_float(bits[k]);
        for (int m = 0; m < 16; ++m) {
            const int lane = m % 8 * 4 + n % 8 / 2;
            float& d = static_cast<ProductSlot*>(warp.slots[lane])->d[n / 8 * 4 + m / 8 * 2 + n % 2];
            float sum = accumulate ? d : 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k];
            d = sum;
        }
    }
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

void read_shared(unsigned address, void* destination, unsigned bytes) {
    machine.shared.read(machine.block(), address - SHARED_BASE, destination, bytes, machine.actor());
}

void write_shared(unsigned address, const void* source, unsigned bytes) {
    machine.shared.write(machine.block(), address - SHARED_BASE, source, bytes, machine.actor());
}

void write_shared_of(unsigned address, unsigned rank, const void* source, unsigned bytes) {
    if (rank >= machine.options->cluster) fail("block %u of a cluster of %u", rank, machine.options->cluster);
    machine.shared.write(int(rank), address - SHARED_BASE, source, bytes, machine.actor());
}

void read_shared_of(unsigned address, unsigned rank, void* destination, unsigned bytes) {
    if (rank >= machine.options->cluster) fail("block %u of a cluster of %u", rank, machine.options->cluster);
    machine.shared.read(int(rank), address - SHARED_BASE, destination, bytes, machine.actor());
}

unsigned add_shared(unsigned address, unsigned value) {
    return machine.shared.add(machine.block(), address - SHARED_BASE, value, machine.actor());
}

void read_global(const void* address, void* destination, unsigned bytes) {
    check_global(address, bytes, false);
    std::memcpy(destination, address, bytes);
}

void write_global(void* address, const void* source, unsigned bytes) {
    check_global(address, bytes, true);
    std::memcpy(address, source, bytes);
}

void copy_async(unsigned shared_address, const void* source, bool valid) {
    if (valid) check_global(source, 16, false);
    const unsigned offset = shared_address - SHARED_BASE;
    machine.shared.issue_copy(machine.block(), offset, machine.actor());
    machine.threads[machine.thread()].open.push_back({offset, valid ? source : nullptr});
}

void copy_async_commit() {
    Thread& thread = machine.threads[machine.thread()];
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

void copy_async_wait(int pending_groups) {
    static const unsigned char zeros[16] = {};
    Thread& thread = machine.threads[machine.thread()];
    if (thread.waits++ == machine.options->skip_wait) return;
    while (int(thread.groups.size()) > pending_groups) {
        for (const Copy& copy : thread.groups.front())
            machine.shared.land_copy(machine.block(), copy.offset, copy.source ? copy.source : zeros, machine.actor());
        thread.groups.pop_front();
    }
}

void sync_warp() {
    if (machine.threads[machine.thread()].warp_barriers++ == machine.options->skip_warp_barrier) return;
    meet_warp("sync_warp", 0, nullptr, [](Warp&) { machine.shared.sync_warp(machine.warp()); });
}

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

static Transfer& find_transfer(int block, unsigned barrier) {
    const auto found = machine.transfers.find({block, barrier});
    if (found == machine.transfers.end())
        fail("a transfer to block %d of the cluster, whose barrier is not ready", block);
    return found->second;
}

static void wake_if_done(Transfer& transfer) {
    if (!transfer.done()) return;
    for (int waiting : transfer.waiting) machine.fibers.wake(waiting);
    transfer.waiting.clear();
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

void yield() { machine.fibers.yield(); }
void signal(unsigned long long key) { machine.shared.release(machine.warp(), machine.signals[key]); }
void forgive_races() { machine.shared.forgive(); }
void observe(unsigned long long key) {
    const auto found = machine.signals.find(key);
    if (found != machine.signals.end()) machine.shared.acquire(machine.warp(), found->second);
}

unsigned shuffle(unsigned value, int source_lane) {
    struct Slot {
        unsigned value;
        int source;
        unsigned result;
    } slot{value, source_lane, 0};
    meet_warp("shuffle", 0, &slot, [](Warp& warp) {
        for (void* taker : warp.slots) {
            Slot& mine = *static_cast<Slot*>(taker);
            mine.result = static_cast<Slot*>(warp.slots[mine.source])->value;
        }
    });
    return slot.result;
}

unsigned ballot(bool predicate) {
    unsigned slot = predicate;
    meet_warp("ballot", 0, &slot, [](Warp& warp) {
        unsigned votes = 0;
        for (int lane = 0; lane < LANES; ++lane) votes |= *static_cast<unsigned*>(warp.slots[lane]) << lane;
        for (void* voter : warp.slots) *static_cast<unsigned*>(voter) = votes;
    });
    return slot;
}

void load_matrix(unsigned* registers, int matrices, bool transposed, unsigned address) {
    MatrixSlot slot{registers, address};
    meet_warp("load_matrix", matrices * 2 + transposed, &slot,
              [=](Warp& warp) { distribute(warp, matrices, transposed); });
}

void warpgroup_product(float* d, const unsigned* a, unsigned long descriptor, int rows, bool accumulate, bool bf16) {
    ProductSlot slot{d, a, descriptor};
    meet_warp("warpgroup_product", rows, &slot, [=](Warp& warp) { multiply_rows(warp, rows, accumulate, bf16); });
}

void store_matrix_trans(unsigned address, const unsigned* words) {
    struct Slot {
        unsigned address;
        const unsigned* words;
    } slot{address, words};
    meet_warp("store_matrix_trans", 0, &slot, [](Warp& warp) {
        for (int lane = 0; lane < LANES; ++lane) {  // the address of column lane % 8 of matrix lane / 8
            std::uint16_t column[8];
            for (int row = 0; row < 8; ++row) {
                const Slot& holder = *static_cast<Slot*>(warp.slots[row * 4 + lane % 8 / 2]);
                column[row] = std::uint16_t(holder.words[lane / 8] >> lane % 2 * 16);
            }
            const unsigned to = static_cast<Slot*>(warp.slots[lane])->address;
            machine.shared.write(machine.block(), to - SHARED_BASE, column, 16, {machine.warp(), NO_LANE});
        }
    });
}

void mma(float* d, const unsigned* a, const unsigned* b, int depth, bool bf16) {
    MmaSlot slot{d, a, b};
    meet_warp("mma", depth, &slot, [=](Warp& warp) { multiply(warp, depth, bf16); });
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

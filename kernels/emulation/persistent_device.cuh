// persistent_device.cuh for the host. The emulated machine runs the blocks of a grid together when they are launched as one
// cluster; a shared address of another block carries that block's number, and clusters are RANKS neighbouring blocks.
//
// Barriers are counted here, and each phase passes the order of accesses on, so that the machine's search for races covers
// them: what is sent is ordered before what waits for it, and nothing else is.
#ifndef SOPRANO_PERSISTENT_DEVICE_CUH
#define SOPRANO_PERSISTENT_DEVICE_CUH

#include <algorithm>
#include <map>

#include "emulation/device.cuh"

#define DEVICE_CALL __attribute__((noinline))

using std::max;
using std::min;
typedef unsigned long long Word;

constexpr unsigned BLOCK_SHIFT = 20;  // shared addresses are below 1 MB

struct EmulatedBarrier {
    int arrivals = 0, pending = 0;
    long long bytes = 0;
    unsigned phases = 0;  // that have ended
};

inline std::map<unsigned long long, EmulatedBarrier> emulated_barriers;
inline std::map<unsigned long long, Word> emulated_flags;
inline long long emulated_clock = 0;

inline unsigned long long emulated_key(unsigned address) {
    const unsigned block = address >> BLOCK_SHIFT;
    return static_cast<unsigned long long>(block == 0 ? blockIdx.x : block - 1) << 24 |
           (address & ((1u << BLOCK_SHIFT) - 1));
}
inline unsigned long long emulated_phase(unsigned long long key, unsigned phase) {
    return key << 24 | (phase & 0xffffffu);
}

inline void emulated_count(unsigned address, int arrivals, long long bytes) {
    const unsigned long long key = emulated_key(address);
    EmulatedBarrier& barrier = emulated_barriers[key];
    barrier.pending -= arrivals;
    barrier.bytes += bytes;
    emulation::signal(emulated_phase(key, barrier.phases));
    if (barrier.pending < 0) emulation::fail("more arrivals at a barrier than it takes");
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phases;
}

inline void barrier_init(unsigned address, int arrivals) {
    emulated_barriers[emulated_key(address)] = {arrivals, arrivals, 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(unsigned address) { emulated_count(address, 1, 0); }
inline void barrier_expect(unsigned address, unsigned bytes) { emulated_count(address, 1, bytes); }
inline bool barrier_done(unsigned address, unsigned parity) {
    const unsigned long long key = emulated_key(address);
    const EmulatedBarrier& barrier = emulated_barriers[key];
    if (((barrier.phases - 1) & 1u) != parity) return false;
    if (barrier.phases > 0) emulation::observe(emulated_phase(key, barrier.phases - 1));
    return true;
}

inline void fence_copies() {}
inline void prefetch_bulk(const void*, unsigned) {}
inline void copy_bulk(unsigned shared_address, const void* source, unsigned bytes, unsigned barrier) {
    for (unsigned i = 0; i < bytes; i += 16) {
        const uint4 piece = load_global<uint4>(static_cast<const char*>(source) + i);
        store_shared<uint4>(shared_address + i, piece);
    }
    emulated_count(barrier, 0, -static_cast<long long>(bytes));
}

inline unsigned address_in(unsigned address, unsigned rank) {
    return address + ((blockIdx.x / RANKS * RANKS + rank + 1) << BLOCK_SHIFT);
}
template <typename T> void emulated_send(unsigned address, T v, unsigned barrier) {
    const unsigned block = (address >> BLOCK_SHIFT) - 1;
    emulation::write_shared_of(address & ((1u << BLOCK_SHIFT) - 1), block, &v, sizeof v);
    emulated_count(barrier, 0, -static_cast<long long>(sizeof v));
}
inline void send_16(unsigned address, uint4 v, unsigned barrier) { emulated_send(address, v, barrier); }
inline void send_4(unsigned address, unsigned v, unsigned barrier) { emulated_send(address, v, barrier); }

inline Word make_word(unsigned value, unsigned number) { return static_cast<Word>(number) << 32 | value; }
inline unsigned word_value(Word word) { return static_cast<unsigned>(word); }
inline unsigned word_number(Word word) { return static_cast<unsigned>(word >> 32); }
// A word orders nothing but itself on a GPU, and yet who has seen one knows that its writer's loads before it are done.
inline void store_word(Word* address, Word word) {
    store_global<Word>(address, word);
    emulation::signal(reinterpret_cast<unsigned long long>(address));
}
inline Word load_word(const Word* address) {
    emulation::observe(reinterpret_cast<unsigned long long>(address));
    return load_global<Word>(address);
}
inline void store_words(Word* address, Word first, Word second) {
    store_word(address, first), store_word(address + 1, second);
}
inline void load_words(const Word* address, Word& first, Word& second) {
    first = load_word(address), second = load_word(address + 1);
}
inline unsigned load_flag(const unsigned* address) { return load_global<unsigned>(address); }
inline void store_flag(unsigned* address, unsigned value) { store_global<unsigned>(address, value); }

// A counter that orders what was read before it; kept beside the shared memory, as accesses to it are no race.
inline void store_release(unsigned address, unsigned value) {
    emulated_flags[emulated_key(address)] = value;
    emulation::signal(emulated_phase(emulated_key(address), 0));
}
inline unsigned load_acquire(unsigned address) {
    emulation::observe(emulated_phase(emulated_key(address), 0));
    return static_cast<unsigned>(emulated_flags[emulated_key(address)]);
}

inline void store_flag_shared(unsigned address, unsigned value) { store_release(address, value); }
inline unsigned load_flag_shared(unsigned address) { return load_acquire(address); }

inline bool all_lanes(bool predicate) { return emulation::ballot(predicate) == 0xffffffffu; }
inline int bits_set(unsigned mask) { return __builtin_popcount(mask); }
inline void launch_given_up() { emulation::forgive_races(); }
inline void forget(unsigned&) {}
inline void forget(int&) {}
inline long long clock_cycles() { return emulated_clock; }
inline void pause() {
    ++emulated_clock;
    emulation::yield();
}

#endif

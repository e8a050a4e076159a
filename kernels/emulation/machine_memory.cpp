// The emulated machine's memory: shared and global accesses, and the asynchronous copies between the two.
#include "machine.hpp"

#include <cstdint>
#include <cstring>
#include <utility>

#include "machine_state.hpp"

namespace emulation {

namespace {

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

}  // namespace

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

}  // namespace emulation

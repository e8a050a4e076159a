// The emulated machine's warps: what 32 lanes do together, from votes to matrix products.
#include "machine.hpp"

#include <cstdint>

#include "formats.hpp"
#include "machine_state.hpp"

namespace emulation {

namespace {

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

}  // namespace

void sync_warp() {
    if (machine.threads[machine.thread()].warp_barriers++ == machine.options->skip_warp_barrier) return;
    meet_warp("sync_warp", 0, nullptr, [](Warp&) { machine.shared.sync_warp(machine.warp()); });
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

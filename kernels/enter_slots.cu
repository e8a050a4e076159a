// What the host has staged for sequences that enter a crowd, to their slots: the record and the mask of seen tokens.
//
// Compile-time: DTYPE_*, for device.cuh alone. Launch (soprano_cupy/gpu/crowd_upload.py): one thread block for each
// entry; any multiple of 32 threads.
#include "device.cuh"

struct EnterParams {
    const unsigned* staged_slots;  // (entries, record_words)
    const unsigned* staged_seen;   // (entries, mask_words)
    const int* entry_slots;        // (entries,) where each goes; -1: nowhere
    unsigned* slots;               // (slots, record_words)
    unsigned* seen;                // (slots, mask_words)
    int entries, record_words, mask_words, reserved;
};

DEVICE void copy_words(unsigned* target, const unsigned* source, int words) {
    for (int i = threadIdx.x; i < words; i += blockDim.x) {
        store_global<unsigned>(target + i, load_global_fresh<unsigned>(source + i));
    }
}

extern "C" __global__ void __launch_bounds__(256) enter_slots(const __grid_constant__ EnterParams params) {
    grid_dependency_launch();
    grid_dependency_wait();
    const long long entry = blockIdx.x;
    if (entry >= params.entries) return;
    const long long slot = load_global_fresh<int>(params.entry_slots + entry);
    if (slot < 0) return;
    copy_words(params.slots + slot * params.record_words, params.staged_slots + entry * params.record_words,
               params.record_words);
    copy_words(params.seen + slot * params.mask_words, params.staged_seen + entry * params.mask_words,
               params.mask_words);
}

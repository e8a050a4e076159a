// An all-gather alone: in each round every block makes its part of COUNT floats from all of the round before.
//
// WORD_BYTES 8 or 16: bytes of a store, each 4 bytes of data with the number of the round. HELD: loads that a thread keeps
// under way for one word.
#include "persistent_watch.cuh"

constexpr int THREADS = 256;

struct WordsParams {
    Word* words;      // (2, COUNT) zeroed
    unsigned* error;  // zeroed
    float* output;    // (BLOCKS, COUNT)
    long long rounds;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) words(const __grid_constant__ WordsParams p) {
    const unsigned base = shared_base();
    const unsigned dead = base + COUNT * 4;
    const Watch watch{p.error, dead};
    const int begin = COUNT * blockIdx.x / BLOCKS, end = COUNT * (blockIdx.x + 1) / BLOCKS;
    constexpr int PER = WORD_BYTES / 8;
    constexpr int MOST = (COUNT / PER + THREADS - 1) / THREADS;
    if (threadIdx.x == 0) store_shared<unsigned>(dead, 0u);
    for (int i = threadIdx.x; i < COUNT; i += THREADS) store_shared<float>(base + i * 4, static_cast<float>(i % 8));
    sync_block();
#pragma unroll 1
    for (int round = 1; round <= p.rounds; ++round) {
        Word* to = p.words + (round & 1) * COUNT;
        const unsigned number = round;
        for (int i = begin / PER * PER + threadIdx.x * PER; i < end; i += THREADS * PER) {
            const float value = load_shared<float>(base + i * 4) + 1.0f;
            if (PER == 1) {
                store_word(to + i, make_word(float_to_bits(value), number));
            } else {
                const float next = load_shared<float>(base + i * 4 + 4) + 1.0f;
                store_words(to + i, make_word(float_to_bits(value), number), make_word(float_to_bits(next), number));
            }
        }
        Word heard[MOST][2];
        spin_until(watch, 1, [&] {
            bool all = true;
#pragma unroll
            for (int n = 0; n < MOST; ++n) {
                const int i = (threadIdx.x + n * THREADS) * PER;
                if (i >= COUNT) continue;
                if (PER == 1) {
                    heard[n][0] = heard[n][1] = load_word(to + i);
                } else {
                    load_words(to + i, heard[n][0], heard[n][1]);
                }
            }
#pragma unroll
            for (int n = 0; n < MOST; ++n) {
                const int i = (threadIdx.x + n * THREADS) * PER;
                if (i < COUNT) all = all && word_number(heard[n][0]) == number && word_number(heard[n][1]) == number;
            }
            return all;
        });
        sync_block();
#pragma unroll
        for (int n = 0; n < MOST; ++n) {
            const int i = (threadIdx.x + n * THREADS) * PER;
            if (i >= COUNT) continue;
            store_shared<unsigned>(base + i * 4, word_value(heard[n][0]));
            if (PER == 2) store_shared<unsigned>(base + i * 4 + 4, word_value(heard[n][1]));
        }
        sync_block();
        if (watch.is_dead()) break;
    }
    for (int i = threadIdx.x; i < COUNT; i += THREADS)
        store_global<float>(p.output + blockIdx.x * COUNT + i, load_shared<float>(base + i * 4));
}

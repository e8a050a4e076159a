// Exchanges between RANKS blocks through global memory, in place of persistent_cluster.cuh.
//
// WORD_BYTES 8 or 16: every four bytes of data travel with the number of their exchange, one or two such pairs to a store;
// every block waits for the words and copies them into its shared memory. WORD_BYTES 0: plain stores and a barrier of the
// grid, an atomic counter.
#pragma once

#include "persistent_watch.cuh"
#include "persistent_sizes.cuh"

static_assert(CLUSTERS == 1 && VOICES == 1, "one group of blocks, one voice");
constexpr int RECEIVERS = 1;  // one store serves all

constexpr int words_before(int exchange) {
    int words = 0;
    for (int i = 0; i < exchange; ++i) words += aligned_16(exchange_bytes(i)) / 4;
    return words;
}
constexpr int ALL_WORDS = words_before(EXCHANGES);

struct Exchange {
    unsigned base;
    Watch watch;
    Word* words;        // (ALL_WORDS,) zeroed before the launch; of the barrier's counter one more
    unsigned uses = 0;  // of the exchanges of this layer: the same for all of them but while one is under way
    unsigned counts[EXCHANGES] = {};

    DEVICE void begin() {}

    template <int EXCHANGE> DEVICE void send(unsigned at, int, uint4 v) const {
        constexpr int BEFORE = words_before(EXCHANGE);
        Word* to = words + BEFORE + at / 4;
#if WORD_BYTES > 0
        const unsigned number = counts[EXCHANGE] + 1;
#endif
#if WORD_BYTES == 16
        store_words(to, make_word(v.x, number), make_word(v.y, number));
        store_words(to + 2, make_word(v.z, number), make_word(v.w, number));
#elif WORD_BYTES == 8
        store_word(to, make_word(v.x, number));
        store_word(to + 1, make_word(v.y, number));
        store_word(to + 2, make_word(v.z, number));
        store_word(to + 3, make_word(v.w, number));
#else
        *reinterpret_cast<uint4*>(reinterpret_cast<unsigned*>(words) + BEFORE + at / 4) = v;
#endif
    }
    template <int EXCHANGE> DEVICE void send(unsigned at, int, float v) const {
        constexpr int BEFORE = words_before(EXCHANGE);
#if WORD_BYTES > 0
        store_word(words + BEFORE + at / 4, make_word(float_to_bits(v), counts[EXCHANGE] + 1));
#else
        reinterpret_cast<float*>(words)[BEFORE + at / 4] = v;
#endif
    }

    // The sums of squares come with their rows.
    template <int EXCHANGE> DEVICE void await() {
        if constexpr (EXCHANGE == EX_HIDDEN)
            receive<EX_HIDDEN, EX_SUMS, exchange_bytes(EX_HIDDEN) / 4, exchange_bytes(EX_SUMS) / 4>();
        if constexpr (EXCHANGE == EX_AFTER)
            receive<EX_AFTER, EX_SUMS_AFTER, exchange_bytes(EX_AFTER) / 4, exchange_bytes(EX_SUMS_AFTER) / 4>();
        if constexpr (EXCHANGE == EX_QKV) receive<EX_QKV, EX_QKV, exchange_bytes(EX_QKV) / 4, 0>();
        if constexpr (EXCHANGE == EX_ATTENDED) receive<EX_ATTENDED, EX_ATTENDED, exchange_bytes(EX_ATTENDED) / 4, 0>();
        if constexpr (EXCHANGE == EX_GATED) receive<EX_GATED, EX_GATED, exchange_bytes(EX_GATED) / 4, 0>();
    }

    template <int first, int second, int FIRST, int SECOND> DEVICE void receive() {
        const unsigned number = ++counts[first];
        if (SECOND > 0) counts[second] = number;
        constexpr int a = words_before(first), b = words_before(second);
        constexpr unsigned first_at = exchange_at(first), second_at = exchange_at(second);
#if WORD_BYTES == 0
        ++uses;
        sync_named(1, TEAM);
        if (warp_index() == 0) {
            unsigned* counter = reinterpret_cast<unsigned*>(words + ALL_WORDS);
            if (threadIdx.x == 0) {
                fence_device();
                atomicAdd(counter, 1u);
            }
            const unsigned target = uses * RANKS;
            spin_until(watch, 16 + first, [=] { return load_flag(counter) >= target; });
            fence_device();
        }
        sync_named(1, TEAM);
        const unsigned* plain = reinterpret_cast<const unsigned*>(words);
        for (int i = threadIdx.x * 4; i < FIRST; i += TEAM * 4)
            store_shared<uint4>(base + first_at + i * 4, load_global_fresh<uint4>(plain + a + i));
        for (int i = threadIdx.x * 4; i < SECOND; i += TEAM * 4)
            store_shared<uint4>(base + second_at + i * 4, load_global_fresh<uint4>(plain + b + i));
#elif WORD_BYTES == 8
        constexpr int MOST = (FIRST + SECOND + TEAM - 1) / TEAM;
        Word heard[MOST];
        const Word* from = words;
        spin_until(watch, 16 + first, [&] {
            bool all = true;
#pragma unroll
            for (int n = 0; n < MOST; ++n) {
                const int i = threadIdx.x + n * TEAM;
                if (i < FIRST + SECOND) heard[n] = load_word(from + (i < FIRST ? a + i : b + i - FIRST));
            }
#pragma unroll
            for (int n = 0; n < MOST; ++n) {
                const int i = threadIdx.x + n * TEAM;
                if (i < FIRST + SECOND) all = all && word_number(heard[n]) == number;
            }
            return all;
        });
#pragma unroll
        for (int n = 0; n < MOST; ++n) {
            const int i = threadIdx.x + n * TEAM;
            if (i < FIRST + SECOND)
                store_shared<unsigned>(base + (i < FIRST ? first_at + i * 4 : second_at + (i - FIRST) * 4),
                                       word_value(heard[n]));
        }
#else
        constexpr int PAIRS = (FIRST + SECOND) / 2, MOST = (PAIRS + TEAM - 1) / TEAM;
        Word heard[MOST][2];
        const Word* from = words;
        spin_until(watch, 16 + first, [&] {
            bool all = true;
#pragma unroll
            for (int n = 0; n < MOST; ++n) {
                const int i = 2 * (threadIdx.x + n * TEAM);
                if (i < 2 * PAIRS) load_words(from + (i < FIRST ? a + i : b + i - FIRST), heard[n][0], heard[n][1]);
            }
#pragma unroll
            for (int n = 0; n < MOST; ++n) {
                const int i = 2 * (threadIdx.x + n * TEAM);
                if (i < 2 * PAIRS)
                    all = all && word_number(heard[n][0]) == number && word_number(heard[n][1]) == number;
            }
            return all;
        });
#pragma unroll
        for (int n = 0; n < MOST; ++n) {
            const int i = 2 * (threadIdx.x + n * TEAM);
            if (i >= 2 * PAIRS) continue;
            const unsigned at = base + (i < FIRST ? first_at + i * 4 : second_at + (i - FIRST) * 4);
            store_shared<unsigned>(at, word_value(heard[n][0]));
            store_shared<unsigned>(at + 4, word_value(heard[n][1]));
        }
#endif
        sync_named(1, TEAM);
    }
    template <int EXCHANGE> DEVICE unsigned at() const {
        constexpr unsigned BUFFER = exchange_at(EXCHANGE);
        return base + BUFFER;
    }
};

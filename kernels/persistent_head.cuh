// From the residual stream behind the last layer to the scores of all tokens, by every block; and from the token that the
// first block has chosen to the input of the next one's layers.
#pragma once

#include "persistent_layer.cuh"
#include "sample_slot.cuh"

static_assert(VOICES == 1, "one voice so far");
static_assert(HELD && THREADS == TEAM, "the vocabulary fits shared memory, and the threads that compute search it");

// What generating one sequence needs besides its layers.
struct PersistentParams {
    LayerParams layer;
    const void* embeddings;        // (VOCAB, HIDDEN) Element
    SlotState* slot;               // at least one token has been drawn, and the newest one's place in the cache is free
    unsigned* seen;                // (SEEN_WORDS,)
    int* tokens;                   // (most_tokens,)
    float* states;                 // (most_tokens, HIDDEN)
    unsigned long long* progress;  // a word of mapped host memory: see sample.cu
    const unsigned* cancel;        // a word of mapped host memory: not 0 ends the launch at the next token; or null
    unsigned long long* report;    // a word of mapped host memory: 1 + the error at the end of the launch; or null
    // The decode step's row: read at the beginning, written at the end for what goes on with it.
    float* residual;
    void* hidden;
    float* square_sums;
    int* slot_of_row;
    int slot_index;   // what *slot_of_row becomes while the sequence runs; else -1
    int most_tokens;  // room of the slot
    int budget;       // tokens of this launch, at least 1
    int positions;    // rows of the table of angles
    int end_token, loop_length;
    float loop_distance;
    int stall_at;  // for tests of the watchdog: at the so-manieth token the last block is not heard; 0: never
};

// ---- words in global memory between blocks, behind those of the residual stream; all zero before the launch ----

constexpr int SUM_WORDS = CLUSTERS > 1 ? 2 * CLUSTERS * HIDDEN : 0;
constexpr int OWNERS = (most_of_rank(HIDDEN_TILES) + 1) / 2;  // warps of a block that own rows of the residual stream
constexpr int DISTANCES = RANKS * OWNERS;
constexpr int KEY_WARPS = HEAD_MOST * TILE < TEAM ? (HEAD_MOST * TILE + 31) / 32 : TEAM_WARPS;
constexpr int KEYS = BLOCKS * KEY_WARPS;  // each two words: order of a warp's best score, its id
constexpr int TOKEN_WORD = (SUM_WORDS + 15) / 16 * 16;
constexpr int DISTANCE_WORDS = TOKEN_WORD + 16;
constexpr int KEY_WORDS = (DISTANCE_WORDS + DISTANCES + 15) / 16 * 16;
constexpr int SCORE_WORDS = (KEY_WORDS + 2 * KEYS + 15) / 16 * 16;

constexpr unsigned TOKEN_END = 1u << 31;      // no further token in this launch
constexpr unsigned TOKEN_RUNNING = 1u << 30;  // the sequence itself goes on
constexpr unsigned TOKEN_MASK = (1u << 24) - 1;

// ---- shared memory behind that of the layers ----

constexpr int HEAD_ROWS = HEAD_MOST * TILE;
constexpr unsigned TOKEN_AT = aligned_16(SHARED_END);            // the word that came, for the block
constexpr unsigned SEEN_AT = TOKEN_AT + 16;                      // a bit for each of this block's ids
constexpr unsigned SAMPLER_AT = aligned_16(SEEN_AT + (HEAD_ROWS + 31) / 32 * 4);

struct Voice {
    const PersistentParams& p;
    Worker& worker;
    bool greedy;
    float penalty;
    float last_state = 0.0f;  // of this lane's row, in the warps of the first cluster that own rows
    int count;                // tokens drawn so far

    DEVICE Voice(const PersistentParams& params, Worker& w) : p(params), worker(w) {
        const SlotState slot = SlotWords::load(p.slot).state();
        greedy = (slot.options & OPTION_GREEDY) != 0;
        penalty = slot.penalty;
        count = slot.count;
        worker.position = slot.position;
    }

    DEVICE Tiles tiles() const { return head_tiles(blockIdx.x); }
    DEVICE unsigned seen_word(int row) const { return worker.base + SEEN_AT + row / 32 * 4; }

    // The ids of this block that the sequence holds, and the newest token's row; a barrier of the block follows.
    DEVICE void begin() {
        const Tiles mine = tiles();
        for (int row = threadIdx.x; row < (HEAD_ROWS + 31) / 32 * 32; row += TEAM) {
            const int id = mine.begin * TILE + row;
            const bool exists = row < mine.count() * TILE && id < VOCAB;
            const bool is_seen = exists && (load_global_fresh<unsigned>(p.seen + id / 32) >> id % 32 & 1u) != 0;
            const unsigned bits = lanes_where(is_seen);
            if (lane_index() == 0) store_shared<unsigned>(seen_word(row), bits);
        }
        if (worker.owns_row()) {
            worker.residual = load_global_fresh<float>(p.residual + worker.row());
            if (count > 0 && count <= p.most_tokens)
                last_state = load_global_fresh<float>(p.states + static_cast<long long>(count - 1) * HIDDEN + worker.row());
        }
    }

    // Scores of this block's ids, on their way to the first block: all of them, or each warp's best.
    DEVICE void score(unsigned number) {
        if (static_cast<int>(number) == p.stall_at && blockIdx.x == BLOCKS - 1) number = 0u;
        Exchange& exchange = worker.exchange;
        const Tiles mine = tiles();
        exchange.await(EX_HIDDEN);
#pragma unroll 1
        for (int pass = 0; pass < HEAD_PASSES; ++pass) {
            const Tiles part = tiles_of_pass<HEAD_PASSES>(mine, pass);
            multiply<(HEAD_MOST + HEAD_PASSES - 1) / HEAD_PASSES, HIDDEN_STEPS>(
                worker.ring, part.count(), exchange.at(EX_HIDDEN), (part.begin - mine.begin) * TILE);
        }
        exchange.await(EX_SUMS);
        const float factor = norm_factor(exchange.at(EX_SUMS), 0, p.layer.epsilon);
        worker.sync();
        unsigned best = 0u, best_id = 0xffffffffu;
        for (int row = threadIdx.x; row < (HEAD_ROWS + 31) / 32 * 32; row += TEAM) {  // ids ascend
            const int id = mine.begin * TILE + row;
            if (row >= mine.count() * TILE || id >= VOCAB) continue;
            float value = row_sum(worker.base, 0, row) * factor;
            if (load_shared<unsigned>(seen_word(row)) >> row % 32 & 1u) value = value > 0.0f ? value / penalty : value * penalty;
            if (!greedy) store_word(p.layer.words + SCORE_WORDS + id, make_word(float_to_bits(value), number));
            const unsigned order = order_of(value);
            if (order > best) best = order, best_id = static_cast<unsigned>(id);
        }
        const unsigned best_of_warp = max_of_lanes(best);
        const unsigned id = min_of_lanes(best == best_of_warp ? best_id : 0xffffffffu);
        if (greedy && warp_index() < KEY_WARPS && lane_index() == 0) {
            const int key = blockIdx.x * KEY_WARPS + warp_index();
            store_words(p.layer.words + KEY_WORDS + 2 * key, make_word(best_of_warp, number), make_word(id, number));
        }
        // The token is likely one of the warps' best: have its row of the embeddings near.
        if (id < VOCAB && lane_index() < (HIDDEN + 63) / 64)
            prefetch_l2(static_cast<const Element*>(p.embeddings) + static_cast<long long>(id) * HIDDEN + lane_index() * 64);
        publish_state(number, factor);
    }

    // The state that makes the token, and how far it is from the one before.
    DEVICE void publish_state(unsigned number, float factor) {
        if (worker.cluster != 0 || !worker.owns()) return;
        float distance = 0.0f;
        if (worker.owns_row()) {
            const float gain = load_global<float>(worker.gain(2 * p.layer.layers));
            const float state = worker.residual * (factor * NORM_SCALE) * gain;
            if (count < p.most_tokens)
                store_global<float>(p.states + static_cast<long long>(count) * HIDDEN + worker.row(), state);
            distance = fabsf(state - last_state);
            last_state = state;
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) distance += shuffle_xor(distance, mask);
        sync_warp();
        if (lane_index() != 0) return;
        fence_device();  // whoever sees the word sees the warp's states
        store_word(p.layer.words + DISTANCE_WORDS + worker.rank * OWNERS + warp_index(),
                   make_word(float_to_bits(distance), number));
    }

    // Waits for the token, tells the block; the word with its flags.
    DEVICE unsigned receive(unsigned number) {
        const unsigned at = worker.base + TOKEN_AT;
        if (warp_index() == 0) {
            const Word* from = p.layer.words + TOKEN_WORD;
            Word word = 0;
            spin_until(worker.ring.watch, 3, [&] {
                word = load_word(from);
                return word_number(word) == number;
            }, blockIdx.x == 0 ? SPIN_LIMIT_CYCLES : PATIENT);
            const bool dead = worker.ring.watch.is_dead();
            if (lane_index() == 0) store_shared<unsigned>(at, dead ? TOKEN_END : word_value(word));
        }
        worker.sync();
        return load_shared<unsigned>(at);
    }

    // The residual stream of a new token, the seen ids with it.
    DEVICE void embed(unsigned token) {
        ++count;
        const int row = static_cast<int>(token) - tiles().begin * TILE;
        if (row >= 0 && row < tiles().count() * TILE && threadIdx.x == TEAM - 1)
            store_shared<unsigned>(seen_word(row), load_shared<unsigned>(seen_word(row)) | 1u << row % 32);
        if (!worker.owns_row()) return;
        const Element* from = static_cast<const Element*>(p.embeddings) + static_cast<long long>(token) * HIDDEN;
        worker.residual = to_float(load_global<Element>(from + worker.row()));
    }

    // Leaves the newest token's row for whoever goes on.
    DEVICE void leave_row() const {
        if (worker.cluster != 0 || !worker.owns()) return;
        float square = 0.0f;
        if (worker.owns_row()) {
            const float gain = load_global<float>(worker.gain(0));
            store_global<float>(p.residual + worker.row(), worker.residual);
            store_global<Element>(static_cast<Element*>(p.hidden) + worker.row(),
                                  from_float(worker.residual * gain * NORM_SCALE));
            square = worker.residual * worker.residual;
        }
#pragma unroll
        for (int mask = 1; mask < 16; mask *= 2) square += shuffle_xor(square, mask);
        if (worker.owns_row() && lane_index() % 16 == 0) store_global<float>(p.square_sums + worker.row() / 16, square);
    }
};

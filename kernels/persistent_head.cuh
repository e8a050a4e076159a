// From the residual stream behind the last layer to the scores of all tokens, by every block; and from the token that the
// first block has chosen to the input of the next one's layers.
#pragma once

#define SEARCH_TOGETHER 4
#include "persistent_layer.cuh"
#include "sample_slot.cuh"

static_assert(HELD && THREADS == TEAM, "the vocabulary fits shared memory, and the threads that compute search it");
static_assert(VOICES <= BLOCKS, "block v chooses the tokens of voice v");

// One sequence: where the graph path keeps it.
struct VoicePlaces {
    SlotState* slot;               // at least one token has been drawn, and the newest one's place in the cache is free
    unsigned* seen;                // (SEEN_WORDS,)
    int* tokens;                   // (most_tokens,)
    float* states;                 // (most_tokens, HIDDEN)
    unsigned long long* progress;  // a word of mapped host memory: see sample.cu
    // The decode step's row: read at the beginning, written at the end for what goes on with it.
    float* residual;
    void* hidden;
    float* square_sums;
    int* slot_of_row;
    int slot_index;  // what *slot_of_row becomes while the sequence runs; else -1
    int reserved;
};

// Whether a sequence goes on: what was drawn before the launch may have ended it.
DEVICE bool is_running(const VoicePlaces& place) {
    return load_global_fresh<int>(&place.slot->status) == STATUS_RUNNING;
}

// What generating sequences needs besides their layers.
struct PersistentParams {
    LayerParams layer;
    const void* embeddings;      // (VOCAB, HIDDEN) Element
    const unsigned* cancel;      // a word of mapped host memory: not 0 ends the launch at the next token; or null
    unsigned long long* report;  // a word of mapped host memory: 1 + the error at the end of the launch; or null
    int voices;                  // in use
    int most_tokens;             // room of a slot
    int budget;                  // tokens of this launch, at least 1
    int positions;               // rows of the table of angles
    int end_token, loop_length;
    float loop_distance;
    int stall_at;  // for tests of the watchdog: at the so-manieth token the last block is not heard; 0: never
    VoicePlaces places[VOICES];
};

// ---- words in global memory between blocks, behind those of the residual stream; all zero before the launch ----

constexpr int up_to_16(int words) { return (words + 15) / 16 * 16; }
constexpr int SUM_WORDS = CLUSTERS > 1 ? 2 * CLUSTERS * VOICES * HIDDEN : 0;
constexpr int OWNERS =
    (most_of_rank(HIDDEN_TILES) + 1) / 2;  // warps of a block that own rows of one voice's residual stream
constexpr int DISTANCES = RANKS * OWNERS;  // of a voice
constexpr int HEAD_ROWS = (HEAD_MOST * TILE + 31) / 32 * 32;  // of a block
constexpr int BLOCK_KEYS = HEAD_ROWS / 32;
constexpr int KEYS = BLOCKS * BLOCK_KEYS;  // of a voice, each two words: order of a warp's best score, its id
constexpr int TOKEN_WORDS = up_to_16(SUM_WORDS);
constexpr int DISTANCE_WORDS = TOKEN_WORDS + 16;
constexpr int WRITTEN_WORDS = up_to_16(DISTANCE_WORDS + VOICES * DISTANCES);  // of each rank of the first cluster
constexpr int KEY_WORDS = up_to_16(WRITTEN_WORDS + RANKS);
constexpr int SCORE_WORDS = up_to_16(KEY_WORDS + 2 * VOICES * KEYS);
constexpr int ALL_WORDS_OF_LAUNCH = SCORE_WORDS + VOICES * VOCAB;

constexpr unsigned TOKEN_END = 1u << 31;      // no further token in this launch
constexpr unsigned TOKEN_RUNNING = 1u << 30;  // the sequence itself goes on
constexpr unsigned TOKEN_MASK = (1u << 24) - 1;

// ---- shared memory behind that of the layers ----

constexpr unsigned TOKEN_AT = aligned_16(SHARED_END);             // the words that came, for the block
constexpr unsigned RULES_AT = TOKEN_AT + aligned_16(VOICES * 4);  // (penalty, greedy) of each voice
constexpr unsigned SEEN_AT = RULES_AT + aligned_16(VOICES * 8);   // a bit for each of this block's ids, for each voice
constexpr unsigned OWN_AT = aligned_16(SEEN_AT + VOICES * HEAD_ROWS / 8);  // two words of each thread that owns rows
constexpr unsigned STATED_AT =
    OWN_AT + OWNERS * VOICES * 32 * 8;  // the token for which each warp has written its states
constexpr unsigned SAMPLER_AT = aligned_16(STATED_AT + OWNERS * VOICES * 4);

// The voices as every block sees them.
struct Choir {
    const PersistentParams& p;
    Worker& worker;
    unsigned alive;  // bit v: voice v goes on

    DEVICE Choir(const PersistentParams& params, Worker& w) : p(params), worker(w), alive(0u) {
        for (int voice = 0; voice < params.voices; ++voice)
            if (is_running(params.places[voice])) alive |= 1u << voice;
    }

    DEVICE bool is_alive(int voice) const { return (alive >> voice & 1u) != 0; }
    DEVICE const VoicePlaces& own() const { return p.places[min(worker.own_voice(), VOICES - 1)]; }
    DEVICE bool owns_row() const { return worker.owns_row() && is_alive(worker.own_voice()); }
    DEVICE bool owns() const { return worker.owns() && is_alive(worker.own_voice()); }
    DEVICE Tiles tiles() const { return head_tiles(blockIdx.x); }
    DEVICE unsigned seen_word(int voice, int row) const {
        return worker.base + SEEN_AT + (voice * HEAD_ROWS + row) / 32 * 4;
    }

    // Kept in shared memory, since it is wanted once a token: the tokens of this thread's own voice drawn so far, and, in the
    // first cluster, the state of its own row that made the last one.
    DEVICE unsigned own_at() const { return worker.base + OWN_AT + threadIdx.x * 8; }
    DEVICE int count() const { return static_cast<int>(load_shared<unsigned>(own_at())); }
    DEVICE void set_count(int count) const { store_shared<unsigned>(own_at(), static_cast<unsigned>(count)); }
    DEVICE float last_state() const { return load_shared<float>(own_at() + 4); }
    DEVICE void set_last_state(float state) const { store_shared<float>(own_at() + 4, state); }

    // Records, and which ids of this block the sequences hold; a barrier of the block follows.
    DEVICE void begin() {
        const Tiles mine = tiles();
        for (int item = threadIdx.x; item < HEAD_ROWS * VOICES; item += TEAM) {
            const int voice = item / HEAD_ROWS, row = item % HEAD_ROWS, id = mine.begin * TILE + row;
            const bool exists = is_alive(voice) && row < mine.count() * TILE && id < VOCAB;
            const bool is_seen =
                exists && (load_global_fresh<unsigned>(p.places[voice].seen + id / 32) >> id % 32 & 1u) != 0;
            const unsigned bits = lanes_where(is_seen);
            if (lane_index() == 0) store_shared<unsigned>(seen_word(voice, row), bits);
        }
        const int voice = threadIdx.x;
        if (voice < p.voices) {
            const SlotState slot = SlotWords::load(p.places[voice].slot).state();
            store_shared<float>(worker.base + RULES_AT + voice * 8, slot.penalty);
            store_shared<unsigned>(worker.base + RULES_AT + voice * 8 + 4, slot.options & OPTION_GREEDY);
        }
        worker.position = -1;
        if (is_alive(worker.place.voice))
            worker.position = load_global_fresh<int>(&p.places[worker.place.voice].slot->position);
        if (!owns_row()) return;
        const int count = load_global_fresh<int>(&own().slot->count);
        set_count(count);
        set_last_state(0.0f);
        worker.residual = load_global_fresh<float>(own().residual + worker.row());
        if (count > 0 && count <= p.most_tokens)
            set_last_state(
                load_global_fresh<float>(own().states + static_cast<long long>(count - 1) * HIDDEN + worker.row()));
    }

    DEVICE bool greedy(int voice) const { return load_shared<unsigned>(worker.base + RULES_AT + voice * 8 + 4) != 0; }

    // The head's tiles that go through a room. left: of this block's, from this round's first on.
    template <int ROOM> DEVICE void multiply_in(int left, bool keep) {
        constexpr int BEFORE = head_before(ROOM);
        constexpr int MOST = HEAD_ROUNDS > 1 ? head_in(ROOM) : larger(0, head_in_one_round(ROOM));
        if constexpr (MOST > 0) {
            const int first = tiles().count() - left + BEFORE;
            multiply<ROOM, MOST, 0, HIDDEN_STEPS, IN_HEAD>(
                worker.rooms, min(max(left - BEFORE, 0), MOST), worker.exchange.template at<EX_HIDDEN>(), first * TILE,
                [] {}, keep);
        } else {
            worker.rooms.template await<ROOM>();
            worker.rooms.template leave<ROOM>(keep);
        }
    }

    // Scores of this block's ids, on their way to the blocks that choose: all of them, or the best of each 32.
    DEVICE void score(unsigned number) {
        if (static_cast<int>(number) == p.stall_at && blockIdx.x == BLOCKS - 1) number = 0u;
        Exchange& exchange = worker.exchange;
        const Tiles mine = tiles();
        WORKER_MARK(24);
        exchange.await<EX_HIDDEN>();
#pragma unroll 1
        for (int round = 0; round < HEAD_ROUNDS; ++round) {
            const int left = mine.count() - round * HEAD_TOGETHER;
            const bool keep = round == HEAD_ROUNDS - 1;  // until the token is known
            multiply_in<ROOM_QKV>(left, keep);
            multiply_in<ROOM_O>(left, keep);
            multiply_in<ROOM_GATED>(left, keep);
            multiply_in<ROOM_DOWN>(left, keep);
        }
        exchange.await<EX_SUMS>();
        worker.sync();
        WORKER_MARK(25);
#pragma unroll 1
        for (int item = threadIdx.x; item < HEAD_ROWS * VOICES; item += TEAM) {  // a warp's rows are one voice's
            const int voice = item / HEAD_ROWS, row = item % HEAD_ROWS;
            if (is_alive(voice)) score_row(number, voice, row, mine);
        }
        WORKER_MARK(26);
        publish_state(number);
        WORKER_MARK(27);
    }

    DEVICE void score_row(unsigned number, int voice, int row, Tiles mine) {
        const int id = mine.begin * TILE + row;
        const bool exists = row < mine.count() * TILE && id < VOCAB;
        float value = 0.0f;
        if (exists) {
            value =
                row_sum(worker.base, voice, row) * norm_factor(worker.exchange.at<EX_SUMS>(), voice, p.layer.epsilon);
            const float penalty = load_shared<float>(worker.base + RULES_AT + voice * 8);
            if (load_shared<unsigned>(seen_word(voice, row)) >> row % 32 & 1u)
                value = value > 0.0f ? value / penalty : value * penalty;
        }
        const unsigned order = exists ? order_of(value) : 0u;
        const unsigned best = max_of_lanes(order);
        const unsigned best_id = min_of_lanes(exists && order == best ? static_cast<unsigned>(id) : 0xffffffffu);
        if (!greedy(voice)) {
            if (exists)
                store_word(p.layer.words + SCORE_WORDS + voice * VOCAB + id, make_word(float_to_bits(value), number));
        } else if (lane_index() == 0) {
            const int key = (voice * BLOCKS + blockIdx.x) * BLOCK_KEYS + row / 32;
            store_words(p.layer.words + KEY_WORDS + 2 * key, make_word(best, number), make_word(best_id, number));
        }
        // The token is likely one of these: have its row of the embeddings near.
        if (best_id < VOCAB && lane_index() < (HIDDEN + 63) / 64)
            prefetch_l2(static_cast<const Element*>(p.embeddings) + static_cast<long long>(best_id) * HIDDEN +
                        lane_index() * 64);
    }

    // The state that makes the token, and how far it is from the one before. Whether the state can be seen is the scribe's.
    DEVICE void publish_state(unsigned number) {
        if (worker.cluster != 0 || !worker.owns()) return;
        if (owns()) {
            const float factor = norm_factor(worker.exchange.at<EX_SUMS>(), worker.own_voice(), p.layer.epsilon);
            float distance = 0.0f;
            if (owns_row()) {
                const float gain = load_global<float>(worker.gain(2 * p.layer.layers));
                const float state = worker.residual * (factor * NORM_SCALE) * gain;
                const int token = count();
                if (token < p.most_tokens)
                    store_global<float>(own().states + static_cast<long long>(token) * HIDDEN + worker.row(), state);
                distance = fabsf(state - last_state());
                set_last_state(state);
            }
#pragma unroll
            for (int mask = 16; mask > 0; mask /= 2) distance += shuffle_xor(distance, mask);
            const int part = worker.own_voice() * DISTANCES + worker.rank * OWNERS + worker.own_pair_of_tiles();
            if (lane_index() == 0)
                store_word(p.layer.words + DISTANCE_WORDS + part, make_word(float_to_bits(distance), number));
        }
        sync_warp();
        if (lane_index() == 0) store_release(worker.base + STATED_AT + warp_index() * 4, number);
    }

    // Weights of the next token may come.
    DEVICE void give_back() const {
        worker.rooms.give_back<ROOM_QKV>();
        worker.rooms.give_back<ROOM_O>();
        worker.rooms.give_back<ROOM_GATED>();
        worker.rooms.give_back<ROOM_DOWN>();
    }

    // By a warp of its own in the first cluster, since the fence takes a few microseconds: says that the states of the token can
    // be seen. False when the launch ends instead.
    DEVICE static bool scribe(const PersistentParams& p, const Worker& worker, unsigned number) {
        const int lane = lane_index();
        const bool mine = lane < Worker::UNITS && lane % Worker::OWN_PAIRS * 2 < worker.hidden.count();
        const unsigned stated = worker.base + STATED_AT + lane * 4, stop = worker.base + STOP_AT;
        const auto written = [=] { return !mine || static_cast<int>(load_acquire(stated) - number) >= 0; };
        spin_until(worker.rooms.watch, 23, [=] { return written() || load_flag_shared(stop) != 0; }, PATIENT);
        if (!all_lanes(written())) return false;
        fence_device();
        if (lane == 0) store_word(p.layer.words + WRITTEN_WORDS + worker.rank, make_word(0u, number));
        return true;
    }

    // Waits for the tokens of all voices that are alive, and goes on with them.
    DEVICE void receive(unsigned number) {
        const unsigned at = worker.base + TOKEN_AT + lane_index() * 4;
        if (warp_index() == 0) {
            const bool mine = lane_index() < VOICES && is_alive(lane_index());
            const Word* from = p.layer.words + TOKEN_WORDS + lane_index();
            Word word = 0;
            const auto ready = [&] {
                if (mine) word = load_word(from);
                return !mine || word_number(word) == number;
            };
            spin_until(worker.rooms.watch, 3, ready, blockIdx.x < VOICES ? SPIN_LIMIT_CYCLES : PATIENT);
            const bool dead = all_lanes(worker.rooms.watch.is_dead());
            if (lane_index() < VOICES) store_shared<unsigned>(at, dead || !mine ? TOKEN_END : word_value(word));
        }
        worker.sync();
        WORKER_MARK(29);
        for (int voice = 0; voice < VOICES; ++voice) {
            if (is_alive(voice)) take(voice, load_shared<unsigned>(worker.base + TOKEN_AT + voice * 4));
        }
        WORKER_MARK(30);
    }

    // A voice's new token: the seen ids, the residual stream, the position; and what is left behind at the end.
    DEVICE void take(int voice, unsigned word) {
        const int token = static_cast<int>(word & TOKEN_MASK), row = token - tiles().begin * TILE;
        const bool running = (word & TOKEN_RUNNING) != 0, end = (word & TOKEN_END) != 0;
        if (running && row >= 0 && row < tiles().count() * TILE && static_cast<int>(threadIdx.x) == TEAM - 1) {
            const unsigned at = seen_word(voice, row);
            store_shared<unsigned>(at, load_shared<unsigned>(at) | 1u << row % 32);
        }
        if (worker.owns() && worker.own_voice() == voice) {
            if (owns_row()) set_count(count() + 1);
            const Element* from = static_cast<const Element*>(p.embeddings) + static_cast<long long>(token) * HIDDEN;
            if (running && worker.owns_row()) worker.residual = to_float(load_global<Element>(from + worker.row()));
            if (running && end && worker.cluster == 0) leave_row();
        }
        if (end) alive &= ~(1u << voice);
        if (worker.place.voice == voice) {
            worker.position = end ? -1 : worker.position + 1;
        }
    }

    // Leaves the newest token's row for whoever goes on.
    DEVICE void leave_row() const {
        float square = 0.0f;
        if (worker.owns_row()) {
            const float gain = load_global<float>(worker.gain(0));
            store_global<float>(own().residual + worker.row(), worker.residual);
            store_global<Element>(static_cast<Element*>(own().hidden) + worker.row(),
                                  from_float(worker.residual * gain * NORM_SCALE));
            square = worker.residual * worker.residual;
        }
#pragma unroll
        for (int mask = 1; mask < 16; mask *= 2) square += shuffle_xor(square, mask);
        if (worker.owns_row() && lane_index() % 16 == 0)
            store_global<float>(own().square_sums + worker.row() / 16, square);
    }
};

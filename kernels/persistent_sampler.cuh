// Block v's part of every token of voice v: gather scores, choose, and keep the sequence's record. A warp of its own tells
// the host, so that nobody waits for that.
#pragma once

#include "persistent_head.cuh"

constexpr unsigned RECORD_AT = SAMPLER_AT;                  // SlotState; of the team
constexpr unsigned TOLD_AT = RECORD_AT + 64;                // SlotState and the token word; from the team to the clerk
constexpr unsigned PARTS_AT = TOLD_AT + 80;                 // (best, id, least) of each warp
constexpr unsigned CANCEL_AT = PARTS_AT + TEAM_WARPS * 16;  // 1: the host wants no more tokens
constexpr unsigned NEWS_AT = CANCEL_AT + 4;                 // count of tokens that the clerk was told
constexpr unsigned FITS_AT = NEWS_AT + 12;                  // whether each warp's list holds what it keeps
constexpr unsigned DISTANCES_AT = FITS_AT + TEAM_WARPS * 4;
constexpr unsigned SAMPLER_END = aligned_16(DISTANCES_AT + DISTANCES * 4);
// Scores and their search lie in the room of gate and up, where it is large enough: that room is empty
// until the token is known.
constexpr bool IN_ROOM = SEARCH_BYTES + SCORES_BYTES <= room_blocks(ROOM_GATED) * BLOCK_BYTES;
constexpr unsigned SEARCH_AT = IN_ROOM ? room_at(ROOM_GATED) : SAMPLER_END;
constexpr unsigned SCORES_AT = SEARCH_AT + SEARCH_BYTES;
constexpr unsigned PERSISTENT_SHARED_BYTES = IN_ROOM ? SAMPLER_END : SCORES_AT + SCORES_BYTES;

// Scores in shared memory, and those ids that each warp kept, in a list of its own; or all of them.
struct KeptScores {
    unsigned scores, list;
    int kept;  // of this warp; -1: every id

    // The lists lie where the exchanges of a layer do: nobody sends before the token is known.
    static constexpr int ROOM = static_cast<int>(SHARE_AT - exchange_at(0)) / (2 * TEAM_WARPS);  // ids of a warp

    DEVICE int first() const { return kept < 0 ? static_cast<int>(threadIdx.x) : lane_index(); }
    DEVICE int end() const { return kept < 0 ? VOCAB : kept; }
    DEVICE int step() const { return kept < 0 ? THREADS : 32; }
    DEVICE int id(int entry) const {
        return kept < 0 ? entry : load_shared<unsigned short>(list + (warp_index() * ROOM + entry) * 2);
    }
    DEVICE float of(int id) const { return load_shared<float>(scores + id * 4); }
};

struct Sampler {
    const PersistentParams& p;
    const VoicePlaces& place;
    int voice;
    unsigned base;
    Watch watch;

    DEVICE void sync() const { sync_named(1, TEAM); }

    // Before the barrier that starts the launch; all threads of the team.
    DEVICE void begin() const {
        if (!IN_ROOM) Search(base + SEARCH_AT).clear_cells();
        if (threadIdx.x != 0) return;
        SlotWords::load(place.slot).keep(base + RECORD_AT);
        store_release(base + CANCEL_AT, 0u);
        store_release(base + NEWS_AT, 0u);
    }

    // ---- choosing ----

    struct Best {
        unsigned order = 0u, id = 0xffffffffu, least = 0xffffffffu;

        DEVICE void take(unsigned other, unsigned other_id) {
            if (other > order || (other == order && other_id < id)) order = other, id = other_id;
        }
    };

    // How far the state moved: this thread's part, of a few of its rows. It is waited for together with the scores, since a
    // look at either takes as long.
    struct Distance {
        const Word* from;
        bool exists;
        Word heard = 0;

        DEVICE bool is_here(unsigned number) {
            if (exists) heard = load_word(from);
            return !exists || word_number(heard) == number;
        }
    };
    DEVICE Distance distance() const {
        static_assert(DISTANCES <= TEAM, "a thread each");
        const int part = threadIdx.x;
        const bool exists = part < DISTANCES && part % OWNERS * 2 < tiles_of(HIDDEN_TILES, part / OWNERS).count();
        return {p.layer.words + DISTANCE_WORDS + voice * DISTANCES + part, exists};
    }

    // Every warp's best.
    DEVICE Best gather_keys(unsigned number, Distance& distance) const {
        constexpr int MOST = (KEYS + TEAM - 1) / TEAM;
        const Word* from = p.layer.words + KEY_WORDS + 2 * voice * KEYS;
        Word heard[MOST][2];
        spin_until(watch, 4, [&] {
            bool all = distance.is_here(number);
#pragma unroll
            for (int i = 0; i < MOST; ++i) {
                const int key = threadIdx.x + i * TEAM;
                if (key >= KEYS) continue;
                load_words(from + 2 * key, heard[i][0], heard[i][1]);
                all = all && word_number(heard[i][0]) == number && word_number(heard[i][1]) == number;
            }
            return all;
        });
        Best best;
#pragma unroll
        for (int i = 0; i < MOST; ++i)
            if (threadIdx.x + i * TEAM < KEYS) best.take(word_value(heard[i][0]), word_value(heard[i][1]));
        return best;
    }

    // Every score, into shared memory.
    DEVICE Best gather_scores(unsigned number, Distance& distance) const {
        constexpr int AT_ONCE = 8;
        Best best;
#pragma unroll 1
        for (int first = threadIdx.x; first - static_cast<int>(threadIdx.x) < VOCAB; first += TEAM * AT_ONCE) {
            const Word* from = p.layer.words + SCORE_WORDS + voice * VOCAB;
            Word heard[AT_ONCE];
            spin_until(watch, 5, [&] {
                bool all = distance.is_here(number);
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    if (first + i * TEAM >= VOCAB) continue;
                    heard[i] = load_word(from + first + i * TEAM);
                    all = all && word_number(heard[i]) == number;
                }
                return all;
            });
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int id = first + i * TEAM;
                if (id >= VOCAB) continue;
                const float score = bits_to_float(static_cast<int>(word_value(heard[i])));
                store_shared<float>(base + SCORES_AT + id * 4, score);
                const unsigned order = order_of(score);
                best.take(order, static_cast<unsigned>(id));
                if (order < best.least && order > ORDER_OF_MINUS_INFINITY) best.least = order;
            }
        }
        return best;
    }

    // The whole team: the next token, and what it does to the sequence.
    DEVICE_CALL void choose(unsigned number, bool greedy) const {
        if (IN_ROOM && !greedy) Search(base + SEARCH_AT).clear_cells();
        Distance moved = distance();
        const Best mine = greedy ? gather_keys(number, moved) : gather_scores(number, moved);
        if (static_cast<int>(threadIdx.x) < DISTANCES)
            store_shared<unsigned>(base + DISTANCES_AT + threadIdx.x * 4, word_value(moved.heard));
        const unsigned best = max_of_lanes(mine.order);
        const unsigned id = min_of_lanes(mine.order == best ? mine.id : 0xffffffffu);
        const unsigned least = min_of_lanes(mine.least);
        if (lane_index() == 0)
            store_shared<uint4>(base + PARTS_AT + warp_index() * 16, make_uint4(best, id, least, 0u));
        sync();  // parts, scores and distances are written
        Best all;
#pragma unroll
        for (int w = 0; w < TEAM_WARPS; ++w) {
            const uint4 part = load_shared<uint4>(base + PARTS_AT + w * 16);
            all.take(part.x, part.y);
            all.least = min(all.least, part.z);
        }
        const SlotState slot = SlotWords::kept(base + RECORD_AT).state();
        const bool failed =
            all.order >= ORDER_OF_INFINITY || all.order <= ORDER_OF_MINUS_INFINITY || slot.count >= p.most_tokens;
        int token = static_cast<int>(all.id);
        if (!failed && !greedy) {
            const Extremes extremes{all.order, all.id, all.least, 0.0f};
            token = draw(keep(extremes, slot), extremes, base + RECORD_AT, Search(base + SEARCH_AT));
        }
        sync();  // the record has been read
        if (threadIdx.x == 0) conclude(number, failed, token);
    }

    // The scores that weigh something: of a voice that has made up its mind these are few.
    DEVICE KeptScores keep(const Extremes& extremes, const SlotState& slot) const {
        KeptScores scores{base + SCORES_AT, base + exchange_at(0), 0};
        const Softmax softmax(extremes.best, extremes.least, slot.scale_high, slot.scale_low);
        bool fits = true;
        constexpr int AT_ONCE = 4, ALL = (VOCAB + 31) / 32 * 32;
#pragma unroll 1
        for (int first = threadIdx.x; first < ALL; first += TEAM * AT_ONCE) {
            float values[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) values[i] = scores.of(min(first + i * TEAM, VOCAB - 1));
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int id = first + i * TEAM;
                const bool weighs = id < VOCAB && softmax.weighs(values[i]);
                const unsigned lanes = lanes_where(weighs);
                const int place = scores.kept + bits_set(lanes & ((1u << lane_index()) - 1u));
                scores.kept += bits_set(lanes);
                fits = fits && scores.kept <= KeptScores::ROOM;
                if (weighs && fits)
                    store_shared<unsigned short>(scores.list + (warp_index() * KeptScores::ROOM + place) * 2,
                                                 static_cast<unsigned short>(id));
            }
        }
        if (lane_index() == 0) store_shared<unsigned>(base + FITS_AT + warp_index() * 4, fits ? 1u : 0u);
        sync();
#pragma unroll
        for (int w = 0; w < TEAM_WARPS; ++w) fits = fits && load_shared<unsigned>(base + FITS_AT + w * 4) != 0;
        if (!fits) scores.kept = -1;
        return scores;
    }

    // One thread: the record moves on, everybody is told the token, and the clerk gets to know.
    DEVICE void conclude(unsigned number, bool failed, int token) const {
        SlotState slot = SlotWords::kept(base + RECORD_AT).state();
        if (failed) {
            token = 0;
            slot.status = STATUS_FAILED;
        } else {
            float distance = 0.0f;
            for (int i = 0; i < DISTANCES; ++i) distance += load_shared<float>(base + DISTANCES_AT + i * 4);
            advance(slot, p, token, distance);
        }
        const bool running = slot.status == STATUS_RUNNING;
        const bool end = !running || number >= static_cast<unsigned>(p.budget) || load_acquire(base + CANCEL_AT) != 0;
        const unsigned word = static_cast<unsigned>(token) | (end ? TOKEN_END : 0u) | (running ? TOKEN_RUNNING : 0u);
        store_word(p.layer.words + TOKEN_WORDS + voice, make_word(word, number));
        const uint4 fixed = load_shared<uint4>(base + RECORD_AT + 32);
        const uint4 third = make_uint4(fixed.x, fixed.y, fixed.z, static_cast<unsigned>(slot.count));
        const uint4 fourth = make_uint4(static_cast<unsigned>(slot.position), static_cast<unsigned>(slot.status),
                                        static_cast<unsigned>(slot.repeats), static_cast<unsigned>(slot.stuck));
        store_shared<uint4>(base + RECORD_AT + 32, third);
        store_shared<uint4>(base + RECORD_AT + 48, fourth);
        const unsigned told = base + TOLD_AT, answered = base + NEWS_AT + 4;
        // The clerk takes a few microseconds for a token; it has long read the one before.
        const long long start = clock_cycles();
        while (load_acquire(answered) != number - 1 && !watch.is_dead()) {
            if (clock_cycles() - start > SPIN_LIMIT_CYCLES) watch.mark(7);
            pause();
        }
        store_shared<uint4>(told + 32, third);
        store_shared<uint4>(told + 48, fourth);
        store_shared<unsigned>(told + 64, word);
        store_release(base + NEWS_AT, number);
    }

    // ---- the clerk ----

    // Waits until the states of the token are written, by all ranks of the first cluster.
    DEVICE void await_states(unsigned number) const {
        const Word* from = p.layer.words + WRITTEN_WORDS;
        const auto ready = [&] {
            bool all = true;
            for (int rank = lane_index(); rank < RANKS; rank += 32) {
                const bool writes = tiles_of(HIDDEN_TILES, rank).count() > 0;
                all = all && (!writes || static_cast<int>(word_number(load_word(from + rank)) - number) >= 0);
            }
            return all;
        };
        spin_until(watch, 23, ready, PATIENT);
        fence_device();  // behind this the states themselves are seen
    }

    // One warp: writes a token to where the host and later kernels find it. Whether there will be another one.
    DEVICE bool tell(unsigned number) const {
        const unsigned news = base + NEWS_AT;
        spin_until(watch, 7, [=] { return load_acquire(news) == number; }, PATIENT);
        const unsigned word = load_shared<unsigned>(base + TOLD_AT + 64);
        const uint4 third = load_shared<uint4>(base + TOLD_AT + 32), fourth = load_shared<uint4>(base + TOLD_AT + 48);
        sync_warp();  // all lanes have read them before the first one says so
        if (lane_index() == 0) store_release(base + NEWS_AT + 4, number);
        await_states(number);
        // What a block makes of a wait that it gave up is not told, however sound it looks from here.
        if (!all_lanes(!watch.is_dead() && load_flag(watch.error) == 0)) return false;
        if (lane_index() == 0) record(word, third, fourth);
        sync_warp();
        return (word & TOKEN_END) == 0;
    }

    DEVICE void record(unsigned word, uint4 third, uint4 fourth) const {
        SlotState slot;
        slot.count = static_cast<int>(third.w);
        slot.position = static_cast<int>(fourth.x), slot.status = static_cast<int>(fourth.y);
        slot.repeats = static_cast<int>(fourth.z), slot.stuck = static_cast<int>(fourth.w);
        const int token = static_cast<int>(word & TOKEN_MASK);
        if (slot.status != STATUS_FAILED) {
            store_global<int>(place.tokens + slot.count - 1, token);
            unsigned* seen = place.seen + token / 32;
            store_global<unsigned>(seen, load_global_fresh<unsigned>(seen) | 1u << token % 32);
        }
        store_slot(place.slot, slot);
        if ((word & TOKEN_END) != 0)
            store_global<int>(place.slot_of_row, (word & TOKEN_RUNNING) != 0 ? place.slot_index : -1);
        publish(place.progress, progress_word(slot, token));
        if (p.cancel != nullptr && load_flag(p.cancel) != 0) store_release(base + CANCEL_AT, 1u);
    }
};

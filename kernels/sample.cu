// From logits to the next token of each row, and everything that a generation step has to do besides: the state that
// made the token, the loop check, the record of the slot, a word for the host, and the next step's input.
//
// The order is that of soprano_cupy/sampling.py: repetition penalty; the most likely token, or temperature, softmax,
// top-p and a random number that depends on seed, stream and the token's place alone. What follows the token mirrors
// soprano_cupy/generation.py. The result equals theirs except where the random number falls within a rounding error of
// the boundary between two tokens.
//
// For the host, progress[slot] = tokens drawn | status << 32 | stuck << 39 | last token << 40. It is written behind the
// slot's state and token, so whoever sees it finds those.
//
// Rows of slot -1 are left alone. A row whose sequence ends, or had ended before, becomes -1 itself.
//
// Compile-time: VOCAB; HIDDEN; THREADS, 128 to 1024; DTYPE_FP16 or DTYPE_BF16.
// Launch (soprano_cupy/gpu/step.py): one thread block for each row.
#include "device.cuh"
#include "residual_row.cuh"
#include "sample_scores.cuh"
#include "sample_search.cuh"
#include "sample_slot.cuh"
#include "step_params.cuh"

constexpr int COLUMNS_HELD = (HIDDEN + THREADS - 1) / THREADS;  // of the hidden size, by each thread

// Shared memory, in bytes; soprano_cupy/gpu/step.py counts the same.
constexpr int PARTIAL_AT = 0;        // (best, id, least, distance) of each warp
constexpr int SLOT_AT = WARPS * 16;  // the slot's record, so that it needs no registers while a token is drawn
constexpr int SEARCH_AT = SLOT_AT + 64;
constexpr int SCORES_AT = SEARCH_AT + SEARCH_BYTES;
constexpr int GAIN_AT = SCORES_AT + SCORES_BYTES;  // the next step's gain, each thread's columns for itself

DEVICE Extremes extremes_of_warp(const Scores& scores, float distance) {
    unsigned best = 0u, id = 0xffffffffu, least = 0xffffffffu;
#pragma unroll(HELD ? ITEMS : 1)
    for (int j = 0; j < ITEMS; ++j) {  // ids ascend
        const unsigned order = order_of(scores.own(j));
        if (order > best && Scores::own_id(j) < VOCAB) best = order, id = Scores::own_id(j);
        if (order < least && order > ORDER_OF_MINUS_INFINITY) least = order;
    }
    const unsigned best_of_warp = max_of_lanes(best);
    const unsigned lowest = min_of_lanes(best == best_of_warp ? id : 0xffffffffu);
#pragma unroll
    for (int mask = WARP_LANES / 2; mask > 0; mask /= 2) distance += shuffle_xor(distance, mask);
    return {best_of_warp, lowest, min_of_lanes(least), distance};
}

// Of the block, for all threads. Ends behind a barrier.
DEVICE Extremes extremes_of_block(unsigned smem, const Extremes& warp) {
    if (lane_index() == 0) {
        store_shared<uint4>(smem + PARTIAL_AT + warp_index() * 16,
                            make_uint4(warp.best, warp.id, warp.least, float_to_bits(warp.distance)));
    }
    sync_block();  // each warp's part is written
    uint4 part = make_uint4(0u, 0xffffffffu, 0xffffffffu, 0u);
    if (lane_index() < WARPS) part = load_shared<uint4>(smem + PARTIAL_AT + lane_index() * 16);
    const unsigned best = max_of_lanes(part.x);
    const unsigned id = min_of_lanes(part.x == best ? part.y : 0xffffffffu);
    float distance = bits_to_float(static_cast<int>(part.w));
#pragma unroll
    for (int mask = WARP_LANES / 2; mask > 0; mask /= 2) distance += shuffle_xor(distance, mask);
    return {best, id, min_of_lanes(part.z), distance};
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample(const __grid_constant__ SampleParams params) {
    grid_dependency_launch();
    const unsigned smem = shared_base();
    const Search search(smem + SEARCH_AT);
    search.clear_cells();
    float final_gain[COLUMNS_HELD];
#pragma unroll
    for (int i = 0; i < COLUMNS_HELD; ++i) {
        const int column = i * THREADS + threadIdx.x;
        final_gain[i] = column < HIDDEN ? load_global<float>(params.final_gain + column) : 0.0f;
        if (column < HIDDEN)
            store_shared<float>(smem + GAIN_AT + column * 4, load_global<float>(params.next_gain + column));
    }

    grid_dependency_wait();
    const long long row = blockIdx.x;
    const int slot_index = load_global_fresh<int>(params.slot_of_row + row);
    Scores scores(params.logits + row * VOCAB, smem + SCORES_AT);
    if (slot_index < 0) return;
    const long long target = params.target_rows == nullptr ? row : load_global_fresh<int>(params.target_rows + row);
    const SlotWords words = SlotWords::load(params.slots + slot_index);
    SlotState slot = words.state();
    if (slot.status != STATUS_RUNNING) {
        if (threadIdx.x == 0) store_global<int>(params.next_slot_of_row + target, -1);
        return;
    }
    scores.penalise(params.seen + static_cast<long long>(slot_index) * SEEN_WORDS, slot.penalty);

    if (threadIdx.x == 0) words.keep(smem + SLOT_AT);

    // The state that makes the token, and how far it is from the one before.
    const bool has_room = slot.count < params.most_tokens;
    float* state = params.states + (static_cast<long long>(slot_index) * params.most_tokens + slot.count) * HIDDEN;
    const float factor =
        inverse_rms(params.square_sums + row * sum_tiles(HIDDEN), HIDDEN, params.inverse_width, params.epsilon);
    float distance = 0.0f;
#pragma unroll
    for (int i = 0; i < COLUMNS_HELD; ++i) {
        const int column = i * THREADS + threadIdx.x;
        if (column >= HIDDEN || !has_room) continue;
        const float value =
            load_global_fresh<float>(params.residual + row * params.stride + column) * factor * final_gain[i];
        store_global<float>(state + column, value);
        if (slot.count > 0) distance += fabsf(value - load_global_fresh<float>(state + column - HIDDEN));
    }

    const Extremes extremes = extremes_of_block(smem, extremes_of_warp(scores, distance));
    const bool failed = extremes.best >= ORDER_OF_INFINITY || extremes.best <= ORDER_OF_MINUS_INFINITY || !has_room;
    int token = static_cast<int>(extremes.id);
    if (!failed && (slot.options & OPTION_GREEDY) == 0) token = draw(scores, extremes, smem + SLOT_AT, search);
    slot = SlotWords::kept(smem + SLOT_AT).state();
    if (failed) {
        token = 0;
        slot.status = STATUS_FAILED;
    } else {
        advance(slot, params, token, extremes.distance);
    }

    // Its bookkeeping, by a thread of the last warp, while the others embed it. The barrier in extremes_of_block stands
    // between the reading of the seen ids, the writing of the state, and this.
    if (threadIdx.x == THREADS - WARP_LANES) {
        if (!failed) {
            const long long place = static_cast<long long>(slot_index) * params.most_tokens + slot.count - 1;
            store_global<int>(params.tokens + place, token);
            unsigned* word = params.seen + static_cast<long long>(slot_index) * SEEN_WORDS + token / 32;
            store_global<unsigned>(word, load_global_fresh<unsigned>(word) | 1u << (token % 32));
        }
        store_slot(params.slots + slot_index, slot);
        store_global<int>(params.next_slot_of_row + target, slot.status == STATUS_RUNNING ? slot_index : -1);
        publish(params.progress + slot_index, progress_word(slot, token));
    }
    if (slot.status != STATUS_RUNNING) return;
    const Element* embedding = static_cast<const Element*>(params.embeddings) + static_cast<long long>(token) * HIDDEN;
#pragma unroll
    for (int i = 0; i < COLUMNS_HELD; ++i) {
        const int column = i * THREADS + threadIdx.x;
        const bool exists = column < HIDDEN;
        write_residual(params.next_residual + target * params.stride,
                       static_cast<Element*>(params.next_hidden) + target * params.stride,
                       params.next_square_sums + target * sum_tiles(HIDDEN), column, HIDDEN,
                       exists ? to_float(load_global<Element>(embedding + column)) : 0.0f,
                       exists ? load_shared<float>(smem + GAIN_AT + column * 4) : 0.0f);
    }
}

// The arguments of the language model's kernels other than products, each one struct by value, and the record that a
// sequence keeps on the device while it generates. soprano_cupy/gpu/step.py packs the same fields in the same order.
//
// A slot holds one sequence: its keys and values, its record, its states and its tokens. A row is a line of the
// activations. In a prefill a row is one token of a prompt; in a decode step row r is the newest token of the sequence
// in slot slot_of_row[r], and -1 there says that nothing is done for the row.
#pragma once

constexpr int SUM_COLUMNS = 16;  // columns of one partial sum of squares of the residual stream

// SlotState::status
constexpr int STATUS_RUNNING = 0;
constexpr int STATUS_STOP = 1;    // the end token was drawn
constexpr int STATUS_LENGTH = 2;  // `limit` tokens were drawn
constexpr int STATUS_STUCK = 3;   // the voice repeats itself and GIVE_UP was asked for
constexpr int STATUS_FAILED = 4;  // the logits held NaN, or no finite number, or infinity

// SlotState::options
constexpr int OPTION_GREEDY = 1;   // take the most likely token: temperature 0
constexpr int OPTION_GIVE_UP = 2;  // end as soon as the voice is stuck

// How one sequence is sampled and how far it is. The host writes it before the prefill; from then on only the sampling
// kernel does.
struct alignas(16) SlotState {
    unsigned long long seed, stream;  // of the random numbers
    double top_p;                     // 1: all tokens
    float scale_high, scale_low;      // log2(e) / temperature is their sum
    float penalty;                    // of tokens seen before
    int options;
    int limit;     // tokens at which it ends
    int count;     // tokens drawn so far
    int position;  // place, in the cache, of the newest token that the model has been given (or is given next)
    int status;
    int repeats;  // of the loop check: steps in which the state hardly changed, less those in which it did
    int stuck;    // 1 once `repeats` has gone over the limit
};
static_assert(sizeof(SlotState) == 64, "four loads of 16 bytes");

struct EmbedParams {
    const int* ids;          // (rows,)
    const void* embeddings;  // (vocab, columns) Element
    const float* gain;       // (columns,) of the first layer's input norm
    float* residual;         // (rows, columns), row stride `stride`
    void* hidden;            // Element, likewise: residual * gain * NORM_SCALE
    float* square_sums;      // (rows, ceil(columns / SUM_COLUMNS)) of the residual
    int rows, columns, stride, reserved;
};

// The last row of each sequence, one after the other.
struct GatherParams {
    const int* starts;  // (sequences + 1,) first row of each sequence
    const float* residual;
    const void* hidden;
    const float* square_sums;
    float* last_residual;  // (sequences, columns), row stride `stride`; none of the three overlaps its source
    void* last_hidden;
    float* last_square_sums;
    int sequences, columns, stride, reserved;
};

struct FinalNormParams {
    const float* residual;     // (rows, columns), row stride `stride`
    const float* square_sums;  // (rows, ceil(columns / SUM_COLUMNS))
    const float* gain;         // (columns,)
    float* states;             // (rows, columns)
    int rows, columns, stride;
    float inverse_width;  // 1 / columns
    float epsilon;
    int reserved;
};

struct QkvFinishParams {
    const float* qkv;          // (rows, (q_heads + 2 kv_heads) HEAD_DIM): raw queries, keys, values
    const float* q_gain;       // (HEAD_DIM,)
    const float* k_gain;       // (HEAD_DIM,)
    const float2* rope;        // (positions, HEAD_DIM / 2): cosine, sine
    const int* row_slots;      // (rows,); -1: no row
    const int* row_positions;  // (rows,)
    void* queries;             // (rows, q_heads, HEAD_DIM) Element
    void* packed_keys;         // (rows, kv_heads, HEAD_DIM) Element, or null
    void* packed_values;
    void* keys;  // this layer's (slots, capacity, kv_heads, HEAD_DIM) Element
    void* values;
    int rows, q_heads, kv_heads, capacity;
    float epsilon;
    int reserved;
};

constexpr int AHEAD_RANGES = 4;  // of memory

struct AttentionStepParams {
    const float* qkv;        // (rows, (q_heads + 2 kv_heads) HEAD_DIM): raw queries, keys, values
    const float* q_gain;     // (HEAD_DIM,)
    const float* k_gain;     // (HEAD_DIM,)
    const float2* rope;      // (positions, HEAD_DIM / 2): cosine, sine
    const int* slot_of_row;  // (rows,)
    const SlotState* slots;
    void* keys;  // this layer's (slots, capacity, kv_heads, HEAD_DIM) Element
    void* values;
    void* attended;                   // (rows, q_heads, HEAD_DIM) Element, row stride `attended_stride`
    void* workspace;                  // of the split reduction, where the blocks of a sequence are no cluster; or null
    const char* ahead[AHEAD_RANGES];  // constants that later kernels read, from multiples of 128 bytes on
    int attended_stride, capacity;
    int splits;  // thread blocks for each (sequence, key-value head, row group)
    float scale_log2, epsilon;
    int rows;
    int ahead_lines[AHEAD_RANGES];  // of 128 bytes
};

struct SampleParams {
    const float* logits;       // (rows, VOCAB)
    const float* residual;     // (rows, HIDDEN), row stride `stride`: behind the last layer
    const float* square_sums;  // (rows, ceil(HIDDEN / SUM_COLUMNS)) of it
    const float* final_gain;   // (HIDDEN,) of the final norm
    const void* embeddings;    // (VOCAB, HIDDEN) Element
    const float* next_gain;    // (HIDDEN,) of the first layer's input norm
    // The input of the next decode step. Row r goes to row target_rows[r], or r where that is null; only then may the
    // arrays be the ones read here.
    float* next_residual;
    void* next_hidden;
    float* next_square_sums;
    const int* target_rows;  // (rows,) or null
    const int* slot_of_row;  // (rows,)
    int* next_slot_of_row;   // of the next decode step: the slot, or -1 once it has ended; may be slot_of_row
    SlotState* slots;
    unsigned* seen;                // (slots, ceil(VOCAB / 32)): bit i % 32 of word i / 32 is set for ids seen so far
    int* tokens;                   // (slots, most_tokens)
    float* states;                 // (slots, most_tokens, HIDDEN)
    unsigned long long* progress;  // (slots,) of mapped host memory: see sample.cu
    int most_tokens, stride, end_token, loop_length;
    float inverse_width, epsilon, loop_distance;
    int reserved;
};

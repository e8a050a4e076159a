// The Vocos decoder between its matrix products (Siuzdak, 2023; ConvNeXt blocks of Liu et al., 2022): what reads and writes
// whole rows of frames. A row's result does not depend on the rows beside it, in whole voices and in streams alike.
//
//   vocos_states              states of tokens, rounded to 16 bits for the embedding's product
//   vocos_windows             the same where the embedding is a convolution: the frames under its window, side by side
//   vocos_embed               the embedding's product, interpolated from tokens to frames, and its norm
//   vocos_convolution         depthwise convolution along the frames, and the block's norm
//   vocos_convolution_stream  the same in a stream
//   vocos_norm                the norm before the head
//
// Compile-time: DTYPE_FP16; DIM, INPUT_SIZE (multiples of 8); EMBED_KERNEL, BLOCK_KERNEL (odd); ROWS of a thread block
// (1, 2, 4 or 8); STREAM, whether the voices are streams. Launch (soprano_cupy/gpu/vocos_plan.py): ceil(rows / ROWS) blocks of THREADS threads, of STATE_THREADS
// for the first two, with NORM_SHARED_BYTES of shared memory.
#include "device.cuh"
#include "vocos_norm.cuh"
#include "vocos_params.cuh"

constexpr int FRAMES_PER_TOKEN = 4;
constexpr int MARGIN = BLOCK_KERNEL / 2;
constexpr int STATE_THREADS = 128, STATE_WARPS = STATE_THREADS / WARP_LANES;

DEVICE VocosRow load_row(const VocosRow* table, int row) {
    const uint4 v = load_global_fresh<uint4>(table + row);
    return {static_cast<int>(v.x), static_cast<int>(v.y), static_cast<int>(v.z), static_cast<int>(v.w)};
}

DEVICE VocosSegment load_segment(const VocosSegment* segments, int segment) {
    const char* at = reinterpret_cast<const char*>(segments + segment);
    const uint4 low = load_global_fresh<uint4>(at), high = load_global_fresh<uint4>(at + 16);
    const unsigned long long address = static_cast<unsigned long long>(low.y) << 32 | low.x;
    return {reinterpret_cast<const float*>(address),
            static_cast<int>(low.z),
            static_cast<int>(low.w),
            static_cast<int>(high.x),
            static_cast<int>(high.y),
            {0, 0}};
}

// left + (right - left) * part / FRAMES_PER_TOKEN, exact at part 0.
DEVICE float interpolate(float left, float right, int part) {
    const float share = part * (1.0f / FRAMES_PER_TOKEN);
    return fused_multiply_add(right, share, left * (1.0f - share));
}
DEVICE float4 interpolate4(float4 left, float4 right, int part) {
    return make_float4(interpolate(left.x, right.x, part), interpolate(left.y, right.y, part),
                       interpolate(left.z, right.z, part), interpolate(left.w, right.w, part));
}

DEVICE const float* state_of(const VocosSegment& segment, int token) {
    return segment.states + static_cast<long long>(token % segment.ring) * INPUT_SIZE;
}

DEVICE uint2 to_elements(float4 v) { return make_uint2(pack2(v.x, v.y), pack2(v.z, v.w)); }

// output[row] = state of the row's token. A warp takes a row at a time.
extern "C" __global__ void __launch_bounds__(STATE_THREADS)
    vocos_states(const __grid_constant__ VocosRowsParams params) {
    grid_dependency_launch();
    grid_dependency_wait();
    for (int i = warp_index(); i < ROWS; i += STATE_WARPS) {
        const int row = blockIdx.x * ROWS + i;
        if (row >= params.rows) break;
        const uint2 token = load_global_fresh<uint2>(params.tokens + row);
        if (static_cast<int>(token.y) < 0) continue;
        const VocosSegment segment = load_segment(params.segments, static_cast<int>(token.x));
        const float* state = state_of(segment, static_cast<int>(token.y));
        Element* out = static_cast<Element*>(params.output) + static_cast<long long>(row) * params.output_stride;
#pragma unroll 4
        for (int column = 4 * lane_index(); column < INPUT_SIZE; column += 4 * WARP_LANES) {
            store_global(out + column, to_elements(load_global_fresh<float4>(state + column)));
        }
    }
}

// output[row] = the frames frame - EMBED_KERNEL / 2 and on, zeros outside the voice. A warp takes a frame at a time.
extern "C" __global__ void __launch_bounds__(STATE_THREADS)
    vocos_windows(const __grid_constant__ VocosRowsParams params) {
    grid_dependency_launch();
    grid_dependency_wait();
    for (int i = warp_index(); i < ROWS * EMBED_KERNEL; i += STATE_WARPS) {
        const int number = blockIdx.x * ROWS + i / EMBED_KERNEL, tap = i % EMBED_KERNEL;
        if (number >= params.rows) break;
        const VocosRow row = load_row(params.table, number);
        const VocosSegment segment = load_segment(params.segments, row.segment);
        const int frame = row.frame - params.lag + tap - EMBED_KERNEL / 2;
        const bool exists = frame >= 0 && frame < row.frames;
        const int token = exists ? frame / FRAMES_PER_TOKEN : 0, part = exists ? frame % FRAMES_PER_TOKEN : 0;
        const float* left = state_of(segment, token);
        const float* right = state_of(segment, token + 1);
        Element* out = static_cast<Element*>(params.output) + static_cast<long long>(number) * params.output_stride;
#pragma unroll 4
        for (int column = 4 * lane_index(); column < INPUT_SIZE; column += 4 * WARP_LANES) {
            float4 value = exists ? load_global_fresh<float4>(left + column) : zero4();
            if (part > 0) value = interpolate4(value, load_global_fresh<float4>(right + column), part);
            store_global(out + tap * INPUT_SIZE + column, to_elements(value));
        }
    }
}

// output[row] = norm(input of the row's frame). The input has a row for each token where the embedding is a matrix, which
// may stand before the interpolation as it may behind it; a row for each frame where it is a convolution.
extern "C" __global__ void __launch_bounds__(THREADS) vocos_embed(const __grid_constant__ VocosRowsParams params) {
    grid_dependency_launch();
    const int first = blockIdx.x * ROWS;
    const float4 gain = load_constant(params.gain), shift = load_constant(params.shift);
    int source[ROWS], part[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        source[i] = first + i < params.rows ? first + i : -1;
        part[i] = 0;
#if EMBED_KERNEL == 1
        if (source[i] < 0) continue;
        const VocosRow row = load_row(params.table, source[i]);
        source[i] = -1;
        if (row.frame < 0 || row.frame >= row.frames) continue;
        source[i] = row.frame / FRAMES_PER_TOKEN + load_segment(params.segments, row.segment).token_shift;
        part[i] = row.frame % FRAMES_PER_TOKEN;
#endif
    }
    grid_dependency_wait();

    float4 x[ROWS], right[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const float* at = params.input + static_cast<long long>(source[i]) * params.input_stride;
        x[i] = source[i] >= 0 ? load_channels(at) : zero4();
        right[i] = part[i] > 0 ? load_channels(at + params.input_stride) : zero4();
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (part[i] > 0) x[i] = interpolate4(x[i], right[i], part[i]);
    }
    layer_norm(x, gain, shift, params.epsilon);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (source[i] < 0) continue;
        store_channels(static_cast<float*>(params.output) + static_cast<long long>(first + i) * params.output_stride,
                       x[i]);
    }
}

// The constants of a block's convolution and norm that belong to this thread's channels.
struct ConvolutionWeights {
    float4 taps[BLOCK_KERNEL], bias, gain, shift;

    DEVICE explicit ConvolutionWeights(const VocosRowsParams& params)
        : bias(load_constant(params.bias)), gain(load_constant(params.gain)), shift(load_constant(params.shift)) {
#pragma unroll
        for (int tap = 0; tap < BLOCK_KERNEL; ++tap) taps[tap] = load_constant(params.taps + tap * DIM);
    }
};

DEVICE void store_elements(const VocosRowsParams& params, int first, const float4 (&x)[ROWS]) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        if (first + i >= params.rows) break;
        store_channels(static_cast<Element*>(params.output) + static_cast<long long>(first + i) * params.output_stride,
                       x[i]);
    }
}

#if STREAM == 0

// output[row] = norm(bias + sum of taps * input of the frames around the row's). A window's frame beside the row is in the
// row beside it; where the launch does not have it, the result is not used.
extern "C" __global__ void __launch_bounds__(THREADS)
    vocos_convolution(const __grid_constant__ VocosRowsParams params) {
    grid_dependency_launch();
    const int first = blockIdx.x * ROWS;
    const ConvolutionWeights weights(params);
    int frame[ROWS], frames[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        frame[i] = frames[i] = 0;
        if (first + i >= params.rows) continue;
        const VocosRow row = load_row(params.table, first + i);
        frame[i] = row.frame;
        frames[i] = row.frames;
    }
    grid_dependency_wait();

    float4 window[ROWS + 2 * MARGIN], x[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS + 2 * MARGIN; ++i) {
        const int row = first + i - MARGIN;
        const bool exists = row >= 0 && row < params.rows;
        window[i] = exists ? load_channels(params.input + static_cast<long long>(row) * params.input_stride) : zero4();
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        x[i] = weights.bias;
#pragma unroll
        for (int tap = 0; tap < BLOCK_KERNEL; ++tap) {
            const int seen = frame[i] + tap - MARGIN;
            if (seen >= 0 && seen < frames[i]) x[i] = fma4(window[i + tap], weights.taps[tap], x[i]);
        }
    }
    layer_norm(x, weights.gain, weights.shift, params.epsilon);
    store_elements(params, first, x);
}

#else

// The same for a stream, MARGIN frames behind its input: the window of row r is rows r - 2 MARGIN to r, and what lies
// before the segment's first comes from the history. Also delayed[row] = input of the row's frame, for the block's
// residual sum, and the other history = the segment's last 2 MARGIN frames.
extern "C" __global__ void __launch_bounds__(THREADS)
    vocos_convolution_stream(const __grid_constant__ VocosRowsParams params) {
    grid_dependency_launch();
    const int first = blockIdx.x * ROWS;
    const ConvolutionWeights weights(params);
    VocosRow row[ROWS];
    int history[ROWS];
    bool last[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        row[i] = {0, 0, 0, 0};
        history[i] = 0;
        last[i] = false;
        if (first + i >= params.rows) continue;
        row[i] = load_row(params.table, first + i);
        row[i].frame -= params.lag;
        const VocosSegment segment = load_segment(params.segments, row[i].segment);
        history[i] = segment.history;
        last[i] = row[i].index == segment.rows - 1;
    }
    grid_dependency_wait();

    float4 window[ROWS][BLOCK_KERNEL], x[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int tap = 0; tap < BLOCK_KERNEL; ++tap) {
            const int seen = row[i].frame + tap - MARGIN, behind = tap - 2 * MARGIN;
            const long long kept =
                (static_cast<long long>(history[i]) * 2 * MARGIN + 2 * MARGIN + row[i].index + behind) * DIM;
            const long long held = static_cast<long long>(first + i + behind) * params.input_stride;
            window[i][tap] = zero4();
            if (seen < 0 || seen >= row[i].frames) continue;
            window[i][tap] = load_channels(row[i].index + behind < 0 ? params.history + kept : params.input + held);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        x[i] = weights.bias;
#pragma unroll
        for (int tap = 0; tap < BLOCK_KERNEL; ++tap) x[i] = fma4(window[i][tap], weights.taps[tap], x[i]);
        if (first + i >= params.rows) continue;
        store_channels(params.delayed + static_cast<long long>(first + i) * params.input_stride, window[i][MARGIN]);
        if (!last[i]) continue;
#pragma unroll
        for (int tap = 1; tap < BLOCK_KERNEL; ++tap) {
            const long long at = (static_cast<long long>(history[i] ^ 1) * 2 * MARGIN + tap - 1) * DIM;
            store_channels(params.history + at, window[i][tap]);
        }
    }
    layer_norm(x, weights.gain, weights.shift, params.epsilon);
    store_elements(params, first, x);
}

#endif

// output[row] = norm(input[row])
extern "C" __global__ void __launch_bounds__(THREADS) vocos_norm(const __grid_constant__ VocosRowsParams params) {
    grid_dependency_launch();
    const int first = blockIdx.x * ROWS;
    const float4 gain = load_constant(params.gain), shift = load_constant(params.shift);
    grid_dependency_wait();
    float4 x[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        const bool exists = first + i < params.rows;
        x[i] = exists ? load_channels(params.input + static_cast<long long>(first + i) * params.input_stride) : zero4();
    }
    layer_norm(x, gain, shift, params.epsilon);
    store_elements(params, first, x);
}

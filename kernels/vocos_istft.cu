// The decoder's end: log-magnitudes and phases to samples. Inverse short-time Fourier transform of windowed frames
// (Allen and Rabiner, 1977) divided by the sum of the squared windows (Griffin and Lim, 1984).
//
// A thread block makes consecutive hops of one voice and writes each sample once; the three frames before its first hop,
// which also sound in it, are transformed again, or in a stream come as sums that an earlier launch left open. Frames are
// added from the first to the last in both cases, so the samples have the same bits.
//
// A real frame of N_FFT samples is the inverse transform of half as many complex points: with X[k] its bins, M = N_FFT / 2
// and W = exp(2 pi i k / N_FFT), the points z[k] = (X[k] + X*[M - k]) + i W (X[k] - X*[M - k]) become the samples
// (x[2n], x[2n + 1]) N_FFT.
//
// Compile-time: N_FFT, a power of two from 64 to 4,096; FRAMES transformed at a time; RESIDENT, thread blocks that a
// multiprocessor should hold. Launch
// (soprano_cupy/gpu/vocos_plan.py): a thread block of THREADS for each span, FRAMES * FRAME_BYTES of shared memory.
#include "device.cuh"
#include "vocos_fft.cuh"
#include "vocos_params.cuh"

constexpr int HOP = N_FFT / 4;
constexpr int PARTS = 4;  // hops of a frame
constexpr int WORKERS = FRAMES * BUTTERFLIES;
constexpr int THREADS = WORKERS < WARP_LANES ? WARP_LANES : WORKERS;
constexpr int SAMPLES = (HOP + THREADS - 1) / THREADS;  // of a hop, that a thread adds up
constexpr float MAX_MAGNITUDE = 100.0f;                 // the model's clip of every bin
constexpr float MAX_LOG2 = 7.0f;                        // above log2 of it: the exponential does not overflow

// (cos, sin) of an angle in turns, error below 1e-7. Whole turns go first, which is exact at any size.
DEVICE float2 unit_vector(float turns) {
    const float angle = turns - round_to_even(turns);
    const float quarters = round_to_even(4.0f * angle);
    const float r = fused_multiply_add(quarters, -0.25f, angle), u = r * r;  // |r| <= 1/8, exact
    float sine = fused_multiply_add(u, -75.40198f, 81.59297f);               // of 2 pi r, fitted over |r| <= 1/8
    sine = fused_multiply_add(u, sine, -41.34167f);
    sine = fused_multiply_add(u, sine, 6.2831855f) * r;
    float cosine = fused_multiply_add(u, 59.224873f, -85.44325f);
    cosine = fused_multiply_add(u, cosine, 64.93932f);
    cosine = fused_multiply_add(u, cosine, -19.739208f);
    cosine = fused_multiply_add(u, cosine, 1.0f);
    const float2 along = quarters * quarters == 1.0f ? make_float2(-sine, cosine) : make_float2(cosine, sine);
    // Quarters are -2 to 2: along is turned by -90 degrees where they are -1, and by 180 at both ends.
    const bool reversed = quarters == -1.0f || quarters * quarters == 4.0f;
    return reversed ? make_float2(-along.x, -along.y) : along;
}

// A bin from log2 of its magnitude and its phase in turns; a NaN stays one.
DEVICE float2 to_bin(float2 value) {
    const float magnitude = exp2_fast(value.x > MAX_LOG2 ? MAX_LOG2 : value.x);
    const float clipped = magnitude > MAX_MAGNITUDE ? MAX_MAGNITUDE : magnitude;
    const float2 direction = unit_vector(value.y);
    return make_float2(clipped * direction.x, clipped * direction.y);
}

// The points of one frame, from bins k and POINTS - k together. Bins 0 and POINTS are zero in this model.
DEVICE void store_points(const float* spectrum, unsigned frame_smem, int thread, const float* roots) {
    float2 low[HELD / 2], high[HELD / 2];
#pragma unroll
    for (int i = 0; i < HELD / 2; ++i) {
        const int k = thread + 1 + i * BUTTERFLIES;  // 1 to POINTS / 2
        low[i] = load_global_fresh<float2>(spectrum + 2 * k);
        high[i] = load_global_fresh<float2>(spectrum + 2 * (POINTS - k));
    }
#pragma unroll
    for (int i = 0; i < HELD / 2; ++i) {
        const int k = thread + 1 + i * BUTTERFLIES;
        const float2 bin = to_bin(low[i]), mirror = conjugate(to_bin(high[i]));
        const float2 sum = add2(bin, mirror);
        const float2 turned = times_i(multiply2(root(roots, k), subtract2(bin, mirror)));
        store_point(frame_smem, k, add2(sum, turned));
        if (k < POINTS / 2) store_point(frame_smem, POINTS - k, conjugate(subtract2(sum, turned)));
    }
    if (thread == 0) store_point(frame_smem, 0, make_float2(0.0f, 0.0f));
}

DEVICE float load_sample(unsigned frame_smem, int sample) {
    return load_shared<float>(frame_smem + point_offset(sample / 2) + sample % 2 * 4);
}

// 16-bit samples as in WAV files: times 32,767, rounded to even, clipped; NaN becomes 0.
DEVICE short to_pcm(float sample) {
    const float scaled = round_to_even(sample * 32767.0f);
    if (scaled >= 32767.0f) return 32767;
    return scaled > -32768.0f ? static_cast<short>(static_cast<int>(scaled)) : scaled == scaled ? -32768 : 0;
}

// What a thread adds up: its samples of the next FRAMES + 3 hops.
struct Sums {
    float hops[SAMPLES][FRAMES + PARTS - 1];

    DEVICE static int place(int i) { return i * THREADS + static_cast<int>(threadIdx.x); }
    DEVICE static bool exists(int i) { return HOP % THREADS == 0 || place(i) < HOP; }

    // Read anew for each batch of frames: kept, they would cost the registers of the second thread block.
    DEVICE static void load_window(float (&values)[SAMPLES][PARTS], const float* window) {
#pragma unroll
        for (int i = 0; i < SAMPLES; ++i) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int sample = part * HOP + static_cast<int>(opaque(place(i)));
                values[i][part] = exists(i) ? load_global<float>(window + sample) : 0.0f;
            }
        }
    }

    // The open sums of the three hops at the front; the others begin at zero.
    DEVICE void open(const float* open_sums) {
#pragma unroll
        for (int i = 0; i < SAMPLES; ++i) {
#pragma unroll
            for (int hop = 0; hop < FRAMES + PARTS - 1; ++hop) {
                const bool kept = open_sums != nullptr && hop < PARTS - 1 && exists(i);
                hops[i][hop] = kept ? load_global_fresh<float>(open_sums + hop * HOP + place(i)) : 0.0f;
            }
        }
    }

    DEVICE void add(int ahead, unsigned frame_smem, const float (&window)[SAMPLES][PARTS]) {
#pragma unroll
        for (int i = 0; i < SAMPLES; ++i) {
            if (!exists(i)) continue;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const float sample = load_sample(frame_smem, part * HOP + place(i));
                hops[i][ahead + part] = fused_multiply_add(sample, window[i][part], hops[i][ahead + part]);
            }
        }
    }

    // Hop `ahead` from the front, divided by the sum of the squared windows of those of its frames that exist.
    DEVICE void write(int ahead, int hop, const VocosSpan& span, const VocosOutput& output,
                      const float* inverse) const {
        if (hop < span.first_hop || hop >= span.end_hop) return;
        int existing = 0;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            if (hop >= part && hop - part < span.frames) existing |= 1 << part;
        }
        const long long start = static_cast<long long>(span.output + hop - span.first_hop) * HOP;
#pragma unroll
        for (int i = 0; i < SAMPLES; ++i) {
            if (!exists(i)) continue;
            const float value = hops[i][ahead] * load_global<float>(inverse + existing * HOP + place(i));
            if (output.samples != nullptr) store_global(output.samples + start + place(i), value);
            if (output.pcm != nullptr) store_global(output.pcm + start + place(i), to_pcm(value));
        }
    }

    // The first `count` hops are done.
    DEVICE void advance(int count) {
#pragma unroll
        for (int i = 0; i < SAMPLES; ++i) {
#pragma unroll
            for (int hop = 0; hop < FRAMES + PARTS - 1; ++hop) {
                float next = 0.0f;
#pragma unroll
                for (int by = 1; by <= FRAMES; ++by) {
                    if (by == count && hop + by < FRAMES + PARTS - 1) next = hops[i][hop + by];
                }
                hops[i][hop] = next;
            }
        }
    }

    DEVICE void keep(float* open_sums) const {
#pragma unroll
        for (int i = 0; i < SAMPLES; ++i) {
            if (!exists(i)) continue;
#pragma unroll
            for (int hop = 0; hop < PARTS - 1; ++hop) store_global(open_sums + hop * HOP + place(i), hops[i][hop]);
        }
    }
};

DEVICE VocosSpan load_span(const VocosSpan* spans) {
    const uint4 low = load_global_fresh<uint4>(spans + blockIdx.x);
    const uint4 high = load_global_fresh<uint4>(reinterpret_cast<const char*>(spans + blockIdx.x) + 16);
    return {static_cast<int>(low.x),  static_cast<int>(low.y),  static_cast<int>(low.z),  static_cast<int>(low.w),
            static_cast<int>(high.x), static_cast<int>(high.y), static_cast<int>(high.z), static_cast<int>(high.w)};
}

DEVICE VocosOutput load_output(const VocosOutput* output) {
    const uint4 v = load_global_fresh<uint4>(output);
    return {reinterpret_cast<float*>(static_cast<unsigned long long>(v.y) << 32 | v.x),
            reinterpret_cast<short*>(static_cast<unsigned long long>(v.w) << 32 | v.z)};
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    vocos_istft(const __grid_constant__ VocosIstftParams params) {
    grid_dependency_launch();
    const VocosSpan span = load_span(params.spans);
    const VocosOutput output = load_output(params.output);
    Sums sums;
    grid_dependency_wait();

    constexpr int OPEN = (PARTS - 1) * HOP;
    sums.open(span.open >= 0 ? params.open + static_cast<long long>(span.open) * OPEN : nullptr);
    const unsigned smem = shared_base();
    for (int first = span.first_frame; first < span.end_hop; first += FRAMES) {
        const int count = span.end_hop - first < FRAMES ? span.end_hop - first : FRAMES;
        const int self = static_cast<int>(opaque(threadIdx.x));  // so that no address is kept from batch to batch
        const int own = self / BUTTERFLIES, thread = self % BUTTERFLIES;
        const int frame = first + own;
        const bool works = own < count && frame >= 0 && frame < span.frames;
        const unsigned frame_smem = smem + own * FRAME_BYTES;
        if (works) {
            const long long row = span.row + frame - span.first_frame;
            store_points(params.spectrum + row * params.row_stride, frame_smem, thread, params.roots);
        }
        sync_block();  // the points are written
        inverse_fft<1>(frame_smem, thread, params.roots, works);
        float window[SAMPLES][PARTS];
        Sums::load_window(window, params.window);
#pragma unroll
        for (int i = 0; i < FRAMES; ++i) {
            const bool exists = i < count && first + i >= 0 && first + i < span.frames;
            if (exists) sums.add(i, smem + i * FRAME_BYTES, window);
        }
        sync_block();  // the samples are read
#pragma unroll
        for (int i = 0; i < FRAMES; ++i) sums.write(i, first + i, span, output, params.inverse);
        sums.advance(count);
    }
    if (span.keep >= 0) sums.keep(params.open + static_cast<long long>(span.keep) * OPEN);
}

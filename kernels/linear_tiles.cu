// y = x Wᵀ for many rows, with a fused end: throughput is everything.
//
// A block owns BLOCK_ROWS x BLOCK_FEATURES outputs and walks the depth in steps of 64, STAGES - 1 of them on their way
// through asynchronous copies. Weights come packed, as runs of 512 bytes that one 128-bit read of a warp turns into
// fragments; activations are rows of 128 bytes whose 16-byte piece c lies at place c XOR (row mod 8), read by ldmatrix
// without conflicts. The first stages of weights are asked for before the wait for the kernels before.
//
// The products have rows on the long side (m16n8k16: 16 rows x 8 features): a packed tile of weights is two right
// operands, words 0 and 2 those of its features 0-7, words 1 and 3 of 8-15. So the accumulators of a lane are the units
// of linear_ends.cuh as they stand, and the end needs no shared memory.
//
// Neighbouring blocks share rows: all weights stay in the second-level cache, and each row comes from memory once.
//
// Compile-time: DTYPE_FP16 or DTYPE_BF16; END; NORM; BLOCK_FEATURES, BLOCK_ROWS; FEATURE_WARPS, ROW_WARPS, how the warps
// divide them; STAGES; MIN_BLOCKS of a multiprocessor; RAGGED.
// Launch (soprano_cupy/gpu/linear.py): grid (features / BLOCK_FEATURES, rows / BLOCK_ROWS).
#include "device.cuh"
#include "linear_params.cuh"
#include "linear_ends.cuh"

constexpr int WARPS = FEATURE_WARPS * ROW_WARPS, THREADS = WARPS * WARP_LANES;
constexpr int WARP_TILES = BLOCK_FEATURES / FEATURE_WARPS / TILE_FEATURES;  // packed tiles along a warp's features
constexpr int STRIPS = BLOCK_ROWS / ROW_WARPS / 16;                         // of 16 rows each
constexpr int STEP_FRAGMENTS = DEPTH_STEP / 16;

// Shared memory, in bytes; soprano_cupy/gpu/linear.py counts the same.
constexpr int FRAGMENT_BYTES = WARP_LANES * 16;
constexpr int TILE_BYTES = STEP_FRAGMENTS * FRAGMENT_BYTES;  // one step of one packed tile
constexpr int WEIGHT_BYTES = BLOCK_FEATURES / TILE_FEATURES * TILE_BYTES;
constexpr int ROW_BYTES = DEPTH_STEP * 2, ROW_PIECES = ROW_BYTES / 16;
constexpr int STAGE_BYTES = WEIGHT_BYTES + BLOCK_ROWS * ROW_BYTES;
constexpr int FACTORS_AT = STAGES * STAGE_BYTES;  // a float for each row, with NORM

// Copies COUNT pieces of 16 bytes a thread: source(i), valid(i) and the place target + i * distance. Without asynchronous
// copies all loads are issued before the first store.
template <int COUNT, typename Source, typename Valid>
DEVICE void copy_pieces(unsigned target, int distance, Source source, Valid valid) {
#if __CUDA_ARCH__ >= 800
#pragma unroll
    for (int i = 0; i < COUNT; ++i) copy_async_16(target + i * distance, source(i), valid(i));
#else
    uint4 held[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        held[i] = make_uint4(0u, 0u, 0u, 0u);
        if (valid(i)) held[i] = load_global<uint4>(source(i));
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) store_shared<uint4>(target + i * distance, held[i]);
#endif
}

// Weights of a block on their way: this thread's pieces of each step.
struct WeightCopies {
    static constexpr int TILE_PIECES = TILE_BYTES / 16, TILES_AT_ONCE = THREADS / TILE_PIECES;
    static constexpr int COUNT = BLOCK_FEATURES / TILE_FEATURES / TILES_AT_ONCE;
    static_assert(THREADS % TILE_PIECES == 0 && BLOCK_FEATURES / TILE_FEATURES % TILES_AT_ONCE == 0, "whole passes");

    const unsigned char* first;
    long long tile_stride;  // bytes, of TILES_AT_ONCE tiles
    int tiles_left;         // from this thread's first one on
    unsigned target;

    DEVICE WeightCopies(const LinearParams& params, unsigned smem) {
        const int tile = threadIdx.x / TILE_PIECES, first_tile = blockIdx.x * (BLOCK_FEATURES / TILE_FEATURES) + tile;
        const long long tile_bytes = static_cast<long long>(params.depth) * TILE_FEATURES * 2;
        first = static_cast<const unsigned char*>(params.weights) + first_tile * tile_bytes +
                threadIdx.x % TILE_PIECES * 16;
        tile_stride = TILES_AT_ONCE * tile_bytes;
        tiles_left = (params.features + TILE_FEATURES - 1) / TILE_FEATURES - first_tile;
        target = smem + threadIdx.x * 16;
    }
    DEVICE void issue(int step, int stage) const {
        copy_pieces<COUNT>(
            target + stage * STAGE_BYTES, THREADS * 16,
            [&](int i) { return first + step * TILE_BYTES + i * tile_stride; },
            [&](int i) { return i * TILES_AT_ONCE < tiles_left; });
    }
};

// Activations of a block on their way.
struct RowCopies {
    static constexpr int ROWS_AT_ONCE = THREADS / ROW_PIECES, COUNT = BLOCK_ROWS / ROWS_AT_ONCE;
    static_assert(ROWS_AT_ONCE % 8 == 0 && BLOCK_ROWS % ROWS_AT_ONCE == 0, "whole passes, equal swizzles");

    const unsigned char* first;
    long long row_stride;  // bytes, of ROWS_AT_ONCE rows
    int rows_left;         // from this thread's first one on
    unsigned target;

    DEVICE RowCopies(const LinearParams& params, unsigned smem, int first_row) {
        const int row = threadIdx.x / ROW_PIECES, piece = threadIdx.x % ROW_PIECES;
        const long long row_bytes = static_cast<long long>(params.input_stride) * 2;
        first = static_cast<const unsigned char*>(params.input) + (first_row + row) * row_bytes + piece * 16;
        row_stride = ROWS_AT_ONCE * row_bytes;
        rows_left = params.rows - first_row - row;
        target = smem + WEIGHT_BYTES + row * ROW_BYTES + ((piece ^ (row & 7)) << 4);
    }
    DEVICE void issue(int step, int stage) const {
        copy_pieces<COUNT>(
            target + stage * STAGE_BYTES, ROWS_AT_ONCE * ROW_BYTES,
            [&](int i) { return first + step * ROW_BYTES + i * row_stride; },
            [&](int i) { return i * ROWS_AT_ONCE < rows_left; });
    }
};

typedef float Sums[STRIPS][WARP_TILES][2][4];  // of a strip and a tile: its features 0-7 and 8-15

// One step of the depth. rows_smem: this lane's row of ldmatrix; weights_smem: its words of the warp's first tile.
DEVICE void multiply_step(Sums& sums, unsigned rows_smem, unsigned weights_smem) {
#pragma unroll
    for (int k = 0; k < STEP_FRAGMENTS; ++k) {
        unsigned a[STRIPS][4];
        uint4 b[WARP_TILES];
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) load_matrix_x4(a[s], (rows_smem ^ (k << 5)) + s * 16 * ROW_BYTES);
#pragma unroll
        for (int n = 0; n < WARP_TILES; ++n) {
            b[n] = load_shared<uint4>(weights_smem + n * TILE_BYTES + k * FRAGMENT_BYTES);
        }
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
#pragma unroll
            for (int n = 0; n < WARP_TILES; ++n) {
                mma_16x8x16(sums[s][n][0], a[s], b[n].x, b[n].z);
                mma_16x8x16(sums[s][n][1], a[s], b[n].y, b[n].w);
            }
        }
    }
}

// What is finished at a time: eight rows of two tiles. Their residual stream is asked for LOOKAHEAD pieces ahead.
struct Piece {
    static constexpr int TILES = 2, HALVES = 2 * STRIPS, COUNT = HALVES * WARP_TILES / TILES, LOOKAHEAD = 2;
    static_assert(WARP_TILES % TILES == 0, "whole pieces");

    Share residual[TILES];

    // Pieces go down the rows first, so that the constants of two tiles are held at a time.
    DEVICE static EndPlace place(const LinearParams& params, int index, int first_row, int first_tile) {
        const int row = first_row + index % HALVES * 8 + lane_index() / 4;
        return EndPlace(params, row, row < params.rows, first_tile + index / HALVES * TILES);
    }
    DEVICE void load(const LinearParams& params, int index, int first_row, int first_tile) {
        if constexpr (NEEDS_RESIDUAL) {
            const EndPlace here = place(params, index, first_row, first_tile);
#pragma unroll
            for (int n = 0; n < TILES; ++n) residual[n] = here.load_residual(n);
        }
    }
};

// factors_smem: of the warp's first row.
DEVICE void finish(const LinearParams& params, const Sums& sums, int first_row, int first_tile, unsigned factors_smem) {
    constexpr int TILES = Piece::TILES, HALVES = Piece::HALVES, RING = Piece::LOOKAHEAD + 1;
    Constants constants[TILES];
    Piece pieces[RING];
#pragma unroll
    for (int i = 0; i < Piece::LOOKAHEAD; ++i) pieces[i].load(params, i, first_row, first_tile);
#pragma unroll
    for (int i = 0; i < Piece::COUNT; ++i) {
        const int half = i % HALVES, tile = i / HALVES * TILES, ahead = i + Piece::LOOKAHEAD;
        if (ahead < Piece::COUNT) pieces[ahead % RING].load(params, ahead, first_row, first_tile);
        if (half == 0) {
#pragma unroll
            for (int n = 0; n < TILES; ++n) constants[n].load(params, first_tile + tile + n);
        }
        const float factor = NORM ? load_shared<float>(factors_smem + (8 * half + lane_index() / 4) * 4) : 1.0f;
        Share product[TILES];
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            const int d = half % 2 * 2;
            product[n].low = make_float2(sums[half / 2][tile + n][0][d], sums[half / 2][tile + n][0][d + 1]);
            product[n].high = make_float2(sums[half / 2][tile + n][1][d], sums[half / 2][tile + n][1][d + 1]);
        }
        finish_row<TILES, true>(Piece::place(params, i, first_row, first_tile), product, factor, constants,
                                pieces[i % RING].residual);
        sync_warp();  // keeps the compiler from spreading the arithmetic of pieces over one another's registers
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    linear_tiles(const __grid_constant__ LinearParams params) {
    grid_dependency_launch();
    const unsigned smem = shared_base();
    const int lane = lane_index(), first_row = blockIdx.y * BLOCK_ROWS, steps = params.depth / DEPTH_STEP;
    const WeightCopies weights(params, smem);
    const RowCopies rows(params, smem, first_row);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < steps) weights.issue(stage, stage);
    }
    grid_dependency_wait();  // the activations, sums and residual stream of the kernels before are written
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < steps) rows.issue(stage, stage);
        copy_async_commit();  // the first group has all these weights
    }
    if constexpr (NORM) {
#pragma unroll 1
        for (int row = threadIdx.x / 4; row < BLOCK_ROWS; row += THREADS / 4) {
            const float factor = norm_factor(params, first_row + row, first_row + row < params.rows);
            if ((lane & 3) == 0) store_shared<float>(smem + FACTORS_AT + row * 4, factor);
        }
    }

    const int feature_warp = warp_index() % FEATURE_WARPS, row_warp = warp_index() / FEATURE_WARPS;
    const int warp_row = row_warp * STRIPS * 16, warp_tile = feature_warp * WARP_TILES;
    const int matrix_row = warp_row + (lane & 15);  // ldmatrix: rows first, then along them
    const unsigned rows_smem = smem + WEIGHT_BYTES + matrix_row * ROW_BYTES + (((lane >> 4) ^ (matrix_row & 7)) << 4);
    const unsigned weights_smem = smem + warp_tile * TILE_BYTES + lane * 16;
    Sums sums = {};
    int stage = 0, next_stage = STAGES - 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<STAGES - 2>();
        sync_block();  // this step has landed for all, and the stage of the step before is free
        if (step + STAGES - 1 < steps) {
            weights.issue(step + STAGES - 1, next_stage);
            rows.issue(step + STAGES - 1, next_stage);
        }
        copy_async_commit();  // also of nothing, so that as many groups are always behind a step's
        multiply_step(sums, rows_smem + stage * STAGE_BYTES, weights_smem + stage * STAGE_BYTES);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
    }
    finish(params, sums, first_row + warp_row, blockIdx.x * (BLOCK_FEATURES / TILE_FEATURES) + warp_tile,
           smem + FACTORS_AT + warp_row * 4);
}

/* Products by AMX tiles: 16 rows of 64 bytes of activations times 64 bytes x 16 outputs of weights an instruction.
 *
 * A panel of a tile is exactly what TILELOADD takes, so weights stream from memory into tiles without a copy. A
 * row's result does not depend on the rows beside it, so one arithmetic serves one row and many. */
#if defined(__x86_64__)
#include "products_amx.h"

#include <immintrin.h>
#include <string.h>

#include "products_vnni.h"
#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-int8,amx-bf16")

#define HEIGHT 16 /* rows of a full tile */
#define UNROLL _Pragma("GCC unroll 4")

/* The layout that LDTILECFG reads. */
typedef struct TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t heights[16];
} TileShapes;

/* Shape all tiles as 64 bytes x 16 rows but those in the bit set `activations`, sums included, which get `height`. */
static void shape_tiles(unsigned activations, int height) {
    TileShapes shapes = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        shapes.row_bytes[t] = 64;
        shapes.heights[t] = activations >> t & 1 ? height : HEIGHT;
    }
    _tile_loadconfig(&shapes);
}

void amx_release(void) { _tile_release(); }

/* Tile numbers are part of the instructions: FOR_TILE(i, action) is action(i) for a constant i. */
#define FOR_TILE(i, action)      \
    do {                         \
        if ((i) == 0) action(0); \
        if ((i) == 1) action(1); \
        if ((i) == 2) action(2); \
        if ((i) == 3) action(3); \
        if ((i) == 4) action(4); \
        if ((i) == 5) action(5); \
    } while (0)

/* ---- bfloat16: sums in tiles 0 to 5, activations in 6, weights in 7 ---- */

/* out = `row_tiles` x 16 rows of bfloat16 times panels; the last row tile may be lower, as the tiles are shaped. */
static inline __attribute__((always_inline)) void bfloat16_block(const int row_tiles, const int panels, const Matrix *m,
                                                                 const uint8_t *weights, const Operand *x, int first,
                                                                 float *out) {
    const uint16_t *bits = x->bits + (size_t)first * x->stride;
#define CLEAR(sums) _tile_zero(sums)
    UNROLL for (int i = 0; i < row_tiles * panels; i++) FOR_TILE(i, CLEAR);
    for (int t = 0; t < m->tiles; t++, weights += m->tile_bytes, bits += 2 * WORDS) {
        UNROLL for (int p = 0; p < panels; p++) {
            const uint8_t *ahead = weights + TILES_AHEAD * m->tile_bytes + p * PANEL_BYTES;
            for (int i = 0; i < PANEL_BYTES; i += 64) _mm_prefetch((const char *)ahead + i, _MM_HINT_T0);
            _tile_loadd(7, weights + p * PANEL_BYTES, 64);
            UNROLL for (int r = 0; r < row_tiles; r++) {
                if (row_tiles > 1 || p == 0)
                    _tile_loadd(6, bits + (size_t)r * HEIGHT * x->stride, x->stride * sizeof *bits);
#define MULTIPLY(sums) _tile_dpbf16ps(sums, 6, 7)
                FOR_TILE(r * panels + p, MULTIPLY);
            }
        }
    }
#define STORE(sums) \
    _tile_stored(sums, out + sums / panels * HEIGHT * BLOCK + sums % panels * PANEL, BLOCK * sizeof *out)
    UNROLL for (int i = 0; i < row_tiles * panels; i++) FOR_TILE(i, STORE);
}

static void bfloat16_2x2(const Matrix *m, const uint8_t *weights, const Operand *x, int first, float *out) {
    bfloat16_block(2, 2, m, weights, x, first, out);
}

static void bfloat16_3x2(const Matrix *m, const uint8_t *weights, const Operand *x, int first, float *out) {
    bfloat16_block(3, 2, m, weights, x, first, out);
}

/* Two panels times 2 or 3 full row tiles: each weight is loaded once for all of them. */
static void bfloat16_tall(int row_tiles, int panels, const Matrix *m, const uint8_t *weights, const Operand *x,
                          int first, float *out) {
    shape_tiles(0, 0);
    for (int p = 0; p < panels; p += 2) {
        (row_tiles == 3 ? bfloat16_3x2 : bfloat16_2x2)(m, weights + p * PANEL_BYTES, x, first, out + p * PANEL);
    }
}

void multiply_bfloat16_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                           float *tile) {
    const uint8_t *weights = matrix_tile(m, block, 0) + panel * PANEL_BYTES;
    float *out = tile + panel * PANEL;
    int full = rows / HEIGHT, r = 0;
    if (full >= 2 && panels % 2 == 0) {
        bfloat16_tall(full, panels, m, weights, x, first, out);
        r = full * HEIGHT;
    }
    for (; r < rows; r += HEIGHT) {
        shape_tiles(0x4f, rows - r < HEIGHT ? rows - r : HEIGHT);
        if (panels == PANELS) {
            bfloat16_block(1, PANELS, m, weights, x, first + r, out + r * BLOCK);
            continue;
        }
        for (int p = 0; p < panels; p++) {
            bfloat16_block(1, 1, m, weights + p * PANEL_BYTES, x, first + r, out + r * BLOCK + p * PANEL);
        }
    }
}

/* ---- int8: sums in tiles 0 and 1, activations in 2, the weights of four panels in 4 to 7 ---- */

#define INT8_TILES_AHEAD 8 /* into the second-level cache, which holds more than the first has room for */

/* Sums of one group of rows and one tile of inputs, on their way from tiles to float32. */
typedef struct Pending {
    const int32_t *sums; /* (2 rows, 64): `rows` rows of high sums, then of low sums */
    const uint16_t *scales;
    const int32_t *offsets;
    float *out;
    int rows;
} Pending;

/* out += scale * (128 * high + low - offset). `ahead`: weights to ask for meanwhile, a share with every row, as a
 * burst of requests would hold up the loads behind it. */
static inline __attribute__((always_inline)) void add_scaled(const int panels, const Pending *pending,
                                                             ptrdiff_t offset_stride, const uint8_t *ahead) {
    int share = ahead ? panels * PANEL_BYTES / pending->rows : 0;
    __m512 scale[PANELS];
    UNROLL for (int p = 0; p < panels; p++) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(pending->scales + p * PANEL)));
        scale[p] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    for (int r = 0; r < pending->rows; r++) {
        const int32_t *high = pending->sums + r * BLOCK, *low = high + pending->rows * BLOCK;
        __m512i offset = _mm512_set1_epi32(pending->offsets[r * offset_stride]);
        float *out = pending->out + r * BLOCK;
        for (int i = 0; i < share; i += 64) _mm_prefetch((const char *)ahead + r * share + i, _MM_HINT_T1);
        UNROLL for (int p = 0; p < panels; p++) {
            __m512i sum = _mm512_slli_epi32(_mm512_load_si512(high + p * PANEL), 7);
            sum = _mm512_sub_epi32(_mm512_add_epi32(sum, _mm512_load_si512(low + p * PANEL)), offset);
            __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[p], _mm512_loadu_ps(out + p * PANEL));
            _mm512_storeu_ps(out + p * PANEL, total);
        }
    }
}

/* out (rows, panels * 16) += rows times panels, the rows in full groups of 8 or a single group of fewer.
 *
 * Tile after tile of the inputs, the weights stay in tile registers for all groups. A group's sums are read back
 * only after the next group's products have begun: loads cannot be served from tile stores still under way. */
static inline __attribute__((always_inline)) void int8_block(const int panels, const Matrix *m, const uint8_t *weights,
                                                             const uint16_t *scales, const Operand *x, int first,
                                                             int rows, float *out) {
    int32_t buffers[2][HEIGHT * BLOCK] __attribute__((aligned(64)));
    int group_rows = rows < OPERAND_GROUP ? rows : OPERAND_GROUP, turn = 0;
    Pending pending = {.rows = 0};
    for (int t = 0; t < m->tiles; t++, weights += m->tile_bytes, scales += m->tile_bytes / 2) {
#define LOAD(p, words) _tile_loadd(words, weights + p * PANEL_BYTES, 64)
        LOAD(0, 4);
        if (panels == PANELS) {
            LOAD(1, 5);
            LOAD(2, 6);
            LOAD(3, 7);
        }
        for (int r = 0; r < rows; r += group_rows, turn ^= 1) {
            int32_t *sums = buffers[turn];
            _tile_loadd(2, operand_high(x, first + r) + t * INT8_GROUP, x->stride);
#define MULTIPLY_STORE(p, words, products) \
    _tile_zero(products);                  \
    _tile_dpbsud(products, 2, words);      \
    _tile_stored(products, sums + p * PANEL, BLOCK * sizeof *sums)
            MULTIPLY_STORE(0, 4, 0);
            if (panels == PANELS) {
                MULTIPLY_STORE(1, 5, 1);
                MULTIPLY_STORE(2, 6, 0);
                MULTIPLY_STORE(3, 7, 1);
            }
            const uint8_t *ahead = r == 0 ? weights + INT8_TILES_AHEAD * m->tile_bytes : NULL;
            if (pending.rows) add_scaled(panels, &pending, x->tiles, ahead);
            const int32_t *offsets = x->sums + (size_t)(first + r) * x->tiles + t;
            pending = (Pending){sums, scales, offsets, out + r * BLOCK, group_rows};
        }
    }
    add_scaled(panels, &pending, x->tiles, NULL);
}

static void int8_rows(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                      float *out) {
    const uint8_t *weights = matrix_tile(m, block, 0) + panel * PANEL_BYTES;
    const uint16_t *scales = (const uint16_t *)(matrix_tile(m, block, 0) + PANELS * PANEL_BYTES) + panel * PANEL;
    for (int r = 0; r < rows; r++) memset(out + r * BLOCK, 0, panels * PANEL * sizeof *out);
    shape_tiles(0x07, rows < OPERAND_GROUP ? 2 * rows : HEIGHT);
    if (panels == PANELS) {
        int8_block(PANELS, m, weights, scales, x, first, rows, out);
    } else {
        for (int p = 0; p < panels; p++) {
            int8_block(1, m, weights + p * PANEL_BYTES, scales + p * PANEL, x, first, rows, out + p * PANEL);
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < panels * PANEL; c++) out[r * BLOCK + c] *= x->scales[first + r];
    }
}

void multiply_int8_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                       float *tile) {
    int full = rows / OPERAND_GROUP * OPERAND_GROUP;
    if (rows == 1) { /* the same integers, without the tiles' way through memory */
        multiply_int8_vnni(m, block, panel, panels, x, first, rows, tile);
        return;
    }
    if (full > 0) int8_rows(m, block, panel, panels, x, first, full, tile + panel * PANEL);
    if (full < rows) {
        int8_rows(m, block, panel, panels, x, first + full, rows - full, tile + full * BLOCK + panel * PANEL);
    }
}

TARGET_END
#endif

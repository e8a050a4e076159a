/* Products by AMX tiles: 16 rows of 64 bytes of activations times 64 bytes x 16 outputs of weights an instruction.
 *
 * A panel of a tile is exactly what TILELOADD takes, so weights stream from memory into tiles without a copy. A
 * row's result does not depend on the rows beside it, so one arithmetic serves one row and many. */
#if defined(__x86_64__)
#include "products_amx.h"

#include <immintrin.h>
#include <string.h>

#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-int8,amx-bf16")

#define TILE_HEIGHT 16
/* Tile registers: 0 to 3 sums of four panels, 4 activations, 5 to 7 weights. */
#define ACTIVATIONS 4

/* The layout that LDTILECFG reads. */
typedef struct TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t heights[16];
} TileShapes;

/* Shape the tiles for `height` rows of activations. */
static void shape_tiles(int height) {
    TileShapes shapes = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        shapes.row_bytes[t] = 64;
        shapes.heights[t] = t <= ACTIVATIONS ? height : TILE_HEIGHT;
    }
    _tile_loadconfig(&shapes);
}

void amx_release(void) { _tile_release(); }

/* Tile numbers are part of the instructions: a panel's sums and weights by name. */
#define FOR_PANEL(p, action) \
    switch (p) {             \
        case 0:              \
            action(0, 5);    \
            break;           \
        case 1:              \
            action(1, 6);    \
            break;           \
        case 2:              \
            action(2, 7);    \
            break;           \
        case 3:              \
            action(3, 5);    \
            break;           \
    }

static inline __attribute__((always_inline)) void clear_sums(const int panels) {
#define CLEAR(sums, weights) _tile_zero(sums)
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) FOR_PANEL(p, CLEAR)
}

static inline __attribute__((always_inline)) void store_sums(const int panels, void *target, size_t stride) {
#define STORE(sums, weights) _tile_stored(sums, (uint8_t *)target + 64 * sums, stride)
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) FOR_PANEL(p, STORE)
}

/* out (rows, panels * 16) of row stride 64 = rows of bfloat16 times panels. */
static inline __attribute__((always_inline)) void bfloat16_block(const int panels, const Matrix *m,
                                                                 const uint8_t *weights, const Operand *x, int first,
                                                                 float *out) {
    const uint16_t *bits = x->bits + (size_t)first * x->stride;
    clear_sums(panels);
    for (int t = 0; t < m->tiles; t++, weights += m->tile_bytes, bits += 2 * WORDS) {
        _tile_loadd(ACTIVATIONS, bits, x->stride * sizeof *bits);
#define MULTIPLY(sums, words)                                   \
    _tile_loadd(words, weights + sums * PANEL_BYTES, 64); \
    _tile_dpbf16ps(sums, ACTIVATIONS, words)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) FOR_PANEL(p, MULTIPLY)
#undef MULTIPLY
    }
    store_sums(panels, out, BLOCK * sizeof *out);
}

void multiply_bfloat16_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                           float *tile) {
    const uint8_t *weights = matrix_tile(m, block, 0) + panel * PANEL_BYTES;
    for (int r = 0; r < rows; r += TILE_HEIGHT) {
        float *out = tile + r * BLOCK + panel * PANEL;
        shape_tiles(rows - r < TILE_HEIGHT ? rows - r : TILE_HEIGHT);
        if (panels == PANELS) {
            bfloat16_block(PANELS, m, weights, x, first + r, out);
        } else {
            for (int p = 0; p < panels; p++) {
                bfloat16_block(1, m, weights + p * PANEL_BYTES, x, first + r, out + p * PANEL);
            }
        }
    }
}

/* out += scale * (128 * high + low - offset) for one tile's sums: `rows` rows of high sums, then of low sums. */
static inline __attribute__((always_inline)) void add_scaled(const int panels, const int32_t *sums, int rows,
                                                             const uint16_t *scales, const int32_t *offsets,
                                                             ptrdiff_t offset_stride, float *out) {
#pragma GCC unroll 4
    for (int p = 0; p < panels; p++) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(scales + p * PANEL)));
        __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        for (int r = 0; r < rows; r++) {
            const int32_t *high = sums + r * BLOCK + p * PANEL, *low = high + rows * BLOCK;
            float *target = out + r * BLOCK + p * PANEL;
            __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high), 7), _mm512_load_si512(low));
            sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(offsets[r * offset_stride]));
            _mm512_storeu_ps(target, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(target)));
        }
    }
}

/* out (rows, panels * 16) += one group of up to 8 rows times panels; `weights` and `scales` of the first panel. */
static inline __attribute__((always_inline)) void int8_block(const int panels, const Matrix *m, const uint8_t *weights,
                                                             const uint16_t *scales, const Operand *x, int first,
                                                             int rows, float *out) {
    int32_t sums[TILE_HEIGHT * BLOCK] __attribute__((aligned(64)));
    const int8_t *bytes = operand_high(x, first);
    const int32_t *offsets = x->sums + (size_t)first * x->tiles;
    for (int t = 0; t < m->tiles; t++, weights += m->tile_bytes, scales += m->tile_bytes / 2) {
        clear_sums(panels);
        _tile_loadd(ACTIVATIONS, bytes + t * INT8_GROUP, x->stride);
#define MULTIPLY(sums, words)                                   \
    _tile_loadd(words, weights + sums * PANEL_BYTES, 64); \
    _tile_dpbsud(sums, ACTIVATIONS, words)
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) FOR_PANEL(p, MULTIPLY)
#undef MULTIPLY
        store_sums(panels, sums, BLOCK * sizeof *sums);
        add_scaled(panels, sums, rows, scales, offsets + t, x->tiles, out);
    }
}

void multiply_int8_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                       float *tile) {
    const uint8_t *weights = matrix_tile(m, block, 0) + panel * PANEL_BYTES;
    const uint16_t *scales = (const uint16_t *)(matrix_tile(m, block, 0) + PANELS * PANEL_BYTES) + panel * PANEL;
    for (int r = 0; r < rows; r += OPERAND_GROUP) {
        int count = rows - r < OPERAND_GROUP ? rows - r : OPERAND_GROUP;
        float *out = tile + r * BLOCK + panel * PANEL;
        for (int i = 0; i < count; i++) memset(out + i * BLOCK, 0, panels * PANEL * sizeof *out);
        shape_tiles(2 * count);
        if (panels == PANELS) {
            int8_block(PANELS, m, weights, scales, x, first + r, count, out);
        } else {
            for (int p = 0; p < panels; p++) {
                int8_block(1, m, weights + p * PANEL_BYTES, scales + p * PANEL, x, first + r, count, out + p * PANEL);
            }
        }
        for (int i = 0; i < count; i++) {
            for (int c = 0; c < panels * PANEL; c++) out[i * BLOCK + c] *= x->scales[first + r + i];
        }
    }
}

TARGET_END
#endif

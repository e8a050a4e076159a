/* Products by AMX tiles: 16 rows of 64 bytes of activations times 64 bytes x 16 outputs of weights an instruction.
 *
 * A panel of a tile is exactly what TILELOADD takes, so weights stream from memory into tiles without a copy. A
 * row's result does not depend on the rows beside it, so one arithmetic serves one row and many. */
#include "products_amx.h"

#if AMX_COMPILER

#include <immintrin.h>
#include <string.h>

#include "products_vnni.h"
#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-int8,amx-bf16")

#define HEIGHT 16   /* rows of a full tile */
#define FAR_AHEAD 8 /* tiles, into the second-level cache, which holds more than the first has room for */
#define UNROLL _Pragma("GCC unroll 8")

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
    __asm__ volatile("" : : "r"(&shapes) : "memory"); /* GCC believes that only the first 8 bytes are read */
    _tile_loadconfig(&shapes);
}

void amx_release(void) { _tile_release(); }

/* Tiles are cleared by loading zeros: TILEZERO waits, on some runs, until all products under way are done. */
static const uint8_t ZEROS[PANEL_BYTES] __attribute__((aligned(64)));

/* Ask for weights to come: a panel's share of a tile, far ahead while much is computed with each. */
static inline __attribute__((always_inline)) void ask_ahead(const uint8_t *weights, const Matrix *m, int far) {
    const char *ahead = (const char *)weights + (far ? FAR_AHEAD : TILES_AHEAD) * m->tile_bytes;
    for (int i = 0; i < PANEL_BYTES; i += 64) {
        if (far) _mm_prefetch(ahead + i, _MM_HINT_T1);
        if (!far) _mm_prefetch(ahead + i, _MM_HINT_T0);
    }
}

/* ---- bfloat16 ---- */

/* out = up to 16 rows, as the tiles are shaped, times 1 or 4 panels: sums in tiles 0 to 3, activations in 6, weights
 * in 7. */
static inline __attribute__((always_inline)) void bfloat16_row(const int panels, const Matrix *m,
                                                               const uint8_t *weights, const Operand *x, int first,
                                                               float *out) {
    const uint16_t *bits = x->bits + (size_t)first * x->stride;
    _tile_loadd(0, ZEROS, 64);
    if (panels == PANELS) {
        _tile_loadd(1, ZEROS, 64);
        _tile_loadd(2, ZEROS, 64);
        _tile_loadd(3, ZEROS, 64);
    }
#define MULTIPLY(p)                                  \
    ask_ahead(weights + (p) * PANEL_BYTES, m, 0);    \
    _tile_loadd(7, weights + (p) * PANEL_BYTES, 64); \
    _tile_dpbf16ps(p, 6, 7)
    for (int t = 0; t < m->tiles; t++, weights += m->tile_bytes, bits += 2 * WORDS) {
        _tile_loadd(6, bits, x->stride * sizeof *bits);
        MULTIPLY(0);
        if (panels == PANELS) {
            MULTIPLY(1);
            MULTIPLY(2);
            MULTIPLY(3);
        }
    }
    _tile_stored(0, out, BLOCK * sizeof *out);
    if (panels == PANELS) {
        _tile_stored(1, out + PANEL, BLOCK * sizeof *out);
        _tile_stored(2, out + 2 * PANEL, BLOCK * sizeof *out);
        _tile_stored(3, out + 3 * PANEL, BLOCK * sizeof *out);
    }
}

/* out = 32 rows times 2 panels: sums in tiles 0 to 3, activations in 4 and 5, weights in 6 and 7, each loaded once. */
static inline __attribute__((always_inline)) void bfloat16_square(const int fresh, const Matrix *m,
                                                                  const uint8_t *weights, const Operand *x, int first,
                                                                  float *out) {
    const uint16_t *upper = x->bits + (size_t)first * x->stride, *lower = upper + (size_t)HEIGHT * x->stride;
    ptrdiff_t stride = x->stride * sizeof *upper;
    float *out_lower = out + HEIGHT * BLOCK;
    _tile_loadd(0, ZEROS, 64);
    _tile_loadd(1, ZEROS, 64);
    _tile_loadd(2, ZEROS, 64);
    _tile_loadd(3, ZEROS, 64);
    for (int t = 0; t < m->tiles; t++, weights += m->tile_bytes, upper += 2 * WORDS, lower += 2 * WORDS) {
        _tile_loadd(4, upper, stride);
        _tile_loadd(6, weights, 64);
        if (fresh) ask_ahead(weights, m, 1);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + PANEL_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower, stride);
        if (fresh) ask_ahead(weights + PANEL_BYTES, m, 1);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, BLOCK * sizeof *out);
    _tile_stored(1, out + PANEL, BLOCK * sizeof *out);
    _tile_stored(2, out_lower, BLOCK * sizeof *out);
    _tile_stored(3, out_lower + PANEL, BLOCK * sizeof *out);
}

/* 32 rows at a time while more than 16 are left and panels come in pairs. The last of them may lie beyond the
 * operand's: the memory is there, as bits take half of an operand's, and the results are dropped. Only the first rows
 * bring weights into the cache. Returns how many rows are done. */
static int bfloat16_squares(const Matrix *m, const uint8_t *weights, int panels, const Operand *x, int first, int rows,
                            float *out) {
    int r = 0;
    if (rows <= HEIGHT || panels % 2) return 0;
    shape_tiles(0, 0);
    for (; rows - r > HEIGHT; r += 2 * HEIGHT) {
        for (int p = 0; p < panels; p += 2) {
            const uint8_t *pair = weights + p * PANEL_BYTES;
            float *target = out + r * BLOCK + p * PANEL;
            if (first + r == 0) bfloat16_square(1, m, pair, x, first + r, target);
            if (first + r > 0) bfloat16_square(0, m, pair, x, first + r, target);
        }
    }
    return r;
}

void multiply_bfloat16_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                           float *tile) {
    const uint8_t *weights = matrix_tile(m, block, 0) + panel * PANEL_BYTES;
    float *out = tile + panel * PANEL;
    for (int r = bfloat16_squares(m, weights, panels, x, first, rows, out); r < rows; r += HEIGHT) {
        shape_tiles(0x4f, rows - r < HEIGHT ? rows - r : HEIGHT);
        if (panels == PANELS) {
            bfloat16_row(PANELS, m, weights, x, first + r, out + r * BLOCK);
            continue;
        }
        for (int p = 0; p < panels; p++) {
            bfloat16_row(1, m, weights + p * PANEL_BYTES, x, first + r, out + r * BLOCK + p * PANEL);
        }
    }
}

/* ---- int8: sums in tiles 0 and 1, activations in 2, weights in 4 and 5 ---- */

#define PAIR 2 /* panels that a group of rows takes together: 8 x 2 totals stay in registers */

/* What a group of up to 8 rows sums up for a pair of panels, in registers from the first tile to the last. */
typedef struct Totals {
    __m512 rows[OPERAND_GROUP][PAIR];
} Totals;

/* totals += scale * (128 * high + low). sums: (16, 32), 8 rows of high sums, then of low sums. `ahead`: weights to ask for meanwhile, two lines with every vector, as a burst of
 * requests would hold up the loads behind it. */
static inline __attribute__((always_inline)) void add_scaled(const int panels, Totals *totals, const int32_t *sums,
                                                             const uint16_t *scales, const uint8_t *ahead) {
    __m512 scale[PAIR];
    UNROLL for (int p = 0; p < panels; p++) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(scales + p * PANEL)));
        scale[p] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    UNROLL for (int r = 0; r < OPERAND_GROUP; r++) {
        UNROLL for (int p = 0; p < panels; p++) {
            const int32_t *high = sums + (r * PAIR + p) * PANEL, *low = high + OPERAND_GROUP * PAIR * PANEL;
            __m512i sum = _mm512_slli_epi32(_mm512_load_si512(high), 7);
            sum = _mm512_add_epi32(sum, _mm512_load_si512(low));
            totals->rows[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[p], totals->rows[r][p]);
            if (ahead) {
                _mm_prefetch((const char *)ahead + (r * panels + p) * 128, _MM_HINT_T1);
                _mm_prefetch((const char *)ahead + (r * panels + p) * 128 + 64, _MM_HINT_T1);
            }
        }
    }
}

/* out (rows, panels * 16) of row stride 64 = a group of up to 8 rows times 1 or 2 panels. A tile's sums are read back
 * once the next tile's products have begun: loads cannot be served from tile stores still under way. */
static inline __attribute__((always_inline)) void int8_group(const int panels, const int fresh, const Matrix *m,
                                                             const uint8_t *weights, const uint16_t *scales,
                                                             const Operand *x, int first, int rows, float *out) {
    int32_t sums[2][HEIGHT * PAIR * PANEL] __attribute__((aligned(64)));
    const int8_t *bytes = operand_high(x, first);
    Totals totals;
    UNROLL for (int r = 0; r < OPERAND_GROUP; r++) {
        UNROLL for (int p = 0; p < PAIR; p++) totals.rows[r][p] = _mm512_setzero_ps();
    }
    for (int t = 0; t < m->tiles; t++, weights += m->tile_bytes, scales += m->tile_bytes / 2) {
        _tile_loadd(2, bytes + t * INT8_GROUP, x->stride);
        _tile_loadd(4, weights, 64);
        _tile_loadd(0, ZEROS, 64);
        _tile_dpbssd(0, 2, 4);
        if (panels == PAIR) {
            _tile_loadd(5, weights + PANEL_BYTES, 64);
            _tile_loadd(1, ZEROS, 64);
            _tile_dpbssd(1, 2, 5);
        }
        _tile_stored(0, sums[t % 2], PAIR * PANEL * sizeof **sums);
        if (panels == PAIR) _tile_stored(1, sums[t % 2] + PANEL, PAIR * PANEL * sizeof **sums);
        if (fresh) _mm_prefetch((const char *)scales + FAR_AHEAD * m->tile_bytes, _MM_HINT_T1);
        if (t == 0) continue;
        const uint8_t *ahead = fresh ? weights + FAR_AHEAD * m->tile_bytes : NULL;
        add_scaled(panels, &totals, sums[1 - t % 2], scales - m->tile_bytes / 2, ahead);
    }
    add_scaled(panels, &totals, sums[1 - m->tiles % 2], scales - m->tile_bytes / 2, NULL);
    UNROLL for (int r = 0; r < OPERAND_GROUP; r++) {
        if (r >= rows) continue;
        __m512 scale = _mm512_set1_ps(x->scales[first + r]);
        UNROLL for (int p = 0; p < panels; p++) {
            _mm512_storeu_ps(out + r * BLOCK + p * PANEL, _mm512_mul_ps(totals.rows[r][p], scale));
        }
    }
}

/* Rows times panels, all groups of rows on each pair of panels in turn: the first brings it into the cache. */
static void int8_groups(const Matrix *m, const uint8_t *weights, const uint16_t *scales, int panels, const Operand *x,
                        int first, int rows, float *out) {
    for (int r = 0; r < rows; r += OPERAND_GROUP) {
        int count = rows - r < OPERAND_GROUP ? rows - r : OPERAND_GROUP;
        if (panels == 1) {
            int8_group(1, 1, m, weights, scales, x, first + r, count, out + r * BLOCK);
        } else if (r == 0) {
            int8_group(PAIR, 1, m, weights, scales, x, first, count, out);
        } else {
            int8_group(PAIR, 0, m, weights, scales, x, first + r, count, out + r * BLOCK);
        }
    }
}

#define VNNI_MAX_ROWS 2 /* the same integers, without the tiles' way through memory: up to here memory is the limit */

void multiply_int8_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                       float *tile) {
    if (rows <= VNNI_MAX_ROWS) {
        multiply_int8_vnni(m, block, panel, panels, x, first, rows, tile);
        return;
    }
    shape_tiles(0, 0);
    for (int p = panel; p < panel + panels; p += PAIR) {
        const uint8_t *base = matrix_tile(m, block, 0);
        const uint16_t *scales = (const uint16_t *)(base + PANELS * PANEL_BYTES) + p * PANEL;
        int count = panel + panels - p < PAIR ? panel + panels - p : PAIR;
        int8_groups(m, base + p * PANEL_BYTES, scales, count, x, first, rows, tile + p * PANEL);
    }
}

TARGET_END
#endif

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
#define CLEAR(sums) _tile_loadd(sums, ZEROS, 64)
    UNROLL for (int i = 0; i < row_tiles * panels; i++) FOR_TILE(i, CLEAR);
    for (int t = 0; t < m->tiles; t++, weights += m->tile_bytes, bits += 2 * WORDS) {
        UNROLL for (int p = 0; p < panels; p++) {
            const char *ahead = (const char *)weights + (row_tiles > 1 ? FAR_AHEAD : TILES_AHEAD) * m->tile_bytes;
            for (int i = p * PANEL_BYTES; i < (p + 1) * PANEL_BYTES; i += 64) {
                if (row_tiles > 1) _mm_prefetch(ahead + i, _MM_HINT_T1);
                if (row_tiles == 1) _mm_prefetch(ahead + i, _MM_HINT_T0);
            }
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

/* Pairs of panels times 2 or 3 row tiles, each weight loaded once for all of them. The last tile may reach beyond the
 * operand's rows: the memory is there, as bits take half of an operand's, and the results are dropped. */
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
    if (rows > HEIGHT && panels % 2 == 0) {
        bfloat16_tall(ceil_div(rows, HEIGHT), panels, m, weights, x, first, out);
        return;
    }
    for (int r = 0; r < rows; r += HEIGHT) {
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

/* Products of a few rows with panels of 16 outputs, in float32.
 *
 * Every output is one sum in the order of the inputs, whatever the number of rows and panels that a register
 * block takes at once: results do not depend on the batch. */

#define PANEL_VECTORS (PANEL / VEC_FLOATS)

/* Panels to multiply with, weights or cached keys and values alike; strides count 32-bit words. */
typedef struct Panels {
    const uint32_t *data;
    int tiles, words; /* tiles, and words of inputs in each */
    ptrdiff_t tile_stride, word_stride, panel_stride;
} Panels;

/* Rows that a register block takes, and panels beside them: as many sums as registers hold, at least 8 to hide
 * the latency of a fused multiply-add. */
#if VEC_FLOATS == 16
#define MAX_ROWS 6
#define PANELS_FOR(rows) 4
#elif VEC_FLOATS == 8
#define MAX_ROWS 6
#define PANELS_FOR(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1)
#elif defined(__aarch64__)
#define MAX_ROWS 6
#define PANELS_FOR(rows) ((rows) == 1 ? 2 : 1)
#else
#define MAX_ROWS 3
#define PANELS_FOR(rows) ((rows) == 1 ? 2 : 1)
#endif

#define UNROLL _Pragma("GCC unroll 8")

/* sums += one input of each row times its weights. */
INLINE void multiply_add(const int rows, const int panels, const vf *weights, const float *x, ptrdiff_t x_stride,
                         vf sums[][PANELS * PANEL_VECTORS]) {
    UNROLL for (int r = 0; r < rows; r++) {
        vf input = v_set(x[r * x_stride]);
        UNROLL for (int v = 0; v < panels * PANEL_VECTORS; v++) sums[r][v] += weights[v] * input;
    }
}

/* out (rows, panels * 16) = x (rows, inputs) times panels of float32, or of bfloat16 pairs. */
INLINE void product_block(const int rows, const int panels, const int pairs, const float *x, ptrdiff_t x_stride,
                          const Panels *w, const uint32_t *data, float *out, ptrdiff_t out_stride) {
    vf sums[MAX_ROWS][PANELS * PANEL_VECTORS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < panels * PANEL_VECTORS; v++) sums[r][v] = v_set(0);
    }
    for (int tile = 0; tile < w->tiles; tile++) {
        const uint32_t *word = data + tile * w->tile_stride;
        for (int k = 0; k < w->words; k++, word += w->word_stride) {
            vu bits[PANELS * PANEL_VECTORS];
            vf weights[PANELS * PANEL_VECTORS];
            UNROLL for (int v = 0; v < panels * PANEL_VECTORS; v++) {
                const uint32_t *from = word + v / PANEL_VECTORS * w->panel_stride + v % PANEL_VECTORS * VEC_FLOATS;
                memcpy(&bits[v], from, sizeof bits[v]);
                if (v * VEC_FLOATS % PANEL == 0) __builtin_prefetch(from + TILES_AHEAD * w->tile_stride);
                weights[v] = pairs ? v_low_half(bits[v]) : (vf)bits[v];
            }
            multiply_add(rows, panels, weights, x, x_stride, sums);
            if (pairs) {
                UNROLL for (int v = 0; v < panels * PANEL_VECTORS; v++) weights[v] = v_high_half(bits[v]);
                multiply_add(rows, panels, weights, x + 1, x_stride, sums);
            }
            x += 1 + pairs;
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < panels * PANEL_VECTORS; v++) {
            v_store(out + r * out_stride + v * VEC_FLOATS, sums[r][v]);
        }
    }
}

#define PRODUCT_CASE(rows)                                                                                        \
    case rows:                                                                                                    \
        for (; panel + PANELS_FOR(rows) <= panels; panel += PANELS_FOR(rows))                                     \
            product_block(rows, PANELS_FOR(rows), pairs, x, x_stride, w, w->data + panel * w->panel_stride,       \
                          out + panel * PANEL, out_stride);                                                       \
        for (; panel < panels; panel++)                                                                           \
            product_block(rows, 1, pairs, x, x_stride, w, w->data + panel * w->panel_stride, out + panel * PANEL, \
                          out_stride);                                                                            \
        break;

INLINE void product_any(const int pairs, int rows, int panels, const float *x, ptrdiff_t x_stride, const Panels *w,
                        float *out, ptrdiff_t out_stride) {
    while (rows > 0) {
        int count = rows < MAX_ROWS ? rows : MAX_ROWS, panel = 0;
        switch (count) {
            PRODUCT_CASE(1)
            PRODUCT_CASE(2)
            PRODUCT_CASE(3)
#if MAX_ROWS > 3
            PRODUCT_CASE(4)
            PRODUCT_CASE(5)
            PRODUCT_CASE(6)
#endif
        }
        rows -= count;
        x += count * x_stride;
        out += count * out_stride;
    }
}

static __attribute__((noinline)) void product_float32(int rows, int panels, const float *x, ptrdiff_t x_stride,
                                                      const Panels *w, float *out, ptrdiff_t out_stride) {
    product_any(0, rows, panels, x, x_stride, w, out, out_stride);
}

static __attribute__((noinline)) void product_bfloat16(int rows, int panels, const float *x, ptrdiff_t x_stride,
                                                       const Panels *w, float *out, ptrdiff_t out_stride) {
    product_any(1, rows, panels, x, x_stride, w, out, out_stride);
}

static Panels weight_panels(const Matrix *m, int block, int panel) {
    return (Panels){
        .data = (const uint32_t *)(matrix_tile(m, block, 0) + panel * PANEL_BYTES),
        .tiles = m->tiles,
        .words = WORDS,
        .tile_stride = m->tile_bytes / 4,
        .word_stride = PANEL,
        .panel_stride = PANEL_BYTES / 4,
    };
}

/* tile (rows, 64) = rows first, ... of x times panels of a block of float32 weights; the other columns stay. */
static void multiply_float32(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                             float *tile) {
    Panels w = weight_panels(m, block, panel);
    product_float32(rows, panels, x->floats + (size_t)first * x->stride, x->stride, &w, tile + panel * PANEL, BLOCK);
}

/* The same for bfloat16 weights, widened on the way, and float32 rows. */
static void multiply_bfloat16(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                              float *tile) {
    Panels w = weight_panels(m, block, panel);
    product_bfloat16(rows, panels, x->floats + (size_t)first * x->stride, x->stride, &w, tile + panel * PANEL, BLOCK);
}

/* Row r of an operand for float32 arithmetic: a zero-padded copy. */
static void prepare_floats(const float *row, int inputs, Operand *x, int r) {
    float *target = x->floats + (size_t)r * x->stride;
    memcpy(target, row, inputs * sizeof *row);
    memset(target + inputs, 0, (x->stride - inputs) * sizeof *row);
}

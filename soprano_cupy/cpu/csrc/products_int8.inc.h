/* Products of int8 weights with rows of 15-bit integers: exact in 32 bits inside a group of 64 inputs, then
 * scaled and summed in float32 group after group. The integers are the same on every instruction set.
 *
 * |X| <= 16383 and a weight byte is at most 127: 64 products stay below 2^27. */

/* Lanes of two 16-bit products added, a.low b.low + a.high b.high. */
INLINE vi v_madd16(vi a, vi b) {
#if defined(__x86_64__) && VEC_FLOATS == 16
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__x86_64__) && VEC_FLOATS == 8
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__) && VEC_FLOATS == 4
    return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return (vi)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

/* a * b + c, rounded once wherever there is an instruction for it. */
INLINE vf v_multiply_add(vf a, vf b, vf c) {
#if defined(__x86_64__) && VEC_FLOATS == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__x86_64__) && VEC_FLOATS == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

#if VEC_FLOATS == 16
#define INT8_ROWS 4
#define INT8_PANELS 4
#else
#define INT8_ROWS (VEC_FLOATS / 2)
#define INT8_PANELS 1
#endif

INLINE vf v_scales(const uint8_t *tile, int panel, int v) {
    return v_widen((const uint16_t *)(tile + PANELS * PANEL_BYTES) + panel * PANEL + v * VEC_FLOATS);
}

/* out += scale * sum of X * byte for one tile. x: (rows, stride) words. */
INLINE void int8_block(const int rows, const int panels, const uint8_t *tile, int panel, const int16_t *x,
                       ptrdiff_t x_stride, float *out) {
    vi sums[INT8_ROWS][INT8_PANELS * PANEL_VECTORS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < panels * PANEL_VECTORS; v++) sums[r][v] = v_set_int(0);
    }
    const uint8_t *weights = tile + panel * PANEL_BYTES;
    for (int k = 0; k < WORDS; k++) {
        UNROLL for (int v = 0; v < panels * PANEL_VECTORS; v++) {
            vi bytes;
            if (v * VEC_FLOATS % PANEL == 0) {
                __builtin_prefetch(weights + v / PANEL_VECTORS * PANEL_BYTES + k * PANEL * 4 +
                                   TILES_AHEAD * INT8_TILE_BYTES);
            }
            memcpy(&bytes, weights + v / PANEL_VECTORS * PANEL_BYTES + k * PANEL * 4 + v % PANEL_VECTORS * sizeof bytes,
                   sizeof bytes);
            vs halves = (vs)bytes; /* 16-bit lanes: inputs 0 and 2 in the low bytes, 1 and 3 in the high ones */
            vi even = (vi)((halves << 8) >> 8), odd = (vi)(halves >> 8);
            UNROLL for (int r = 0; r < rows; r++) {
                int32_t pairs[2];
                memcpy(pairs, x + r * x_stride + 4 * k, sizeof pairs);
                sums[r][v] += v_madd16(even, v_set_int(pairs[0])) + v_madd16(odd, v_set_int(pairs[1]));
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int v = 0; v < panels * PANEL_VECTORS; v++) {
            float *target = out + r * BLOCK + v * VEC_FLOATS;
            vf value = __builtin_convertvector(sums[r][v], vf);
            vf scale = v_scales(tile, panel + v / PANEL_VECTORS, v % PANEL_VECTORS);
            v_store(target, v_multiply_add(value, scale, v_load(target)));
        }
    }
}

#define INT8_CASE(count)                                                                                     \
    case count:                                                                                              \
        for (; p + INT8_PANELS <= panels; p += INT8_PANELS)                                                  \
            int8_block(count, INT8_PANELS, weights, panel + p, words, x->stride, out + p * PANEL);           \
        for (; p < panels; p++) int8_block(count, 1, weights, panel + p, words, x->stride, out + p * PANEL); \
        break;

/* The sums of a tile's products begin at zero and end scaled by their row. */
INLINE void int8_clear(float *out, int rows, int columns) {
    for (int r = 0; r < rows; r++) memset(out + r * BLOCK, 0, columns * sizeof *out);
}

INLINE void int8_finish(float *out, int rows, int columns, const float *scales) {
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c += VEC_FLOATS)
            v_store(out + r * BLOCK + c, v_load(out + r * BLOCK + c) * scales[r]);
    }
}

static void multiply_int8(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                          float *tile) {
    for (int r = 0; r < rows; r += INT8_ROWS) {
        int count = rows - r < INT8_ROWS ? rows - r : INT8_ROWS;
        float *out = tile + r * BLOCK + panel * PANEL;
        int8_clear(out, count, panels * PANEL);
        for (int t = 0; t < m->tiles; t++) {
            const uint8_t *weights = matrix_tile(m, block, t);
            const int16_t *words = x->words + (size_t)(first + r) * x->stride + t * INT8_GROUP;
            int p = 0;
            switch (count) {
                INT8_CASE(1)
                INT8_CASE(2)
#if INT8_ROWS > 2
                INT8_CASE(3)
                INT8_CASE(4)
#endif
            }
        }
        int8_finish(out, count, panels * PANEL, x->scales + first + r);
    }
}

#define INT15_LIMIT 16383.0f

/* The largest magnitude of a row; NaN if the row holds one, as NaN's bits are above all numbers'. */
static float row_magnitude(const float *row, int count) {
    vi largest = v_set_int(0);
    int i = 0, rest = 0;
    for (; i + VEC_FLOATS <= count; i += VEC_FLOATS) {
        vi bits = (vi)v_abs(v_load(row + i));
        vi above = bits > largest;
        largest = (bits & above) | (largest & ~above);
    }
    int32_t lanes[VEC_FLOATS];
    memcpy(lanes, &largest, sizeof lanes);
    for (int lane = 0; lane < VEC_FLOATS; lane++) rest = lanes[lane] > rest ? lanes[lane] : rest;
    for (; i < count; i++) {
        int32_t bits;
        memcpy(&bits, row + i, sizeof bits);
        bits &= 0x7fffffff;
        rest = bits > rest ? bits : rest;
    }
    float magnitude;
    memcpy(&magnitude, &rest, sizeof magnitude);
    return magnitude;
}

/* What takes a row to 15 bits; rows too small to divide by count as zero, and NaN stays in the row's scale. */
static float row_inverse(float magnitude) { return magnitude > 1e-30f ? INT15_LIMIT / magnitude : 0; }

/* 64 values, zero-padded, as whole numbers X of 15 bits. */
INLINE void round_group(const float *row, int count, float inverse, int32_t whole[INT8_GROUP]) {
    float values[INT8_GROUP] = {0};
    memcpy(values, row, (count < INT8_GROUP ? count : INT8_GROUP) * sizeof *row);
    for (int i = 0; i < INT8_GROUP; i += VEC_FLOATS) {
        vf scaled = v_load(values + i) * inverse;
        ROUNDED(scaled);
        vi x = __builtin_convertvector(v_round(scaled), vi);
        memcpy(whole + i, &x, sizeof x);
    }
}

/* Row r of an operand as words, inputs 0 2 1 3 of every four: even and odd bytes are multiplied apart. */
static void prepare_words(const float *row, int inputs, Operand *x, int r) {
    float magnitude = row_magnitude(row, inputs);
    float inverse = row_inverse(magnitude);
    x->scales[r] = magnitude / INT15_LIMIT;
    for (int t = 0; t < x->tiles; t++) {
        int32_t whole[INT8_GROUP];
        int16_t *words = x->words + (size_t)r * x->stride + t * INT8_GROUP;
        round_group(row + t * INT8_GROUP, inputs - t * INT8_GROUP, inverse, whole);
        for (int i = 0; i < INT8_GROUP; i += 4) {
            words[i] = (int16_t)whole[i];
            words[i + 1] = (int16_t)whole[i + 2];
            words[i + 2] = (int16_t)whole[i + 1];
            words[i + 3] = (int16_t)whole[i + 3];
        }
    }
}

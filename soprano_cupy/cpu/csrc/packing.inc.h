/* Weights on their way from a checkpoint's rows to a packed tile. */

typedef int8_t vb __attribute__((vector_size(VEC_FLOATS)));

/* `count` values of a row from input `first` on as float32, zero-padded to 64. */
static void read_values(const void *row, int dtype, int first, int count, float values[INT8_GROUP]) {
    int i = 0;
    memset(values, 0, INT8_GROUP * sizeof *values);
    if (dtype == FLOAT32) {
        memcpy(values, (const float *)row + first, count * sizeof *values);
        return;
    }
    const uint16_t *bits = (const uint16_t *)row + first;
    for (; i + VEC_FLOATS <= count; i += VEC_FLOATS) v_store(values + i, v_widen(bits + i));
    for (; i < count; i++) values[i] = bfloat16_value(bits[i]);
}

#define SMALLEST_WEIGHT 1e-30f /* groups of nothing larger count as zero: their scale could not be divided by */

/* 64 values to bytes and their scale: the largest magnitude maps to 127, none is clipped. */
static uint16_t quantise(const float values[INT8_GROUP], int8_t bytes[INT8_GROUP]) {
    float magnitude = row_magnitude(values, INT8_GROUP);
    uint16_t scale = magnitude > SMALLEST_WEIGHT ? bfloat16_above(magnitude / 127.0f) : 0;
    float inverse = scale ? 1.0f / bfloat16_value(scale) : 0;
    for (int i = 0; i < INT8_GROUP; i += VEC_FLOATS) {
        vf scaled = v_load(values + i) * inverse;
        ROUNDED(scaled);
        vb narrow = __builtin_convertvector(__builtin_convertvector(v_round(scaled), vi), vb);
        memcpy(bytes + i, &narrow, sizeof narrow);
    }
    return scale;
}

/* One output's share of a tile: `count` inputs of its row from `first` on, as words; returns the scale of int8.
 * row: float32 or bfloat16 values, NULL for an output of zeros. */
static uint16_t encode_words(int dtype, const void *row, int row_dtype, int first, int count, uint32_t words[WORDS]) {
    float values[INT8_GROUP];
    if (row == NULL) {
        memset(words, 0, WORDS * sizeof *words);
        return 0;
    }
    if (dtype == row_dtype && count == tile_depth(dtype)) { /* nothing to convert */
        memcpy(words, (const uint8_t *)row + (size_t)first * (dtype == FLOAT32 ? 4 : 2), WORDS * sizeof *words);
        return 0;
    }
    read_values(row, row_dtype, first, count, values);
    if (dtype == INT8) return quantise(values, (int8_t *)words);
    if (dtype == FLOAT32) {
        memcpy(words, values, WORDS * sizeof *words);
        return 0;
    }
    for (int i = 0; i < 2 * WORDS; i += VEC_FLOATS) v_narrow((uint16_t *)words + i, v_load(values + i));
    return 0;
}

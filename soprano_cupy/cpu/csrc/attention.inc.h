/* Attention over cached keys in splits of 128 keys (FlashAttention's tiling, Dao et al., 2022; its split over keys
 * for decoding): no matrix of queries x keys exists, and the query heads of a group read their keys once.
 *
 * Splits start at multiples of 128 and are merged in order, so a row's result depends on its own sequence alone,
 * however the rows were batched, cut into calls or spread over threads. */

/* softmax(scores) of one row, unnormalised: scores become exp(score - max), zero from `visible` on. */
static void softmax_split(float *scores, int visible, int columns, float *max, float *sum) {
    vf largest = v_set(-INFINITY), total = v_set(0);
    vi lane = v_set_int(0);
    for (int i = 0; i < VEC_FLOATS; i++) lane[i] = i;
    for (int c = 0; c < columns; c += VEC_FLOATS) {
        vf s = v_select(lane + c < visible, v_load(scores + c), v_set(-INFINITY));
        largest = v_max(largest, s);
        v_store(scores + c, s);
    }
    *max = v_largest(largest);
    for (int c = 0; c < columns; c += VEC_FLOATS) {
        vf p = v_select(lane + c < visible, v_exp(v_load(scores + c) - *max), v_set(0));
        total += p;
        v_store(scores + c, p);
    }
    *sum = v_sum(total);
}

/* O = softmax(Q K^T) V of one split, unnormalised, with each row's maximum and sum.
 *
 * q: (rows, head_dim), scaled. visible: (rows,) keys that each row sees, counted from the sequence's start.
 * scores: (rows, 128) scratch. partial: (rows, partial_stride): value_dim sums, the maximum, the sum. */
static void attend_split(const HeadCache *head, const float *q, int rows, const int *visible, int split, float *scores,
                         float *partial) {
    int dim = head->head_dim, first = split * ATTENTION_SPLIT, keys = 0;
    for (int r = 0; r < rows; r++) keys = visible[r] - first > keys ? visible[r] - first : keys;
    keys = keys < ATTENTION_SPLIT ? keys : ATTENTION_SPLIT;
    int panels = ceil_div(keys, PANEL), pairs = head->dtype == BFLOAT16, stride = partial_stride(head->value_dim);
    size_t element = cache_element_bytes(head->dtype);
    Panels k = {
        .data = (const uint32_t *)(head->keys + element * first * dim),
        .tiles = 1,
        .words = pairs ? dim / 2 : dim,
        .word_stride = PANEL,
        .panel_stride = (ptrdiff_t)PANEL * dim / (pairs ? 2 : 1),
    };
    Panels v = {
        .data = (const uint32_t *)(head->values + element * first * head->value_dim),
        .tiles = 1,
        .words = pairs ? ceil_div(keys, 2) : keys,
        .word_stride = head->value_dim,
        .panel_stride = PANEL,
    };
    /* S = Q K^T */
    (pairs ? product_bfloat16 : product_float32)(rows, panels, q, dim, &k, scores, ATTENTION_SPLIT);
    for (int r = 0; r < rows; r++) {
        float *state = partial + r * stride + head->value_dim;
        softmax_split(scores + r * ATTENTION_SPLIT, visible[r] - first, panels * PANEL, state, state + 1);
    }
    /* O = P V */
    (pairs ? product_bfloat16 : product_float32)(rows, head->value_dim / PANEL, scores, ATTENTION_SPLIT, &v, partial,
                                                 stride);
}

/* The online softmax: take a later split's maximum, sum and accumulator into an earlier one's. */
static void merge_partials(float *into, const float *from, int rows, int value_dim) {
    int stride = partial_stride(value_dim);
    for (int r = 0; r < rows; r++, into += stride, from += stride) {
        float *state = into + value_dim;
        const float *later = from + value_dim;
        if (later[0] == -INFINITY) continue; /* the row sees nothing of that split */
        float max = state[0] > later[0] ? state[0] : later[0];
        float old = v_exp(v_set(state[0] - max))[0], new = v_exp(v_set(later[0] - max))[0];
        for (int d = 0; d < value_dim; d++) into[d] = into[d] * old + from[d] * new;
        state[0] = max;
        state[1] = state[1] * old + later[1] * new;
    }
}

/* out (head_dim,) = accumulator / sum of one row. */
static void normalise_partial(const float *partial, int head_dim, int value_dim, float *out) {
    float scale = 1.0f / partial[value_dim + 1];
    for (int d = 0; d < head_dim; d++) out[d] = partial[d] * scale;
}

/* What happens to single rows of activations between the matrix products, and to a product's tile. */

static float sum_of_squares(const float *x, int count) {
    vf sums[2] = {v_set(0), v_set(0)};
    int i = 0;
    for (; i + 2 * VEC_FLOATS <= count; i += 2 * VEC_FLOATS) {
        vf a = v_load(x + i), b = v_load(x + i + VEC_FLOATS);
        sums[0] += a * a;
        sums[1] += b * b;
    }
    float sum = v_sum(sums[0] + sums[1]);
    for (; i < count; i++) sum += x[i] * x[i];
    return sum;
}

/* out = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, 2019); out may be x. */
static void rms_norm(const float *x, const float *weight, float eps, int count, float *out) {
    float scale = 1.0f / sqrtf(sum_of_squares(x, count) / count + eps);
    for (int i = 0; i < count; i++) out[i] = x[i] * scale * weight[i];
}

/* Layer norm (Ba, Kiros and Hinton, 2016) with the deviation summed after the mean is out; out may be x. */
static void layer_norm(const float *x, const float *weight, const float *bias, float eps, int count, float *out) {
    vf sums = v_set(0);
    int i = 0;
    for (; i + VEC_FLOATS <= count; i += VEC_FLOATS) sums += v_load(x + i);
    float mean = v_sum(sums);
    for (; i < count; i++) mean += x[i];
    mean /= count;
    for (i = 0; i < count; i++) out[i] = x[i] - mean;
    float scale = 1.0f / sqrtf(sum_of_squares(out, count) / count + eps);
    for (i = 0; i < count; i++) out[i] = out[i] * scale * weight[i] + bias[i];
}

/* RMS norm of one head, then the rotary embedding of the pairs (i, i + D/2), then times `scale`, in place.
 * angles: D/2 cosines, then D/2 sines of the row's position. */
static void rotate_head(float *x, const float *weight, float eps, int dim, const float *angles, float scale) {
    int half = dim / 2;
    rms_norm(x, weight, eps, dim, x);
    for (int i = 0; i < half; i++) {
        float low = x[i], high = x[half + i], cosine = angles[i], sine = angles[half + i];
        x[i] = (low * cosine - high * sine) * scale;
        x[half + i] = (high * cosine + low * sine) * scale;
    }
}

/* ---- from a product's tile to its result: columns first, ... of a block, `rows` rows of stride 64 ---- */

static void finish_store(const float *tile, int rows, int columns, float *out, ptrdiff_t stride) {
    for (int r = 0; r < rows; r++) memcpy(out + r * stride, tile + r * BLOCK, columns * sizeof *out);
}

static void finish_add(const float *tile, int rows, int columns, float *out, ptrdiff_t stride) {
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c++) out[r * stride + c] += tile[r * BLOCK + c];
    }
}

/* Two panels, gate and up, become one panel of silu(gate) * up. */
static void finish_swiglu(const float *tile, int rows, float *out, ptrdiff_t stride) {
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < PANEL; c += VEC_FLOATS) {
            vf gate = v_load(tile + r * BLOCK + c), up = v_load(tile + r * BLOCK + PANEL + c);
            v_store(out + r * stride + c, v_silu(gate) * up);
        }
    }
}

static void finish_bias(const float *tile, int rows, int columns, const float *bias, float *out, ptrdiff_t stride) {
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c++) out[r * stride + c] = tile[r * BLOCK + c] + bias[c];
    }
}

/* bias and out reach to the end of the panel. */
static void finish_gelu(const float *tile, int rows, int columns, const float *bias, float *out, ptrdiff_t stride) {
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c += VEC_FLOATS) {
            v_store(out + r * stride + c, v_gelu(v_load(tile + r * BLOCK + c) + v_load(bias + c)));
        }
    }
}

/* out = residual + gamma * (tile + bias). */
static void finish_residual(const float *tile, int rows, int columns, const float *bias, const float *gamma,
                            const float *residual, float *out, ptrdiff_t stride) {
    for (int r = 0; r < rows; r++) {
        for (int c = 0; c < columns; c++) {
            out[r * stride + c] = residual[r * stride + c] + gamma[c] * (tile[r * BLOCK + c] + bias[c]);
        }
    }
}

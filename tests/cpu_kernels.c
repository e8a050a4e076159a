/* The CPU engine's C code by itself, at sizes that fill no tile: for sanitizers, and for machines that are only
 * emulated. tests/test_cpu_sanitizers.py compiles and runs it.
 *
 *   cpu_kernels ISA [RESULTS]
 *
 * ISA: an instruction set, or "all". Exit code 1 and a line for what is wrong. RESULTS: a file for all outputs, each
 * as its number of values and the values, float32. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "bfloat16.h"
#include "decoder.h"
#include "language_model.h"
#include "product.h"

#define COUNT(array) (int)(sizeof(array) / sizeof *(array))

static const char* DTYPE_NAMES[DTYPES] = {"float32", "bfloat16", "int8"};
static int failures;
static FILE* results;

static void require(int right, const char* isa, int dtype, const char* what) {
    if (right) return;
    printf("%s %s: %s\n", isa, DTYPE_NAMES[dtype], what);
    failures++;
}

static void keep(const float* values, size_t count) {
    float header = (float)count;
    if (!results) return;
    fwrite(&header, sizeof header, 1, results);
    fwrite(values, sizeof *values, count, results);
}

/* ---- values ---- */

static uint32_t state;

static uint32_t next_random(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

/* Whole numbers from -8 to 8: exact in every dtype but int8, and so are the sums of their products. */
static float* whole_numbers(size_t count) {
    float* values = malloc(count * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = (float)(int)(next_random() % 17) - 8;
    return values;
}

/* Evenly spread over -size to size. */
static float* random_values(size_t count, float size) {
    float* values = malloc(count * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = size * ((float)next_random() / (1 << 23) - 1);
    return values;
}

static void fill(float* target, size_t count, float base, float size) {
    float* values = random_values(count, size);
    for (size_t i = 0; i < count; i++) target[i] = base + values[i];
    free(values);
}

static void pack_random(const Kernels* k, Matrix* m) {
    float* weights = random_values((size_t)m->outputs * m->inputs, sqrtf(3.0f / m->inputs));
    matrix_pack(k, m, &(Source){weights, FLOAT32, m->outputs, 0, 0}, 1);
    free(weights);
}

/* ---- products ---- */

/* int8 keeps a weight to half of its group's scale, at most 1 / 126 of the largest weight, and an input to half of
 * 1 / 16383 of the row's largest. */
static double allowance(int dtype, const float* w, const float* x, int inputs) {
    double x_sum = 0, w_sum = 0;
    if (dtype != INT8) return 0;
    for (int i = 0; i < inputs; i++) {
        x_sum += fabsf(x[i]);
        w_sum += fabsf(w[i]);
    }
    return 8 * x_sum / 126 / 2 + 8 * w_sum / 16383 / 2 + 1e-4;
}

static void check_product(const Kernels* k, int dtype, int outputs, int inputs, int rows) {
    float *w = whole_numbers((size_t)outputs * inputs), *x = whole_numbers((size_t)rows * inputs);
    float *out = malloc((size_t)rows * outputs * sizeof *out), *one = malloc(outputs * sizeof *one);
    Matrix m = matrix_shape(dtype, outputs, inputs);
    int right = 1, same = 1;
    m.data = map_memory(matrix_bytes(&m), 0);
    matrix_pack(k, &m, &(Source){w, FLOAT32, outputs, 0, 0}, 1);
    product_run(k, &m, x, rows, out);
    for (int r = 0; r < rows; r++) {
        product_run(k, &m, x + (size_t)r * inputs, 1, one);
        same &= memcmp(one, out + (size_t)r * outputs, outputs * sizeof *one) == 0;
        for (int o = 0; o < outputs; o++) {
            double sum = 0;
            for (int i = 0; i < inputs; i++) sum += (double)w[(size_t)o * inputs + i] * x[(size_t)r * inputs + i];
            double error = fabs(sum - out[(size_t)r * outputs + o]);
            right &= error <= allowance(dtype, w + (size_t)o * inputs, x + (size_t)r * inputs, inputs);
        }
    }
    require(right, k->name, dtype, "a product is wrong");
    require(same, k->name, dtype, "a product depends on the rows beside it");
    keep(out, (size_t)rows * outputs);
    unmap_memory(m.data, matrix_bytes(&m));
    free(w);
    free(x);
    free(out);
    free(one);
}

static void check_products(const Kernels* k, int dtype) {
    static const int sizes[][3] = {{1, 1, 1}, {65, 63, 3}, {16, 64, 9}, {130, 100, 50}, {50, 333, 100}, {300, 70, 33}};
    for (int i = 0; i < COUNT(sizes); i++) check_product(k, dtype, sizes[i][0], sizes[i][1], sizes[i][2]);
}

/* ---- the language model ---- */

static const ModelSizes MODEL = {131, 45, 2, 3, 1, 22, 67, 1e-6f};
#define LONGEST 140

static LanguageModel* random_model(const Kernels* k, int dtype) {
    LanguageModel* model = model_create(k, &MODEL, dtype, FLOAT32);
    float angles[LONGEST * 22];
    for (int i = 0; i < model->sizes.layers; i++) {
        Layer* layer = &model->layers[i];
        Matrix* matrices[] = {&layer->qkv, &layer->o, &layer->gate_up, &layer->down};
        for (int j = 0; j < COUNT(matrices); j++) pack_random(k, matrices[j]);
        fill(layer->input_norm, MODEL.hidden, 1, 0.1f);
        fill(layer->post_norm, MODEL.hidden, 1, 0.1f);
        fill(layer->q_norm, MODEL.head_dim, 1, 0.1f);
        fill(layer->k_norm, MODEL.head_dim, 1, 0.1f);
    }
    fill(model->norm, MODEL.hidden, 1, 0.1f);
    fill(model->embeddings, (size_t)MODEL.vocab * MODEL.hidden, 0, 1);
    pack_random(k, &model->head);
    for (int i = 0; i < COUNT(angles); i++) {
        int column = i % 22, turn = column % 11;
        double angle = i / 22 * pow(10000, -turn / 11.0);
        angles[i] = (float)(column < 11 ? cos(angle) : sin(angle));
    }
    model_set_angles(model, angles, LONGEST);
    return model;
}

/* States of sequences of the given lengths: in one call, or token by token. */
static void run_model(LanguageModel* model, const int* lengths, int count, int token_by_token, float* states) {
    KeyValues cache;
    int32_t ids[512], starts[8] = {0}, held[8] = {0};
    cache_create(&cache, model->cache_dtype, MODEL.layers, count, MODEL.kv_heads, MODEL.head_dim, LONGEST);
    cache_poison(&cache);
    for (int s = 0; s < count; s++) {
        starts[s + 1] = starts[s] + lengths[s];
        for (int i = 0; i < lengths[s]; i++) ids[starts[s] + i] = (7 * i + lengths[s]) % MODEL.vocab;
    }
    if (!token_by_token) model_extend(model, &cache, &(Batch){ids, starts, count, held, 0, states});
    for (int i = 0; token_by_token && i < lengths[0]; i++) {
        static const int32_t one[] = {0, 1};
        model_extend(model, &cache, &(Batch){ids + i, one, 1, held, 1, states + (size_t)i * MODEL.hidden});
    }
    cache_free(&cache);
}

static void check_model(const Kernels* k, int dtype) {
    static const int lengths[] = {1, 7, 133};
    LanguageModel* model = random_model(k, dtype);
    size_t count = 141 * MODEL.hidden, bytes = count * sizeof(float);
    float *states = malloc(bytes), *again = malloc(bytes), logits[3 * 131];
    run_model(model, lengths, 3, 0, states);
    keep(states, count);
    for (int threads = 1; threads <= 3; threads += 2) {
        team_resize(threads);
        for (int s = 0, row = 0; s < 3; row += lengths[s++]) {
            size_t size = (size_t)lengths[s] * MODEL.hidden * sizeof(float);
            for (int cut = 0; cut < 2; cut++) {
                run_model(model, lengths + s, 1, cut, again);
                int same = memcmp(again, states + (size_t)row * MODEL.hidden, size) == 0;
                require(same, k->name, dtype, "states depend on threads, batch or calls");
            }
        }
    }
    team_resize(2);
    model_logits(model, states, 3, logits);
    keep(logits, COUNT(logits));
    free(states);
    free(again);
    model_free(model);
}

/* ---- the decoder ---- */

static const DecoderSizes DECODER = {37, 35, 51, 2, 3, 3, 11, 4};

static Decoder* random_decoder(const Kernels* k, int dtype) {
    Decoder* d = decoder_create(k, &DECODER, dtype);
    double window[PARTS * 11];
    pack_random(k, &d->embed);
    pack_random(k, &d->head);
    for (int i = 0; i < DECODER.blocks; i++) {
        Block* b = &d->blocks[i];
        pack_random(k, &b->expand);
        pack_random(k, &b->contract);
        fill(b->kernel, DECODER.block_taps * DECODER.dim, 0, 0.5f);
        fill(b->kernel_bias, DECODER.dim, 0, 0.1f);
        fill(b->norm, DECODER.dim, 1, 0.1f);
        fill(b->norm_bias, DECODER.dim, 0, 0.1f);
        fill(b->expand_bias, DECODER.inner, 0, 0.1f);
        fill(b->contract_bias, DECODER.dim, 0, 0.1f);
        fill(b->gamma, DECODER.dim, 0.5f, 0.1f);
    }
    fill(d->embed_bias, DECODER.dim, 0, 0.1f);
    fill(d->norm, DECODER.dim, 1, 0.1f);
    fill(d->norm_bias, DECODER.dim, 0, 0.1f);
    fill(d->final_norm, DECODER.dim, 1, 0.1f);
    fill(d->final_norm_bias, DECODER.dim, 0, 0.1f);
    fill(d->head_bias, PARTS * DECODER.hop + 2, 0, 0.1f);
    for (int i = 0; i < COUNT(window); i++) window[i] = sin(M_PI * (i + 0.5) / COUNT(window));
    decoder_set_window(d, window);
    return d;
}

/* Samples of `tokens` states, `piece` of them at a time; returns how many. */
static int run_decoder(Decoder* d, const float* states, int tokens, int piece, float* samples) {
    Voice voice;
    int made = 0;
    voice_create(&voice, d);
    for (int at = 0; at < tokens; at += piece) {
        int count = tokens - at < piece ? tokens - at : piece, finish = at + count == tokens;
        int more = voice_samples(&voice, count, finish);
        voice_push(d, &voice, states + (size_t)at * DECODER.input, count, finish, samples + made);
        made += more;
    }
    voice_free(&voice);
    return made;
}

static void check_decoder(const Kernels* k, int dtype) {
    enum { TOKENS = 2 * PIECE_TOKENS, SAMPLES = (TOKENS - 1) * 4 * 11 }; /* the second piece is the largest there is */
    Decoder* d = random_decoder(k, dtype);
    float *states = random_values(TOKENS * DECODER.input, 1), samples[SAMPLES], again[SAMPLES];
    static const int pieces[] = {1, 7, 31};
    require(run_decoder(d, states, TOKENS, PIECE_TOKENS, samples) == SAMPLES, k->name, dtype, "samples are missing");
    keep(samples, SAMPLES);
    for (int i = 0; i < COUNT(pieces); i++) {
        team_resize(1 + i);
        int same = run_decoder(d, states, TOKENS, pieces[i], again) == SAMPLES && !memcmp(samples, again, sizeof again);
        require(same, k->name, dtype, "audio depends on threads or pieces");
    }
    team_resize(2);
    free(states);
    decoder_free(d);
}

int main(int argc, char** argv) {
    const char* names[8];
    int count = kernels_available(names, COUNT(names));
    team_resize(2);
    results = argc > 2 ? fopen(argv[2], "wb") : NULL;
    for (int i = 0; i < count; i++) {
        if (argc > 1 && strcmp(argv[1], "all") && strcmp(argv[1], names[i])) continue;
        const Kernels* k = kernels_find(names[i]);
        for (int dtype = 0; dtype < DTYPES; dtype++) {
            state = 1; /* the same values on every instruction set */
            check_products(k, dtype);
            check_model(k, dtype);
            if (dtype != INT8) check_decoder(k, dtype);
        }
        printf("%s: checked\n", names[i]);
    }
    if (results) fclose(results);
    return failures > 0;
}

#include "decoder.h"

#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "decode.h"

static int bins_of(const DecoderSizes *s) { return PARTS * s->hop / 2 + 1; }

static int padded(int outputs) { return ceil_div(outputs, PANEL) * PANEL; }

static Matrix place_matrix(Arena *arena, int dtype, int outputs, int inputs) {
    Matrix m = matrix_shape(dtype, outputs, inputs);
    m.data = arena_take(arena, matrix_bytes(&m));
    return m;
}

/* Lay all weights into the arena, or count their bytes. */
static void place_weights(Decoder *d, Arena *arena) {
    const DecoderSizes *s = &d->sizes;
    d->embed = place_matrix(arena, d->dtype, s->embed_taps * s->dim, s->input);
    d->embed_bias = arena_floats(arena, s->dim);
    d->norm = arena_floats(arena, s->dim);
    d->norm_bias = arena_floats(arena, s->dim);
    for (int i = 0; i < s->blocks; i++) {
        Block *b = &d->blocks[i];
        b->kernel = arena_floats(arena, (size_t)s->block_taps * s->dim);
        b->kernel_bias = arena_floats(arena, s->dim);
        b->norm = arena_floats(arena, s->dim);
        b->norm_bias = arena_floats(arena, s->dim);
        b->expand = place_matrix(arena, d->dtype, s->inner, s->dim);
        b->contract = place_matrix(arena, d->dtype, s->dim, s->inner);
        b->expand_bias = arena_floats(arena, padded(s->inner));
        b->contract_bias = arena_floats(arena, s->dim);
        b->gamma = arena_floats(arena, s->dim);
    }
    d->final_norm = arena_floats(arena, s->dim);
    d->final_norm_bias = arena_floats(arena, s->dim);
    d->head = place_matrix(arena, d->dtype, 2 * bins_of(s), s->dim);
    d->head_bias = arena_floats(arena, 2 * bins_of(s));
    d->window = arena_floats(arena, PARTS * s->hop);
    for (int i = 0; i < 4; i++) d->envelope[i] = arena_floats(arena, s->hop);
}

void decoder_set_window(Decoder *d, const double *window) {
    int hop = d->sizes.hop;
    for (int i = 0; i < hop; i++) {
        double squares[PARTS];
        for (int part = 0; part < PARTS; part++) {
            double value = window[part * hop + i];
            d->window[part * hop + i] = (float)(value / (PARTS * hop));
            squares[part] = value * value;
        }
        double middle = squares[1] + squares[2]; /* frame h - 1 lies under hop h with its part 3, frame h + 2 with 0 */
        d->envelope[0][i] = (float)(middle + squares[0] + squares[3]);
        d->envelope[1][i] = (float)(middle + squares[0]);
        d->envelope[2][i] = (float)(middle + squares[3]);
        d->envelope[3][i] = (float)middle;
    }
}

Decoder *decoder_create(const Kernels *kernels, const DecoderSizes *sizes, int dtype) {
    Decoder *d = calloc(1, sizeof *d);
    if (!d) return NULL;
    d->kernels = kernels;
    d->sizes = *sizes;
    d->dtype = dtype;
    d->blocks = calloc(sizes->blocks, sizeof *d->blocks);
    if (!d->blocks || fft_plan(&d->fft, PARTS * sizes->hop)) {
        decoder_free(d);
        return NULL;
    }
    Arena arena = {0};
    place_weights(d, &arena);
    d->memory_bytes = arena.used;
    d->memory = map_memory(arena.used, 1);
    if (!d->memory || buffers_create(d)) {
        decoder_free(d);
        return NULL;
    }
    arena = (Arena){.memory = d->memory};
    place_weights(d, &arena);
    return d;
}

void decoder_free(Decoder *d) {
    if (!d) return;
    buffers_free(d);
    unmap_memory(d->memory, d->memory_bytes);
    fft_free(&d->fft);
    free(d->blocks);
    free(d);
}

/* ---- what a stage has given out, from what went in ---- */

/* Tokens that frames still to come are made from: the last one and those under the first convolution's margins. */
int kept_tokens(const DecoderSizes *s) { return 1 + (s->embed_taps + s->frames_per_token - 3) / s->frames_per_token; }

/* Frames that `tokens` states give by interpolation. */
int interpolated_frames(const DecoderSizes *s, int tokens) {
    return tokens ? (tokens - 1) * s->frames_per_token + 1 : 0;
}

/* Frames a convolution has given out once `frames` went in: those whose window is known. */
int convolved_frames(int frames, int taps, int finished) {
    int held = finished ? 0 : taps / 2;
    return frames > held ? frames - held : 0;
}

int stage_frames(const DecoderSizes *s, int stage, int tokens, int finished) {
    int frames = convolved_frames(interpolated_frames(s, tokens), s->embed_taps, finished);
    for (int i = 0; i < stage; i++) frames = convolved_frames(frames, s->block_taps, finished);
    return frames;
}

/* Hops of samples that are final once `frames` frames exist: hop h lies under frames h - 1 to h + 2. */
int final_hops(int frames, int finished) {
    int hops = finished ? frames - 1 : frames - 2;
    return hops > 0 ? hops : 0;
}

static int voice_hops(const Voice *v, int tokens, int finished) {
    const DecoderSizes *s = &v->decoder->sizes;
    return final_hops(stage_frames(s, s->blocks, tokens, finished), finished);
}

int voice_samples(const Voice *v, int tokens, int finish) {
    return (voice_hops(v, v->tokens + tokens, finish) - voice_hops(v, v->tokens, 0)) * v->decoder->sizes.hop;
}

/* ---- voices ---- */

int voice_create(Voice *voice, const Decoder *decoder) {
    const DecoderSizes *s = &decoder->sizes;
    size_t embedded = (size_t)kept_tokens(s) * s->embed_taps * s->dim;
    size_t history = (size_t)s->blocks * (s->block_taps - 1) * s->dim;
    size_t windowed = (size_t)(PARTS - 1) * PARTS * s->hop;
    float *memory = calloc(embedded + history + windowed, sizeof *memory);
    if (!memory) return -1;
    *voice = (Voice){
        .decoder = decoder,
        .embedded = memory,
        .histories = memory + embedded,
        .windowed = memory + embedded + history,
        .memory = memory,
    };
    return 0;
}

void voice_free(Voice *voice) {
    free(voice->memory);
    voice->memory = NULL;
}

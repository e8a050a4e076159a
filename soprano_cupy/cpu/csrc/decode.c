/* One piece of an utterance through the decoder; every member of the team runs `decode_piece`.
 *
 * Each stage computes the frames whose windows have become known and keeps the end of its input for the next
 * piece, so a frame is computed once and whole utterances and streams take the same steps. */
#include "decode.h"

#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "product.h"

/* ---- buffers ---- */

static int largest_piece(const DecoderSizes *s) {
    return PIECE_TOKENS * s->frames_per_token + 1 + s->embed_taps / 2 + s->blocks * (s->block_taps / 2);
}

static int padded_inner(const DecoderSizes *s) { return ceil_div(s->inner, PANEL) * PANEL; }

static int widest_row(const DecoderSizes *s) { return s->input > s->dim ? s->input : s->dim; }

static void place_buffers(const Decoder *d, DecoderBuffers *b, Arena *arena) {
    const DecoderSizes *s = &d->sizes;
    size_t frames = largest_piece(s), window = frames + s->block_taps, length = PARTS * s->hop;
    b->embedded = arena_floats(arena, (size_t)(kept_tokens(s) + PIECE_TOKENS) * s->embed_taps * s->dim);
    b->stages[0] = arena_floats(arena, window * s->dim);
    b->stages[1] = arena_floats(arena, window * s->dim);
    b->expanded = arena_floats(arena, frames * padded_inner(s));
    b->heads = arena_floats(arena, frames * (length + 2));
    b->windowed = arena_floats(arena, (PARTS - 1 + frames) * length);
    b->operands[0] = arena_take(arena, operand_bytes(d->dtype, frames, widest_row(s)));
    b->operands[1] = arena_take(arena, operand_bytes(d->dtype, frames, s->inner));
    for (int i = 0; i < TEAM_MAX_THREADS; i++) {
        b->members[i].row = arena_floats(arena, widest_row(s));
        b->members[i].scratch = arena_floats(arena, d->kernels->synthesis_scratch(&d->fft));
    }
}

int buffers_create(Decoder *d) {
    DecoderBuffers *b = calloc(1, sizeof *b);
    if (!b) return -1;
    Arena arena = {0};
    place_buffers(d, b, &arena);
    b->bytes = arena.used;
    b->memory = map_memory(arena.used, 0);
    if (!b->memory) {
        free(b);
        return -1;
    }
    arena = (Arena){.memory = b->memory};
    place_buffers(d, b, &arena);
    pthread_mutex_init(&b->busy, NULL);
    d->buffers = b;
    return 0;
}

void buffers_free(Decoder *d) {
    if (!d->buffers) return;
    unmap_memory(d->buffers->memory, d->buffers->bytes);
    pthread_mutex_destroy(&d->buffers->busy);
    free(d->buffers);
    d->buffers = NULL;
}

/* ---- one piece ---- */

typedef struct Piece {
    const Decoder *decoder;
    Voice *voice;
    const float *states;
    int tokens, finish; /* new states; whether they are the last */
    float *samples;
} Piece;

/* The present member's view of a piece. */
typedef struct Pass {
    Team *team;
    int member;
    const Piece *piece;
    const Decoder *d;
    DecoderBuffers *b;
} Pass;

/* Frames that a stage had given out before the piece, and those it gives out with it. */
typedef struct Range {
    int first, count;
} Range;

static Range stage_range(const Pass *p, int stage) {
    int before = p->piece->voice->tokens;
    int first = stage_frames(&p->d->sizes, stage, before, 0);
    return (Range){first, stage_frames(&p->d->sizes, stage, before + p->piece->tokens, p->piece->finish) - first};
}

static void multiply(const Pass *p, const Product *product) {
    product_share(p->team, p->d->kernels, product);
    team_barrier(p->team);
}

/* Put what block `index` kept in front of its window and, at an utterance's end, zeros behind it. The window's
 * middle is written by the others at the same time. */
static void open_window(const Pass *p, int index, float *window) {
    const DecoderSizes *s = &p->d->sizes;
    size_t kept = (size_t)(s->block_taps - 1) * s->dim, margin = (size_t)(s->block_taps / 2) * s->dim;
    if (p->member != 0 || index >= s->blocks) return;
    memcpy(window, p->piece->voice->histories + index * kept, kept * sizeof *window);
    if (p->piece->finish)
        memset(window + kept + (size_t)stage_range(p, index).count * s->dim, 0, margin * sizeof *window);
}

/* The embedding's products at token rate: (tokens, taps * dim) behind the tokens that were kept. */
static void embed_tokens(const Pass *p) {
    const DecoderSizes *s = &p->d->sizes;
    const Piece *piece = p->piece;
    size_t width = (size_t)s->embed_taps * s->dim, kept = kept_tokens(s);
    Operand x;
    if (p->member == 0) memcpy(p->b->embedded, piece->voice->embedded, kept * width * sizeof(float));
    if (piece->tokens == 0) {
        team_barrier(p->team);
        return;
    }
    operand_place(&x, p->d->dtype, piece->tokens, s->input, p->b->operands[0]);
    for (int r; (r = team_take(p->team, piece->tokens)) >= 0;) {
        p->d->kernels->prepare[p->d->dtype](piece->states + (size_t)r * s->input, s->input, &x, r);
    }
    team_barrier(p->team);
    Product product = {.matrix = &p->d->embed, .x = &x, .out = p->b->embedded + kept * width, .stride = width};
    multiply(p, &product);
}

/* Interpolate the embedded tokens linearly to the frame rate, tap by tap, and norm: the first block's input. */
static void embed_frames(const Pass *p) {
    const DecoderSizes *s = &p->d->sizes;
    const Piece *piece = p->piece;
    const Kernels *k = p->d->kernels;
    int tokens = piece->voice->tokens + piece->tokens, rate = s->frames_per_token, margin = s->embed_taps / 2;
    int frames = interpolated_frames(s, tokens), oldest = piece->voice->tokens - kept_tokens(s);
    size_t width = (size_t)s->embed_taps * s->dim;
    Range range = stage_range(p, 0);
    float *out = p->b->stages[0] + (size_t)(s->block_taps - 1) * s->dim, *row = p->b->members[p->member].row;
    open_window(p, 0, p->b->stages[0]);
    for (int r; (r = team_take(p->team, range.count)) >= 0;) {
        memcpy(row, p->d->embed_bias, s->dim * sizeof *row);
        for (int tap = 0; tap < s->embed_taps; tap++) {
            int frame = range.first + r + tap - margin;
            if (frame < 0 || frame >= frames) continue;
            const float *left = p->b->embedded + (frame / rate - oldest) * width + (size_t)tap * s->dim;
            int step = frame % rate;
            k->add_interpolated(left, step ? left + width : left, (float)step / rate, s->dim, row);
        }
        k->layer_norm(row, p->d->norm, p->d->norm_bias, LAYER_NORM_EPS, s->dim, out + (size_t)r * s->dim);
    }
    team_barrier(p->team);
}

/* Block `index`: from its window, which holds the frames it kept and the new ones, to the next one's. */
static void run_block(const Pass *p, int index) {
    const DecoderSizes *s = &p->d->sizes;
    const Kernels *k = p->d->kernels;
    const Block *block = &p->d->blocks[index];
    Range input = stage_range(p, index), output = stage_range(p, index + 1);
    int kept = s->block_taps - 1, margin = s->block_taps / 2, inner = padded_inner(s);
    const float *window = p->b->stages[index % 2];
    float *next = p->b->stages[1 - index % 2], *row = p->b->members[p->member].row;
    /* Row 0 of the window is frame input.first - kept; the first output's window starts `margin` before it. */
    const float *first = window + (size_t)(output.first - margin - input.first + kept) * s->dim;
    Operand x, y;
    operand_place(&x, p->d->dtype, output.count, s->dim, p->b->operands[0]);
    operand_place(&y, p->d->dtype, output.count, s->inner, p->b->operands[1]);

    if (p->member == 0) { /* what the next piece needs of this one */
        float *history = p->piece->voice->histories + (size_t)index * kept * s->dim;
        memcpy(history, window + (size_t)input.count * s->dim, (size_t)kept * s->dim * sizeof *history);
    }
    for (int r; (r = team_take(p->team, output.count)) >= 0;) {
        k->depthwise_row(first + (size_t)r * s->dim, block->kernel, block->kernel_bias, s->block_taps, s->dim, row);
        k->layer_norm(row, block->norm, block->norm_bias, LAYER_NORM_EPS, s->dim, row);
        k->prepare[p->d->dtype](row, s->dim, &x, r);
    }
    team_barrier(p->team);
    if (output.count > 0) {
        multiply(p, &(Product){.matrix = &block->expand,
                               .x = &x,
                               .finish = GELU,
                               .bias = block->expand_bias,
                               .out = p->b->expanded,
                               .stride = inner});
        for (int r; (r = team_take(p->team, output.count)) >= 0;) {
            k->prepare[p->d->dtype](p->b->expanded + (size_t)r * inner, s->inner, &y, r);
        }
        team_barrier(p->team);
    }
    open_window(p, index + 1, next);
    if (output.count > 0) {
        product_share(p->team, k,
                      &(Product){.matrix = &block->contract,
                                 .x = &y,
                                 .finish = RESIDUAL,
                                 .bias = block->contract_bias,
                                 .gamma = block->gamma,
                                 .residual = first + (size_t)margin * s->dim,
                                 .out = next + (size_t)kept * s->dim,
                                 .stride = s->dim});
    }
    team_barrier(p->team);
}

/* The head and the inverse transform: windowed frames behind the three that the last piece left. */
static void synthesise(const Pass *p) {
    const DecoderSizes *s = &p->d->sizes;
    const Kernels *k = p->d->kernels;
    int count = stage_range(p, s->blocks).count, length = PARTS * s->hop;
    const float *frames = p->b->stages[s->blocks % 2] + (size_t)(s->block_taps - 1) * s->dim;
    float *row = p->b->members[p->member].row, *windowed = p->b->windowed + (size_t)(PARTS - 1) * length;
    Operand x;
    if (p->member == 0) memcpy(p->b->windowed, p->piece->voice->windowed, (PARTS - 1) * length * sizeof *row);
    if (count == 0) {
        team_barrier(p->team);
        return;
    }
    operand_place(&x, p->d->dtype, count, s->dim, p->b->operands[0]);
    for (int r; (r = team_take(p->team, count)) >= 0;) {
        k->layer_norm(frames + (size_t)r * s->dim, p->d->final_norm, p->d->final_norm_bias, LAYER_NORM_EPS, s->dim,
                      row);
        k->prepare[p->d->dtype](row, s->dim, &x, r);
    }
    team_barrier(p->team);
    multiply(p, &(Product){.matrix = &p->d->head,
                           .x = &x,
                           .finish = BIAS,
                           .bias = p->d->head_bias,
                           .out = p->b->heads,
                           .stride = length + 2});
    for (int unit; (unit = team_take(p->team, ceil_div(count, k->lanes))) >= 0;) {
        int r = unit * k->lanes, rows = count - r < k->lanes ? count - r : k->lanes;
        k->synthesise_frames(&p->d->fft, p->b->heads + (size_t)r * (length + 2), length + 2, rows, p->d->window,
                             windowed + (size_t)r * length, p->b->members[p->member].scratch);
    }
    team_barrier(p->team);
}

/* Overlap and add: the hops that no later frame can change. */
static void overlap_frames(const Pass *p) {
    const DecoderSizes *s = &p->d->sizes;
    const Piece *piece = p->piece;
    Range frames = stage_range(p, s->blocks);
    int total = frames.first + frames.count, length = PARTS * s->hop;
    int first = final_hops(frames.first, 0), count = final_hops(total, piece->finish) - first;
    for (int i; (i = team_take(p->team, count)) >= 0;) {
        int hop = first + i, newest = hop + 2, edges = (hop == 0) | (newest >= total) << 1;
        const float *frame = p->b->windowed + (ptrdiff_t)(newest - frames.first + PARTS - 1) * length;
        p->d->kernels->overlap_hop(frame, PARTS, s->hop, edges, p->d->envelope[edges],
                                   piece->samples + (size_t)i * s->hop);
    }
    team_barrier(p->team);
    if (p->member == 0) {
        memcpy(piece->voice->windowed, p->b->windowed + (size_t)frames.count * length,
               (PARTS - 1) * length * sizeof(float));
    }
}

static void decode_piece(Team *team, int member, void *argument) {
    const Piece *piece = argument;
    Pass p = {team, member, piece, piece->decoder, piece->decoder->buffers};
    p.d->kernels->enter();
    embed_tokens(&p);
    embed_frames(&p);
    for (int i = 0; i < p.d->sizes.blocks; i++) run_block(&p, i);
    synthesise(&p);
    overlap_frames(&p);
    p.d->kernels->leave();
}

void voice_push(Decoder *d, Voice *voice, const float *states, int tokens, int finish, float *samples) {
    Piece piece = {d, voice, states, tokens, finish, samples};
    size_t width = (size_t)d->sizes.embed_taps * d->sizes.dim, kept = kept_tokens(&d->sizes);
    pthread_mutex_lock(&d->buffers->busy);
    team_run(decode_piece, &piece);
    memcpy(voice->embedded, d->buffers->embedded + tokens * width, kept * width * sizeof(float));
    voice->tokens += tokens;
    pthread_mutex_unlock(&d->buffers->busy);
}

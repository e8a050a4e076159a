#include "language_model.h"

#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "forward.h"
#include "product.h"

static int q_size(const ModelSizes *s) { return s->heads * s->head_dim; }

static int kv_size(const ModelSizes *s) { return s->kv_heads * s->head_dim; }

int padded_inner(const ModelSizes *s) { return ceil_div(s->inner, 2 * PANEL) * 2 * PANEL; }

/* ---- weights ---- */

static Matrix place_matrix(Arena *arena, int dtype, int outputs, int inputs) {
    Matrix m = matrix_shape(dtype, outputs, inputs);
    m.data = arena_take(arena, matrix_bytes(&m));
    return m;
}

/* Lay all weights into the arena, or count their bytes. */
static void place_weights(LanguageModel *model, Arena *arena) {
    const ModelSizes *s = &model->sizes;
    for (int i = 0; i < s->layers; i++) {
        Layer *layer = &model->layers[i];
        layer->qkv = place_matrix(arena, model->dtype, q_size(s) + 2 * kv_size(s), s->hidden);
        layer->o = place_matrix(arena, model->dtype, s->hidden, q_size(s));
        layer->gate_up = place_matrix(arena, model->dtype, 2 * padded_inner(s), s->hidden);
        layer->down = place_matrix(arena, model->dtype, s->hidden, s->inner);
        layer->input_norm = arena_floats(arena, s->hidden);
        layer->post_norm = arena_floats(arena, s->hidden);
        layer->q_norm = arena_floats(arena, s->head_dim);
        layer->k_norm = arena_floats(arena, s->head_dim);
    }
    model->norm = arena_floats(arena, s->hidden);
    model->head = place_matrix(arena, model->dtype, s->vocab, s->hidden);
    model->embeddings = arena_take(arena, (size_t)s->vocab * s->hidden * cache_element_bytes(model->embedding_dtype));
}

LanguageModel *model_create(const Kernels *kernels, const ModelSizes *sizes, int dtype, int embedding_dtype) {
    LanguageModel *model = calloc(1, sizeof *model);
    if (!model) return NULL;
    model->kernels = kernels;
    model->sizes = *sizes;
    model->dtype = dtype;
    model->cache_dtype = dtype == FLOAT32 ? FLOAT32 : BFLOAT16;
    model->embedding_dtype = embedding_dtype;
    model->layers = calloc(sizes->layers, sizeof *model->layers);
    Arena arena = {0};
    if (model->layers) {
        place_weights(model, &arena);
        model->memory_bytes = arena.used;
        model->memory = map_memory(arena.used, 1);
    }
    if (!model->memory || workspace_create(model)) {
        model_free(model);
        return NULL;
    }
    arena = (Arena){.memory = model->memory};
    place_weights(model, &arena);
    return model;
}

void model_free(LanguageModel *model) {
    if (!model) return;
    workspace_free(model);
    unmap_memory(model->memory, model->memory_bytes);
    free(model->layers);
    free(model->angles);
    free(model);
}

/* ---- workspace ---- */

static void place_workspace(const LanguageModel *model, Workspace *w, Arena *arena) {
    const ModelSizes *s = &model->sizes;
    int dtype = model->dtype, inner = padded_inner(s);
    int stride = partial_stride(ceil_div(s->head_dim, PANEL) * PANEL);
    int attention_rows = attention_heads(s) * attention_positions(s);
    w->x = arena_floats(arena, CHUNK_ROWS * s->hidden);
    w->kept = arena_floats(arena, CHUNK_ROWS * s->hidden);
    w->qkv = arena_floats(arena, CHUNK_ROWS * (q_size(s) + 2 * kv_size(s)));
    w->attended = arena_floats(arena, CHUNK_ROWS * q_size(s));
    w->activated = arena_floats(arena, CHUNK_ROWS * inner);
    w->normed_operand = arena_take(arena, operand_bytes(dtype, CHUNK_ROWS, s->hidden));
    w->attended_operand = arena_take(arena, operand_bytes(dtype, CHUNK_ROWS, q_size(s)));
    w->activated_operand = arena_take(arena, operand_bytes(dtype, CHUNK_ROWS, s->inner));
    w->rows = arena_take(arena, CHUNK_ROWS * sizeof *w->rows);
    w->spans = arena_take(arena, CHUNK_ROWS * sizeof *w->spans);
    w->last_spans = arena_take(arena, CHUNK_ROWS * sizeof *w->last_spans);
    w->kept_rows = arena_take(arena, CHUNK_ROWS * sizeof *w->kept_rows);
    for (int i = 0; i < TEAM_MAX_THREADS; i++) {
        Member *m = &w->members[i];
        m->normed = arena_floats(arena, s->hidden);
        m->normed_operand = arena_take(arena, operand_bytes(dtype, OWN_ROWS, s->hidden));
        m->attended_operand = arena_take(arena, operand_bytes(dtype, OWN_ROWS, q_size(s)));
        m->activated_operand = arena_take(arena, operand_bytes(dtype, OWN_ROWS, s->inner));
        m->q = arena_floats(arena, attention_rows * s->head_dim);
        m->scores = arena_floats(arena, attention_rows * ATTENTION_SPLIT);
        m->partial[0] = arena_floats(arena, attention_rows * stride);
        m->partial[1] = arena_floats(arena, attention_rows * stride);
    }
}

int workspace_create(LanguageModel *model) {
    Workspace *w = calloc(1, sizeof *w);
    if (!w) return -1;
    Arena arena = {0};
    place_workspace(model, w, &arena);
    w->bytes = arena.used;
    w->memory = map_memory(arena.used, 0);
    if (!w->memory) {
        free(w);
        return -1;
    }
    arena = (Arena){.memory = w->memory};
    place_workspace(model, w, &arena);
    pthread_mutex_init(&w->busy, NULL);
    model->workspace = w;
    return 0;
}

void workspace_free(LanguageModel *model) {
    Workspace *w = model->workspace;
    if (!w) return;
    unmap_memory(w->memory, w->bytes);
    pthread_mutex_destroy(&w->busy);
    free(w->partials);
    free(w);
    model->workspace = NULL;
}

/* ---- planning a call ---- */

/* Where the next chunk of a batch begins: a row of a sequence. */
typedef struct Cursor {
    int sequence, row;
} Cursor;

/* Group a sequence's rows, new row `first` of the chunk on, into spans. */
static void plan_sequence(const ModelSizes *s, Chunk *chunk, int first, int count, int keep) {
    Workspace *w = chunk->model->workspace;
    for (int i = 0; i < count; i += attention_positions(s)) {
        int rows = count - i < attention_positions(s) ? count - i : attention_positions(s);
        chunk->all.spans[chunk->all.count++] = (Span){.row = first + i, .count = rows, .out = first + i};
    }
    if (keep < 0) return; /* every row is kept, and `last` is `all` */
    if (keep > 0) {
        int row = first + count - 1;
        w->kept_rows[chunk->kept] = row;
        chunk->last.spans[chunk->last.count++] = (Span){.row = row, .count = 1, .out = chunk->kept++};
    }
}

/* Take up to CHUNK_ROWS rows from the cursor on. */
static Chunk plan_chunk(LanguageModel *model, const KeyValues *cache, const Batch *batch, Cursor *at) {
    Workspace *w = model->workspace;
    Chunk chunk = {.model = model, .cache = cache, .all = {.spans = w->spans}, .last = {.spans = w->last_spans}};
    while (at->sequence < batch->count && chunk.rows < CHUNK_ROWS) {
        int start = batch->starts[at->sequence] + at->row, end = batch->starts[at->sequence + 1];
        int count = end - start < CHUNK_ROWS - chunk.rows ? end - start : CHUNK_ROWS - chunk.rows;
        int ends = start + count == end, position = batch->lengths[at->sequence] + at->row;
        for (int i = 0; i < count; i++) {
            w->rows[chunk.rows + i] = (Row){
                .token = batch->ids[start + i], .slot = at->sequence, .position = position + i, .last = i == count - 1};
        }
        plan_sequence(&model->sizes, &chunk, chunk.rows, count, batch->last_only ? ends : -1);
        int splits = ceil_div(position + count, ATTENTION_SPLIT);
        if (splits > chunk.all.splits) chunk.all.splits = splits;
        chunk.rows += count;
        *at = ends ? (Cursor){at->sequence + 1, 0} : (Cursor){at->sequence, at->row + count};
    }
    chunk.last.splits = chunk.all.splits;
    if (!batch->last_only) {
        chunk.last = chunk.all;
        chunk.kept = chunk.rows;
    }
    return chunk;
}

/* Grow the room for attention split over keys; without memory for it, attention is not split. */
static void reserve_partials(Workspace *w, const ModelSizes *s, const Chunk *chunk) {
    size_t all = partial_floats(s, &chunk->all), last = partial_floats(s, &chunk->last);
    size_t needed = all > last ? all : last;
    if (needed <= w->partial_floats || !splits_keys(s, &chunk->last, team_size())) return;
    free(w->partials);
    w->partials = aligned_alloc(64, (needed * sizeof *w->partials + 63) / 64 * 64);
    w->partial_floats = w->partials ? needed : 0;
}

void model_extend(LanguageModel *model, KeyValues *cache, const Batch *batch) {
    Workspace *w = model->workspace;
    Cursor at = {0, 0};
    float *states = batch->states;
    pthread_mutex_lock(&w->busy);
    while (at.sequence < batch->count) {
        Chunk chunk = plan_chunk(model, cache, batch, &at);
        chunk.states = states;
        reserve_partials(w, &model->sizes, &chunk);
        team_run(forward_chunk, &chunk);
        states += (size_t)chunk.kept * model->sizes.hidden;
    }
    pthread_mutex_unlock(&w->busy);
    for (int i = 0; i < batch->count; i++) batch->lengths[i] += batch->starts[i + 1] - batch->starts[i];
}

int model_logits(LanguageModel *model, const float *states, int rows, float *logits) {
    return product_run(model->kernels, &model->head, states, rows, logits);
}

int model_set_angles(LanguageModel *model, const float *angles, int positions) {
    size_t bytes = (size_t)positions * model->sizes.head_dim * sizeof *angles;
    float *copy = malloc(bytes);
    if (!copy) return -1;
    memcpy(copy, angles, bytes);
    pthread_mutex_lock(&model->workspace->busy);
    free(model->angles);
    model->angles = copy;
    model->positions = positions;
    pthread_mutex_unlock(&model->workspace->busy);
    return 0;
}

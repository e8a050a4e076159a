/* Attention of new rows over their sequences' cached keys and values, shared out over the team. */
#include <string.h>

#include "forward.h"

/* Query heads of one group and positions of one sequence that are taken through the keys together. */
int attention_heads(const ModelSizes *s) {
    int group = s->heads / s->kv_heads, room = ATTENTION_ROW_FLOATS / s->head_dim;
    if (room > ATTENTION_ROWS) room = ATTENTION_ROWS;
    return group < room ? group : room;
}

int attention_positions(const ModelSizes *s) {
    int group = s->heads / s->kv_heads, room = ATTENTION_ROW_FLOATS / s->head_dim;
    if (room > ATTENTION_ROWS) room = ATTENTION_ROWS;
    return group < room ? room / group : 1;
}

/* Rows x keys problems of a layer: spans x key-value heads x pieces of a head group. */
static int head_pieces(const ModelSizes *s) { return ceil_div(s->heads / s->kv_heads, attention_heads(s)); }

static int unit_count(const ModelSizes *s, const Spans *spans) { return spans->count * s->kv_heads * head_pieces(s); }

static int unit_stride(const ModelSizes *s) {
    int stride = partial_stride(ceil_div(s->head_dim, PANEL) * PANEL);
    return attention_heads(s) * attention_positions(s) * stride;
}

size_t partial_floats(const ModelSizes *s, const Spans *spans) {
    return (size_t)unit_count(s, spans) * spans->splits * unit_stride(s);
}

int splits_keys(const ModelSizes *s, const Spans *spans, int threads) {
    return spans->splits > 1 && unit_count(s, spans) < 2 * threads;
}

/* One such problem, its queries gathered. */
typedef struct Unit {
    const Span *span;
    HeadCache cache;
    int head, heads; /* the first query head, and how many */
    int rows, splits;
    int visible[ATTENTION_ROWS];
} Unit;

static Unit open_unit(const Chunk *chunk, int layer, const Spans *spans, int index, float *q) {
    const ModelSizes *s = &chunk->model->sizes;
    const Workspace *w = chunk->model->workspace;
    int pieces = head_pieces(s), group = s->heads / s->kv_heads, width = (s->heads + 2 * s->kv_heads) * s->head_dim;
    int piece = index % pieces, kv_head = index / pieces % s->kv_heads;
    Unit u = {.span = &spans->spans[index / pieces / s->kv_heads]};
    const Row *row = &w->rows[u.span->row];
    u.cache = cache_head(chunk->cache, layer, row->slot, kv_head);
    u.head = kv_head * group + piece * attention_heads(s);
    u.heads = attention_heads(s);
    if (u.head + u.heads > (kv_head + 1) * group) u.heads = (kv_head + 1) * group - u.head;
    for (int i = 0; i < u.span->count; i++) {
        const float *source = w->qkv + (size_t)(u.span->row + i) * width + u.head * s->head_dim;
        memcpy(q + (size_t)i * u.heads * s->head_dim, source, (size_t)u.heads * s->head_dim * sizeof *q);
        for (int h = 0; h < u.heads; h++) u.visible[u.rows++] = row[i].position + 1;
    }
    u.splits = ceil_div(u.visible[u.rows - 1], ATTENTION_SPLIT);
    return u;
}

/* The result of a unit's rows, from its merged sums. */
static void close_unit(const Chunk *chunk, const Unit *u, const float *partial) {
    const ModelSizes *s = &chunk->model->sizes;
    int dim = u->cache.value_dim, stride = partial_stride(dim);
    for (int r = 0; r < u->rows; r++) {
        int row = u->span->out + r / u->heads, head = u->head + r % u->heads;
        float *out = chunk->model->workspace->attended + ((size_t)row * s->heads + head) * s->head_dim;
        chunk->model->kernels->normalise_partial(partial + r * stride, s->head_dim, dim, out);
    }
}

/* Each unit from its first split to its last. */
static void attend_units(Team *team, const Chunk *chunk, int layer, const Spans *spans, Member *own) {
    const Kernels *k = chunk->model->kernels;
    for (int i; (i = team_take(team, unit_count(&chunk->model->sizes, spans))) >= 0;) {
        Unit u = open_unit(chunk, layer, spans, i, own->q);
        k->attend_split(&u.cache, own->q, u.rows, u.visible, 0, own->scores, own->partial[0]);
        for (int split = 1; split < u.splits; split++) {
            k->attend_split(&u.cache, own->q, u.rows, u.visible, split, own->scores, own->partial[1]);
            k->merge_partials(own->partial[0], own->partial[1], u.rows, u.cache.value_dim);
        }
        close_unit(chunk, &u, own->partial[0]);
    }
}

/* The splits of each unit apart, then their merging in the same order as above: the same arithmetic. */
static void attend_splits(Team *team, const Chunk *chunk, int layer, const Spans *spans, Member *own) {
    const Kernels *k = chunk->model->kernels;
    int units = unit_count(&chunk->model->sizes, spans), stride = unit_stride(&chunk->model->sizes);
    float *partials = chunk->model->workspace->partials;
    for (int i; (i = team_take(team, units * spans->splits)) >= 0;) {
        Unit u = open_unit(chunk, layer, spans, i / spans->splits, own->q);
        int split = i % spans->splits;
        if (split >= u.splits) continue;
        k->attend_split(&u.cache, own->q, u.rows, u.visible, split, own->scores, partials + (size_t)i * stride);
    }
    team_barrier(team);
    for (int i; (i = team_take(team, units)) >= 0;) {
        Unit u = open_unit(chunk, layer, spans, i, own->q);
        float *first = partials + (size_t)i * spans->splits * stride;
        for (int split = 1; split < u.splits; split++) {
            k->merge_partials(first, first + (size_t)split * stride, u.rows, u.cache.value_dim);
        }
        close_unit(chunk, &u, first);
    }
}

void attention_phase(Team *team, int member, const Chunk *chunk, int layer, const Spans *spans) {
    Workspace *w = chunk->model->workspace;
    const ModelSizes *s = &chunk->model->sizes;
    int split = splits_keys(s, spans, team->threads) && partial_floats(s, spans) <= w->partial_floats;
    (split ? attend_splits : attend_units)(team, chunk, layer, spans, &w->members[member]);
}

/* The forward pass of one chunk: every member of the team runs `forward_chunk` and takes its share of each phase. */
#include "forward.h"

#include <math.h>
#include <string.h>

#include "bfloat16.h"
#include "product.h"

static void embed(const LanguageModel *model, int token, float *x) {
    int hidden = model->sizes.hidden;
    if (model->embedding_dtype == FLOAT32) {
        memcpy(x, (const float *)model->embeddings + (size_t)token * hidden, hidden * sizeof *x);
        return;
    }
    const uint16_t *bits = (const uint16_t *)model->embeddings + (size_t)token * hidden;
    for (int i = 0; i < hidden; i++) x[i] = bfloat16_value(bits[i]);
}

/* The present member's view of a chunk. */
typedef struct Pass {
    Team *team;
    int member;
    const Chunk *chunk;
    const LanguageModel *model;
    Workspace *w;
    Member *own;
    float *x;    /* residual stream: all rows, or in the last layer the kept ones */
    int rows;    /* of x */
    int private; /* rows are so few that every member prepares its own operands */
} Pass;

/* An operand for the present rows in shared or own memory. */
static Operand place_operand(const Pass *p, int inputs, void *shared, void *own) {
    Operand x;
    operand_place(&x, p->model->dtype, p->rows, inputs, p->private ? own : shared);
    return x;
}

/* Rows of this member: its share, or all of them when operands are private. */
static int next_row(const Pass *p, int previous) {
    if (!p->private) return team_take(p->team, p->rows);
    return previous + 1 < p->rows ? previous + 1 : -1;
}

static void end_rows(const Pass *p) {
    if (!p->private) team_barrier(p->team);
}

static Operand norm_rows(const Pass *p, const float *weight) {
    const ModelSizes *s = &p->model->sizes;
    const Kernels *k = p->model->kernels;
    Operand x = place_operand(p, s->hidden, p->w->normed_operand, p->own->normed_operand);
    for (int r = -1; (r = next_row(p, r)) >= 0;) {
        k->rms_norm(p->x + (size_t)r * s->hidden, weight, s->eps, s->hidden, p->own->normed);
        k->prepare[p->model->dtype](p->own->normed, s->hidden, &x, r);
    }
    end_rows(p);
    return x;
}

static Operand prepare_rows(const Pass *p, const float *source, int stride, int inputs, void *shared, void *own) {
    Operand x = place_operand(p, inputs, shared, own);
    for (int r = -1; (r = next_row(p, r)) >= 0;) {
        p->model->kernels->prepare[p->model->dtype](source + (size_t)r * stride, inputs, &x, r);
    }
    end_rows(p);
    return x;
}

static void multiply(const Pass *p, const Matrix *matrix, const Operand *x, Finish finish, float *out, int stride) {
    Product product = {.matrix = matrix, .x = x, .finish = finish, .out = out, .stride = stride};
    product_share(p->team, p->model->kernels, &product);
    team_barrier(p->team);
}

/* Norm and rotate each row's queries and keys, and store its keys and values. */
static void rotate_rows(const Pass *p, int index) {
    const ModelSizes *s = &p->model->sizes;
    const Layer *layer = &p->model->layers[index];
    const Kernels *k = p->model->kernels;
    int dim = s->head_dim, group = s->heads / s->kv_heads, width = (s->heads + 2 * s->kv_heads) * dim;
    float scale = 1.0f / sqrtf(dim);
    for (int i; (i = team_take(p->team, p->rows * s->kv_heads)) >= 0;) {
        const Row *row = &p->w->rows[i / s->kv_heads];
        int head = i % s->kv_heads;
        float *q = p->w->qkv + (size_t)(i / s->kv_heads) * width, *key = q + (s->heads + head) * dim;
        const float *angles = p->model->angles + (size_t)row->position * dim;
        for (int h = head * group; h < (head + 1) * group; h++) {
            k->rotate_head(q + h * dim, layer->q_norm, s->eps, dim, angles, scale);
        }
        k->rotate_head(key, layer->k_norm, s->eps, dim, angles, 1.0f);
        HeadCache cache = cache_head(p->chunk->cache, index, row->slot, head);
        cache_write(&cache, row->position, key, key + s->kv_heads * dim, row->last);
    }
    team_barrier(p->team);
}

/* From the last layer's attention on, only the kept rows go on. */
static void keep_rows(Pass *p) {
    int hidden = p->model->sizes.hidden;
    for (int r; (r = team_take(p->team, p->chunk->kept)) >= 0;) {
        memcpy(p->w->kept + (size_t)r * hidden, p->x + (size_t)p->w->kept_rows[r] * hidden, hidden * sizeof *p->x);
    }
    team_barrier(p->team);
    p->x = p->w->kept;
    p->rows = p->chunk->kept;
    p->private = p->rows <= OWN_ROWS;
}

static void run_layer(Pass *p, int index) {
    const ModelSizes *s = &p->model->sizes;
    const Layer *layer = &p->model->layers[index];
    int q_size = s->heads * s->head_dim, width = q_size + 2 * s->kv_heads * s->head_dim, inner = padded_inner(s);
    int is_last = index == s->layers - 1;

    Operand x = norm_rows(p, layer->input_norm);
    multiply(p, &layer->qkv, &x, STORE, p->w->qkv, width);
    rotate_rows(p, index);
    if (is_last && p->chunk->kept < p->rows) keep_rows(p);
    if (p->rows == 0) return;

    attention_phase(p->team, p->member, p->chunk, index, is_last ? &p->chunk->last : &p->chunk->all);
    team_barrier(p->team);
    x = prepare_rows(p, p->w->attended, q_size, q_size, p->w->attended_operand, p->own->attended_operand);
    multiply(p, &layer->o, &x, ADD, p->x, s->hidden);

    x = norm_rows(p, layer->post_norm);
    multiply(p, &layer->gate_up, &x, SWIGLU, p->w->activated, inner);
    x = prepare_rows(p, p->w->activated, inner, s->inner, p->w->activated_operand, p->own->activated_operand);
    multiply(p, &layer->down, &x, ADD, p->x, s->hidden);
}

void forward_chunk(Team *team, int member, void *argument) {
    const Chunk *chunk = argument;
    const LanguageModel *model = chunk->model;
    const ModelSizes *s = &model->sizes;
    Workspace *w = model->workspace;
    Pass p = {.team = team, .member = member, .chunk = chunk, .model = model, .w = w, .own = &w->members[member]};
    p.x = w->x;
    p.rows = chunk->rows;
    p.private = p.rows <= OWN_ROWS;
    model->kernels->enter();
    for (int r; (r = team_take(team, p.rows)) >= 0;) embed(model, w->rows[r].token, p.x + (size_t)r * s->hidden);
    team_barrier(team);
    for (int i = 0; i < s->layers; i++) run_layer(&p, i);
    for (int r; (r = team_take(team, p.rows)) >= 0;) {
        const float *x = p.x + (size_t)r * s->hidden;
        model->kernels->rms_norm(x, model->norm, s->eps, s->hidden, chunk->states + (size_t)r * s->hidden);
    }
    model->kernels->leave();
}

#include "cache.h"

#include <string.h>

#include "arena.h"
#include "bfloat16.h"

static size_t heads_of(const KeyValues *c) { return (size_t)c->layers * c->slots * c->heads; }

int cache_create(KeyValues *c, int dtype, int layers, int slots, int heads, int head_dim, int tokens) {
    *c = (KeyValues){
        .dtype = dtype,
        .layers = layers,
        .slots = slots,
        .heads = heads,
        .capacity = ceil_div(tokens, PANEL) * PANEL,
        .head_dim = head_dim,
        .value_dim = ceil_div(head_dim, PANEL) * PANEL,
    };
    c->keys = map_memory(heads_of(c) * head_key_bytes(c), 0);
    c->values = map_memory(heads_of(c) * head_value_bytes(c), 0);
    if (c->keys && c->values) return 0;
    cache_free(c);
    return -1;
}

void cache_free(KeyValues *c) {
    unmap_memory(c->keys, heads_of(c) * head_key_bytes(c));
    unmap_memory(c->values, heads_of(c) * head_value_bytes(c));
    c->keys = c->values = NULL;
}

void cache_write(const HeadCache *head, int position, const float *key, const float *value, int last) {
    int dim = head->head_dim, panel = position / PANEL, lane = position % PANEL;
    if (head->dtype == FLOAT32) {
        float *keys = (float *)head->keys + (size_t)panel * dim * PANEL + lane;
        for (int d = 0; d < dim; d++) keys[d * PANEL] = key[d];
        memcpy((float *)head->values + (size_t)position * head->value_dim, value, dim * sizeof *value);
        return;
    }
    uint16_t *keys = (uint16_t *)head->keys + ((size_t)panel * dim * PANEL + lane * 2);
    uint16_t *values = (uint16_t *)head->values + (size_t)(position / 2) * head->value_dim * 2 + position % 2;
    for (int d = 0; d < dim; d++) keys[d / 2 * 2 * PANEL + d % 2] = bfloat16_nearest(key[d]);
    for (int d = 0; d < dim; d++) values[2 * d] = bfloat16_nearest(value[d]);
    if (last && position % 2 == 0) {
        for (int d = 0; d < dim; d++) values[2 * d + 1] = 0;
    }
}

void cache_move(const KeyValues *c, int source, int target, int tokens) {
    size_t bytes = cache_element_bytes(c->dtype) * (size_t)(ceil_div(tokens, PANEL) * PANEL);
    for (int layer = 0; layer < c->layers; layer++) {
        for (int head = 0; head < c->heads; head++) {
            HeadCache from = cache_head(c, layer, source, head), to = cache_head(c, layer, target, head);
            memcpy(to.keys, from.keys, bytes * c->head_dim);
            memcpy(to.values, from.values, bytes * c->value_dim);
        }
    }
}

void cache_poison(KeyValues *c) {
    memset(c->keys, 0xff, heads_of(c) * head_key_bytes(c));
    memset(c->values, 0xff, heads_of(c) * head_value_bytes(c));
}

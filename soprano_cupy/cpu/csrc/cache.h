/* Cached keys and values, laid out as panels that the products read without any rearrangement.
 *
 * One head of one sequence: keys are panels of 16 tokens, [token / 16][dim][token % 16]; values are panels of 16
 * dimensions, [token][dim]. In bfloat16 the summed index comes in pairs that share a 32-bit word: dimensions for
 * keys, tokens for values. Memory is touched as tokens arrive, so capacity costs only addresses. */
#ifndef SOPRANO_CACHE_H
#define SOPRANO_CACHE_H

#include <stddef.h>
#include <stdint.h>

#include "matrix.h"

typedef struct KeyValues {
    int dtype; /* FLOAT32 or BFLOAT16 */
    int layers, slots, heads;
    int capacity; /* tokens of a slot, a multiple of PANEL */
    int head_dim;
    int value_dim; /* head_dim rounded up to whole panels */
    uint8_t *keys, *values;
} KeyValues;

/* One head of one sequence of one layer. */
typedef struct HeadCache {
    int dtype, head_dim, value_dim;
    uint8_t *keys, *values;
} HeadCache;

static inline size_t cache_element_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

static inline size_t head_key_bytes(const KeyValues *c) {
    return (size_t)c->capacity * c->head_dim * cache_element_bytes(c->dtype);
}

static inline size_t head_value_bytes(const KeyValues *c) {
    return (size_t)c->capacity * c->value_dim * cache_element_bytes(c->dtype);
}

static inline HeadCache cache_head(const KeyValues *c, int layer, int slot, int head) {
    size_t index = ((size_t)layer * c->slots + slot) * c->heads + head;
    return (HeadCache){
        .dtype = c->dtype,
        .head_dim = c->head_dim,
        .value_dim = c->value_dim,
        .keys = c->keys + index * head_key_bytes(c),
        .values = c->values + index * head_value_bytes(c),
    };
}

/* Allocate for sequences of up to `tokens`; 0, or -1 when there is no memory. */
int cache_create(KeyValues *c, int dtype, int layers, int slots, int heads, int head_dim, int tokens);
void cache_free(KeyValues *c);

/* Store one token's key and value (head_dim floats each). `last`: no later token of the sequence is being stored
 * at the same time, so the half word beside a value is cleared instead of left as it was. */
void cache_write(const HeadCache *head, int position, const float *key, const float *value, int last);

/* Copy the first `tokens` tokens of one slot over another. */
void cache_move(const KeyValues *c, int source, int target, int tokens);

/* Fill everything with NaN: tests show that nothing unwritten is read. */
void cache_poison(KeyValues *c);

#endif

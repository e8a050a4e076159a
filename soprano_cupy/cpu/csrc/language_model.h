/* The Qwen3 forward pass over ragged batches with packed weights. */
#ifndef SOPRANO_LANGUAGE_MODEL_H
#define SOPRANO_LANGUAGE_MODEL_H

#include "cache.h"
#include "kernels.h"
#include "matrix.h"

typedef struct ModelSizes {
    int vocab, hidden, layers, heads, kv_heads, head_dim, inner;
    float eps;
} ModelSizes;

typedef struct Layer {
    float *input_norm, *q_norm, *k_norm, *post_norm;
    Matrix qkv, o, gate_up, down;
} Layer;

typedef struct LanguageModel {
    const Kernels *kernels;
    ModelSizes sizes;
    int dtype;           /* of the matrices */
    int cache_dtype;     /* of keys and values */
    int embedding_dtype; /* FLOAT32 or BFLOAT16 */
    void *embeddings;    /* (vocab, hidden) */
    Layer *layers;
    float *norm;
    Matrix head;
    float *angles; /* (positions, head_dim): each row head_dim / 2 cosines, then as many sines */
    int positions;
    uint8_t *memory; /* all weights */
    size_t memory_bytes;
    struct Workspace *workspace;
} LanguageModel;

/* A model of given sizes whose weights are to be filled in; NULL when there is no memory. */
LanguageModel *model_create(const Kernels *kernels, const ModelSizes *sizes, int dtype, int embedding_dtype);
void model_free(LanguageModel *model);

/* The new rows of one call: `count` sequences, those in slots 0 to count - 1. */
typedef struct Batch {
    const int32_t *ids;
    const int32_t *starts; /* (count + 1,) */
    int count;
    int32_t *lengths; /* (slots,) tokens held before; updated */
    int last_only;
    float *states; /* (rows or count, hidden) */
} Batch;

/* Append the rows to their sequences and write their final hidden states. All sizes and ids were checked. */
void model_extend(LanguageModel *model, KeyValues *cache, const Batch *batch);

/* Take a copy of rotary angles for `positions` positions, as in LanguageModel; 0, or -1 when there is no memory. */
int model_set_angles(LanguageModel *model, const float *angles, int positions);

/* logits (rows, vocab) of states (rows, hidden); 0, or -1 when there is no memory. */
int model_logits(LanguageModel *model, const float *states, int rows, float *logits);

#endif

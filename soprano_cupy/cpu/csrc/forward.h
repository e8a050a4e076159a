/* Inside the language model: the buffers of a forward pass and the plan of one piece of a batch. */
#ifndef SOPRANO_FORWARD_H
#define SOPRANO_FORWARD_H

#include <pthread.h>

#include "language_model.h"
#include "team.h"

#define CHUNK_ROWS 256 /* rows that go through the layers together: bounds the activations' memory */
#define OWN_ROWS 2     /* up to so many rows, each member prepares operands of its own and saves the barriers */

/* One new token. */
typedef struct Row {
    int token, slot, position;
    int last; /* the sequence's last row of this chunk */
} Row;

/* Consecutive rows of one sequence that attend together. */
typedef struct Span {
    int row, count; /* first row of the chunk, how many */
    int out;        /* row of the attention's result that the first becomes */
} Span;

/* What a layer's attention works on. */
typedef struct Spans {
    Span *spans;
    int count;
    int splits; /* of the longest sequence */
} Spans;

/* Operands of a layer's products, by what they are made from. */
typedef struct Operands {
    Operand normed, attended, activated;
} Operands;

/* What each member of the team has for itself. */
typedef struct Member {
    float *normed;                                               /* (hidden,) */
    void *normed_operand, *attended_operand, *activated_operand; /* memory for up to OWN_ROWS rows */
    float *q;          /* (ATTENTION_ROWS, head_dim), at most ATTENTION_ROW_FLOATS */
    float *scores;     /* (ATTENTION_ROWS, ATTENTION_SPLIT) */
    float *partial[2]; /* (ATTENTION_ROWS, partial_stride) */
} Member;

typedef struct Workspace {
    pthread_mutex_t busy; /* one pass at a time */
    uint8_t *memory;
    size_t bytes;
    float *x, *kept;  /* (CHUNK_ROWS, hidden) residual stream, and its kept rows in the last layer */
    float *qkv;       /* (CHUNK_ROWS, q and k and v sizes) */
    float *attended;  /* (CHUNK_ROWS, q size) */
    float *activated; /* (CHUNK_ROWS, inner padded to whole panels) */
    void *normed_operand, *attended_operand, *activated_operand;
    Row *rows;
    Span *spans, *last_spans; /* (CHUNK_ROWS,) */
    int *kept_rows;           /* (CHUNK_ROWS,) rows whose states are wanted */
    Member members[TEAM_MAX_THREADS];
    float *partials; /* of attention split over keys, grown at need */
    size_t partial_floats;
} Workspace;

/* One piece of a batch on its way through the layers. */
typedef struct Chunk {
    const LanguageModel *model;
    const KeyValues *cache;
    int rows, kept;  /* new rows; rows whose states are wanted */
    Spans all, last; /* attention of all rows, and of the kept ones in the last layer */
    float *states;   /* (kept, hidden) */
} Chunk;

int padded_inner(const ModelSizes *sizes);
int workspace_create(LanguageModel *model);
void workspace_free(LanguageModel *model);

/* How attention rows are grouped: query heads and positions that share a pass over the keys. */
int attention_heads(const ModelSizes *sizes);
int attention_positions(const ModelSizes *sizes);
/* Room for attention split over keys: floats for all units of `spans`. */
size_t partial_floats(const ModelSizes *sizes, const Spans *spans);
/* Whether a team of `threads` splits this attention over keys too: only where rows and heads are too few. */
int splits_keys(const ModelSizes *sizes, const Spans *spans, int threads);

/* The pass itself; `argument` is a Chunk. */
void forward_chunk(Team *team, int member, void *argument);

void attention_phase(Team *team, int member, const Chunk *chunk, int layer, const Spans *spans);

#endif

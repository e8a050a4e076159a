/* The kernels of one instruction set: what differs between machines, behind one table. */
#ifndef SOPRANO_KERNELS_H
#define SOPRANO_KERNELS_H

#include "cache.h"
#include "fft.h"
#include "matrix.h"

#define MAX_MAGNITUDE 100.0f      /* the reference clips each bin's magnitude here */
#define TILE_ROWS 96              /* rows of a product's tile: a multiple of every register block's */
#define ATTENTION_SPLIT 128       /* keys of a split */
#define ATTENTION_ROWS 24         /* query rows that are taken through a split together, and */
#define ATTENTION_ROW_FLOATS 4096 /* at most this many floats of them */

/* Floats from row to row of unnormalised attention: value_dim sums, maximum, sum. */
static inline int partial_stride(int value_dim) { return value_dim + PANEL; }

typedef struct Kernels {
    const char *name;

    /* Called by every thread around a job: the state of matrix units. */
    void (*enter)(void);
    void (*leave)(void);

    /* `count` inputs of one output's row, from `first` on, as a tile's words; returns the scale of int8. */
    uint16_t (*encode_words)(int dtype, const void *row, int row_dtype, int first, int count, uint32_t words[WORDS]);
    /* Convert `inputs` values of one row into row r of an operand, by the operand's dtype. */
    void (*prepare[DTYPES])(const float *row, int inputs, Operand *x, int r);
    /* tile (rows, 64) = rows first, ... of x times `panels` panels from `panel` on of a block; rows <= TILE_ROWS. */
    void (*multiply[DTYPES])(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                             float *tile);

    void (*rms_norm)(const float *x, const float *weight, float eps, int count, float *out);
    void (*layer_norm)(const float *x, const float *weight, const float *bias, float eps, int count, float *out);
    void (*rotate_head)(float *x, const float *weight, float eps, int dim, const float *angles, float scale);

    void (*finish_store)(const float *tile, int rows, int columns, float *out, ptrdiff_t stride);
    void (*finish_add)(const float *tile, int rows, int columns, float *out, ptrdiff_t stride);
    void (*finish_swiglu)(const float *tile, int rows, float *out, ptrdiff_t stride);
    void (*finish_bias)(const float *tile, int rows, int columns, const float *bias, float *out, ptrdiff_t stride);
    void (*finish_gelu)(const float *tile, int rows, int columns, const float *bias, float *out, ptrdiff_t stride);
    void (*finish_residual)(const float *tile, int rows, int columns, const float *bias, const float *gamma,
                            const float *residual, float *out, ptrdiff_t stride);

    void (*attend_split)(const HeadCache *head, const float *q, int rows, const int *visible, int split, float *scores,
                         float *partial);
    void (*merge_partials)(float *into, const float *from, int rows, int value_dim);
    void (*normalise_partial)(const float *partial, int head_dim, int value_dim, float *out);

    void (*depthwise_row)(const float *frames, const float *kernel, const float *bias, int taps, int channels,
                          float *out);
    void (*add_interpolated)(const float *left, const float *right, float share, int channels, float *out);
    void (*overlap_hop)(const float *newest, int parts, int hop, int edges, const float *envelope, float *out);
    int lanes; /* frames that synthesise_frames takes at once */
    void (*synthesise_frames)(const FftPlan *plan, const float *head, ptrdiff_t stride, int count, const float *window,
                              float *frames, float *scratch);
    size_t (*synthesis_scratch)(const FftPlan *plan); /* floats */
} Kernels;

/* The tables of this build; those of other architectures are NULL. Only what the processor has may be called. */
extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_vnni, kernels_amx;

/* The table of a name, or the best one for NULL; NULL for an unknown name or one this processor cannot run. */
const Kernels *kernels_find(const char *name);

/* Names of all tables that this processor can run, best last; returns their number. */
int kernels_available(const char *names[], int room);

#endif

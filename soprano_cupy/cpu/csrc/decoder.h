/* The Vocos decoder with packed weights: hidden states in, samples out, piece by piece. */
#ifndef SOPRANO_DECODER_H
#define SOPRANO_DECODER_H

#include <pthread.h>

#include "fft.h"
#include "kernels.h"
#include "matrix.h"
#include "team.h"

#define PIECE_TOKENS 32 /* tokens that go through the decoder together: bounds the activations' memory */
#define PARTS 4         /* hops of a frame: the overlap of every Soprano decoder */
#define LAYER_NORM_EPS 1e-6f

typedef struct DecoderSizes {
    int input, dim, inner, blocks;
    int embed_taps, block_taps; /* odd widths of the convolutions */
    int hop, frames_per_token;
} DecoderSizes;

typedef struct Block {
    float *kernel, *kernel_bias; /* (block_taps, dim), (dim,) */
    float *norm, *norm_bias;
    Matrix expand, contract;
    float *expand_bias; /* (inner padded to whole panels,) */
    float *contract_bias, *gamma;
} Block;

typedef struct Decoder {
    const Kernels *kernels;
    DecoderSizes sizes;
    int dtype;    /* of the matrices */
    Matrix embed; /* embed_taps * dim outputs, tap after tap */
    float *embed_bias, *norm, *norm_bias;
    Block *blocks;
    float *final_norm, *final_norm_bias;
    Matrix head;
    float *head_bias;
    FftPlan fft;
    float *window;      /* (4 hops,) over the frame's length: the inverse transform's factor included */
    float *envelope[4]; /* sum of squared windows over a hop; bit 0: no frame before, bit 1: no frame after */
    uint8_t *memory;
    size_t memory_bytes;
    struct DecoderBuffers *buffers;
} Decoder;

/* What one utterance needs of what came before: each stage's last frames. */
typedef struct Voice {
    const Decoder *decoder;
    int tokens;       /* taken so far */
    float *embedded;  /* (kept tokens, embed_taps * dim) */
    float *histories; /* (blocks, block_taps - 1, dim) inputs of each block */
    float *windowed;  /* (3, 4 hops) frames that still overlap with the next */
    float *memory;
} Voice;

Decoder *decoder_create(const Kernels *kernels, const DecoderSizes *sizes, int dtype);
/* The synthesis window (4 hops,), and from it the envelopes that overlap-add divides by. */
void decoder_set_window(Decoder *decoder, const double *window);
void decoder_free(Decoder *decoder);

int voice_create(Voice *voice, const Decoder *decoder); /* 0, or -1 when there is no memory */
void voice_free(Voice *voice);

/* Samples that `tokens` further states make final; `finish`: the utterance ends with them. */
int voice_samples(const Voice *voice, int tokens, int finish);

/* Take up to PIECE_TOKENS states (tokens, input) and write voice_samples(...) samples. */
void voice_push(Decoder *decoder, Voice *voice, const float *states, int tokens, int finish, float *samples);

#endif

/* Inside the decoder: buffers, and how many frames each stage has given out. */
#ifndef SOPRANO_DECODE_H
#define SOPRANO_DECODE_H

#include "decoder.h"

typedef struct DecoderBuffers {
    pthread_mutex_t busy; /* one piece at a time */
    uint8_t *memory;
    size_t bytes;
    float *embedded;   /* (kept + PIECE_TOKENS, embed_taps * dim) */
    float *stages[2];  /* (frames, dim): a block's window, what it kept first; blocks write to the other */
    float *expanded;   /* (frames, inner padded) */
    float *heads;      /* (frames, 2 bins) */
    float *windowed;   /* (3 + frames, 4 hops) */
    void *operands[2]; /* memory for operands of dim or input, and of inner, columns */
    struct {
        float *row;     /* (max(dim, input),) */
        float *scratch; /* of synthesise_frames */
    } members[TEAM_MAX_THREADS];
} DecoderBuffers;

int buffers_create(Decoder *decoder);
void buffers_free(Decoder *decoder);

int kept_tokens(const DecoderSizes *sizes);
int interpolated_frames(const DecoderSizes *sizes, int tokens);
int convolved_frames(int frames, int taps, int finished);
/* Frames that left the embedding (stage 0) or block stage - 1, once `tokens` states went in. */
int stage_frames(const DecoderSizes *sizes, int stage, int tokens, int finished);
int final_hops(int frames, int finished);

#endif

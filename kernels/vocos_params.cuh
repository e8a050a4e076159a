// What the Vocos decoder's own kernels are given: which row is which frame of which voice. soprano_cupy/gpu/vocos_tables.py
// packs the tables and soprano_cupy/gpu/vocos_plan.py the parameters.
//
// Frames of all voices stand one under the other, a row each; a segment is the consecutive frames of one voice. Frames
// outside a voice (before its first, behind its last) may have rows: their contents are never used.
//
// Whole voices keep a frame in the same row from the first layer to the last. A stream does not know a convolution's
// right neighbours yet, so each layer runs `margin` frames behind the one before it: after the layers so far, row r holds
// frame table[r].frame - lag. What a window still needs of earlier pushes waits in the voice's history, of which there
// are two: one is read while the other is written.
#pragma once

// Consecutive rows of one voice.
struct VocosSegment {
    const float* states;  // (ring, INPUT_SIZE): the state of token t is row t % ring
    int ring;
    int rows;
    int token_shift;  // the row of a token among all tokens of the launch, minus its number in its voice
    int history;      // streams: which history to read, 2 slot + 0 or 1; the other of the two is written
    int reserved[2];
};

struct alignas(16) VocosRow {
    int segment;
    int index;   // among the segment's rows
    int frame;   // of its voice, from 0, at lag 0; may be negative
    int frames;  // of the voice; a large number while a stream's end is not known
};

// A token whose state enters the decoder.
struct alignas(8) VocosToken {
    int segment;
    int token;  // negative: does not exist
};

// The kernels of vocos_rows.cu; each uses some of the fields.
struct VocosRowsParams {
    const VocosRow* table;         // (rows,)
    const VocosToken* tokens;      // (tokens,); vocos_states
    const VocosSegment* segments;  //
    const float* input;            // (rows or tokens, DIM)
    const float* taps;             // (BLOCK_KERNEL, DIM) depthwise; vocos_convolution
    const float* bias;             // (DIM,) of the convolution
    const float* gain;             // (DIM,) of the norm
    const float* shift;            // (DIM,) of the norm
    void* output;                  // (rows, DIM) float: vocos_embed; else Element, of the next product's depth
    float* delayed;                // (rows, DIM): the input's frames in the output's rows; streams
    float* history;                // (2 slots, BLOCK_KERNEL - 1, DIM) of this layer; streams
    int rows;                      // or tokens
    int input_stride, output_stride;
    int lag;  // of the output; streams
    float epsilon;
    int reserved;
};

// Consecutive hops of one voice, made by one thread block. Hop h is the samples that frames h - 3 to h share; the voice's
// audio begins with hop 2, the middle of its first frame, and has as many hops as there are frames but one.
struct VocosSpan {
    int row;          // of the spectrum of first_frame
    int first_frame;  // may be negative
    int first_hop;    // the first that is written
    int end_hop;      // behind the last; frames first_frame to end_hop - 1 are transformed
    int frames;       // of the voice
    int open;         // which open sums to begin with; -1: zeros, and the first three frames complete nothing
    int keep;         // where to leave the open sums; -1: nowhere
    int output;       // hops before first_hop in the output
};

// Where samples go; either may be null.
struct alignas(16) VocosOutput {
    float* samples;  // about -1 to 1
    short* pcm;      // the same as 16-bit integers
};

// vocos_istft.cu
struct VocosIstftParams {
    const float*
        spectrum;  // (rows, N_FFT): for each bin below N_FFT / 2 log2 of its magnitude, then its phase in turns
    const VocosSpan* spans;     // one a thread block
    const float* window;        // (N_FFT,), divided by N_FFT
    const float* inverse;       // (16, N_FFT / 4): 1 / sum of the squared windows over a hop; bit p of the first
                                // index says that the frame exists whose part p the hop is
    const float* roots;         // (N_FFT / 2, 2): exp(2 pi i k / N_FFT)
    float* open;                // (2 slots, 3, N_FFT / 4): sums that later frames will add to; streams
    const VocosOutput* output;  // in device memory, as the tables are
    int row_stride;             // of the spectrum
    int reserved;
};

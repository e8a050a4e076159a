/* The plan of an inverse real Fourier transform of even length, the same for all instruction sets. */
#ifndef SOPRANO_FFT_H
#define SOPRANO_FFT_H

#define FFT_MAX_PASSES 32

/* One pass of Stockham's algorithm: butterflies of `radix` points. */
typedef struct FftPass {
    int radix, groups; /* groups: butterflies that differ in their twiddle factors */
    float *twiddles;   /* (groups, radix, 2): exp(2 pi i p k / (groups * radix)), cosine and sine */
    float *roots;      /* (radix, 2): exp(2 pi i k / radix) */
} FftPass;

typedef struct FftPlan {
    int length; /* of the real signal */
    int half;   /* of the complex transform inside: length / 2 */
    int passes;
    FftPass pass[FFT_MAX_PASSES];
    float *split; /* (half, 2): exp(2 pi i k / length) */
    float *memory;
} FftPlan;

/* Plan for `length` samples, even and at least 2; 0, or -1 when there is no memory. */
int fft_plan(FftPlan *plan, int length);
void fft_free(FftPlan *plan);

#endif

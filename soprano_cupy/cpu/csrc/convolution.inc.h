/* Rows of frames on their way into a ConvNeXt block. */

/* out = bias + sum over taps of frames[tap] * kernel[tap], channel by channel.
 * frames: (taps, channels), consecutive rows. kernel: (taps, channels). */
static void depthwise_row(const float *frames, const float *kernel, const float *bias, int taps, int channels,
                          float *out) {
    memcpy(out, bias, channels * sizeof *out);
    for (int tap = 0; tap < taps; tap++) {
        const float *x = frames + (size_t)tap * channels, *w = kernel + (size_t)tap * channels;
        for (int c = 0; c < channels; c++) out[c] += x[c] * w[c];
    }
}

/* out += (1 - share) * left + share * right. */
static void add_interpolated(const float *left, const float *right, float share, int channels, float *out) {
    for (int c = 0; c < channels; c++) out[c] += left[c] * (1.0f - share) + right[c] * share;
}

/* One hop of samples: the overlapping frames' parts, earliest frame first, over the squared windows' sum.
 * newest: the last of `parts` consecutive frames of `parts * hop` samples, whose first part lies in the hop. edges:
 * bit 0 leaves out the earliest frame, bit 1 the newest, which do not exist at an utterance's ends. */
static void overlap_hop(const float *newest, int parts, int hop, int edges, const float *envelope, float *out) {
    ptrdiff_t length = (ptrdiff_t)parts * hop;
    memset(out, 0, hop * sizeof *out);
    for (int part = parts - 1 - (edges & 1); part >= (edges >> 1); part--) {
        const float *x = newest - part * length + (ptrdiff_t)part * hop;
        for (int i = 0; i < hop; i++) out[i] += x[i];
    }
    for (int i = 0; i < hop; i++) out[i] /= envelope[i];
}

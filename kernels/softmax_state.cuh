// The online softmax of one query row (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023): what has to be
// remembered of the scores seen so far, so that keys can be taken block by block and partial results can be merged.
//
// Scores are in log2 units: score = (q . k) * scale * log2(e), so that exp(x) becomes one exp2. The weighted sum
// of the values lives with the caller, in units of 2^max: whenever `max` moves, the factor that the methods return
// brings the caller's accumulator along.
#pragma once

#include "device.cuh"

constexpr float LN_2 = 0.693147180559945309f;

// 2^x to about one unit in the last place by FMAs alone: the same bits on every architecture and on the host. For
// x <= 127; anything below -126 gives 0. Taylor series of 2^f on |f| <= 1/2.
DEVICE float exp2_exact(float x) {
    const float clamped = x > -126.0f ? x : -126.0f;  // also where x is NaN: put back below
    constexpr float SHIFT = 12582912.0f;              // 1.5 * 2^23: adding it rounds to an integer
    const float rounded = clamped + SHIFT;
    const float fraction = clamped - (rounded - SHIFT);
    float power = 1.5252734e-5f;                                 // ln2^7 / 7!
    power = fused_multiply_add(power, fraction, 1.5403530e-4f);  // ln2^6 / 6!
    power = fused_multiply_add(power, fraction, 1.3333558e-3f);  // ln2^5 / 5!
    power = fused_multiply_add(power, fraction, 9.6181291e-3f);  // ln2^4 / 4!
    power = fused_multiply_add(power, fraction, 5.5504109e-2f);  // ln2^3 / 3!
    power = fused_multiply_add(power, fraction, 2.4022651e-1f);  // ln2^2 / 2!
    power = fused_multiply_add(power, fraction, 6.9314718e-1f);  // ln2
    power = fused_multiply_add(power, fraction, 1.0f);           // |remainder| < 2^-27
    const int exponent = static_cast<int>(rounded - SHIFT);
    const float result = power * bits_to_float((exponent + 127) << 23);
    return x != x ? x : (x < -126.0f ? 0.0f : result);
}

// fp32 inputs keep the exact exponential; half-precision ones round the weights far more coarsely anyway.
DEVICE float softmax_exp2(float x) {
#if defined(DTYPE_FP32)
    return exp2_exact(x);
#else
    return exp2_fast(x);
#endif
}

struct SoftmaxState {
    float max;  // reference of the exponentials: the largest score seen, or a little below it; -inf: none seen
    float sum;  // sum of 2^(score - max) over the keys seen

    DEVICE static SoftmaxState empty() { return {-infinity(), 0.0f}; }

    // What to subtract from scores. Where every key so far is masked, max is -inf and -inf - (-inf) would be NaN.
    DEVICE float reference() const { return max == -infinity() ? 0.0f : max; }

    // The weight of a score; a masked score is -inf and weighs 0.
    DEVICE float weight(float score) const { return softmax_exp2(score - reference()); }

    // Takes the largest score of a new block into max. Returns the factor for the caller's accumulator (1 or less).
    DEVICE float raise_max(float block_max) {
        const float previous = max;
        max = block_max > previous ? block_max : previous;
        const float factor = softmax_exp2(previous - reference());
        sum *= factor;
        return factor;
    }

    // Takes in another part's (max, sum). accumulator = accumulator * own + other's accumulator * theirs.
    DEVICE void merge(const SoftmaxState& other, float& own, float& theirs) {
        own = raise_max(other.max);
        theirs = softmax_exp2(other.max - reference());
        sum = fused_multiply_add(other.sum, theirs, sum);
    }

    // Factor that turns the accumulator into the output; a row that saw nothing gives 0.
    DEVICE float inverse_sum() const { return sum == 0.0f ? 0.0f : 1.0f / sum; }

    // Natural log of the sum of exponentials of the scaled scores; -inf where nothing was seen.
    DEVICE float log_sum_exp() const { return sum == 0.0f ? -infinity() : (max + log2_fast(sum)) * LN_2; }
};

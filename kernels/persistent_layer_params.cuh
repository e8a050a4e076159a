// What a launch hands to all layers.
#pragma once

#include "persistent_device.cuh"
#include "persistent_sizes.cuh"

// What does not change during a launch.
struct LayerParams {
    const void* stream;  // weights of block b from b * stream_bytes on, in the order of use
    const float* gains;  // (layers + 1, 2, HIDDEN): input norm and post-attention norm of each layer; the final norm
    const float* head_gains;  // (layers, 2, HEAD_DIM): queries, keys
    const float2* rope;       // (positions, HEAD_DIM / 2): cosine, sine
    void* keys[VOICES];       // (layers, ..., capacity, KV_HEADS, HEAD_DIM) Element, at each voice's slot
    void* values[VOICES];
    Word*
        words;  // (2, CLUSTERS, VOICES, HIDDEN) zeroed before the launch: partial sums on their way to the other clusters
    unsigned* error;  // zeroed before the launch
    long long stream_bytes;
    long long layer_elements;  // from one layer's keys to the next's
    int layers;
    float epsilon;
};

// The one argument that every attention kernel takes, by value. The host packs it once per call
// (soprano_cupy/attention/problem.py holds the same fields in the same order).
#pragma once

struct AttentionParams {
    const void* q;  // (total_q, num_heads, HEAD_DIM) or (batch, seqlen_q, num_heads, HEAD_DIM)
    const void* k;  // (total_k, num_kv_heads, HEAD_DIM) or (batch, seqlen_k, num_kv_heads, HEAD_DIM)
    const void* v;  // laid out like k, with strides of its own
    void* out;      // laid out like q, with strides of its own
    float* lse;     // (num_heads, total_q) natural-log sum of exponentials, or null

    const int* cu_seqlens_q;  // (batch + 1,) first query row of each sequence, or null: dense q
    const int* cu_seqlens_k;  // (batch + 1,) first key row of each sequence, or null: dense k
    const int* kv_lengths;    // (batch,) keys in use of each sequence, or null: all of them

    // Strides in elements; the last axis (HEAD_DIM) is contiguous. Batch strides are unused with cu_seqlens.
    long long q_batch_stride, q_token_stride, q_head_stride;
    long long k_batch_stride, k_token_stride, k_head_stride;
    long long v_batch_stride, v_token_stride, v_head_stride;
    long long out_batch_stride, out_token_stride, out_head_stride;

    void* workspace;  // scratch of a split reduction, or null

    int batch;
    int total_q;   // query rows over all sequences
    int seqlen_q;  // longest query sequence
    int seqlen_k;  // longest key sequence (the capacity of a cache)
    int num_heads;
    int num_kv_heads;
    int splits;        // key ranges that a decode launch is divided into; 1 elsewhere
    float scale_log2;  // softmax scale times log2(e)
};

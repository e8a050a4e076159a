# cython: language_level=3
"""The C surface of the engine: `csrc/*.h` say what each function does."""

from libc.stddef cimport ptrdiff_t, size_t
from libc.stdint cimport int32_t, uint8_t


cdef extern from "kernels.h" nogil:
    ctypedef struct Kernels:
        const char *name
    const Kernels *kernels_find(const char *name)
    int kernels_available(const char **names, int room)


cdef extern from "matrix.h" nogil:
    int FLOAT32, BFLOAT16, INT8

    ctypedef struct Matrix:
        int outputs, inputs
        uint8_t *data

    ctypedef struct Source:
        const void *data
        int dtype, rows, first, interleave

    Matrix matrix_shape(int dtype, int outputs, int inputs)
    size_t matrix_bytes(const Matrix *m)
    void matrix_pack(const Kernels *kernels, Matrix *m, const Source *sources, int count)


cdef extern from "arena.h" nogil:
    void return_freed_memory()
    void *map_memory(size_t bytes, int huge)
    void unmap_memory(void *memory, size_t bytes)


cdef extern from "product.h" nogil:
    int product_run(const Kernels *kernels, const Matrix *matrix, const float *x, int rows, float *out)


cdef extern from "team.h" nogil:
    int TEAM_MAX_THREADS
    int team_resize(int threads)
    int team_size()


cdef extern from "cache.h" nogil:
    ctypedef struct KeyValues:
        int capacity
    int cache_create(KeyValues *c, int dtype, int layers, int slots, int heads, int head_dim, int tokens)
    void cache_free(KeyValues *c)
    void cache_move(const KeyValues *c, int source, int target, int tokens)
    void cache_poison(KeyValues *c)


cdef extern from "language_model.h" nogil:
    ctypedef struct ModelSizes:
        int vocab, hidden, layers, heads, kv_heads, head_dim, inner
        float eps

    ctypedef struct Layer:
        float *input_norm
        float *q_norm
        float *k_norm
        float *post_norm
        Matrix qkv, o, gate_up, down

    ctypedef struct LanguageModel:
        ModelSizes sizes
        int cache_dtype, embedding_dtype, positions
        void *embeddings
        Layer *layers
        float *norm
        Matrix head
        size_t memory_bytes

    ctypedef struct Batch:
        const int32_t *ids
        const int32_t *starts
        int count
        int32_t *lengths
        int last_only
        float *states

    LanguageModel *model_create(const Kernels *kernels, const ModelSizes *sizes, int dtype, int embedding_dtype)
    void model_free(LanguageModel *model)
    int model_set_angles(LanguageModel *model, const float *angles, int positions)
    void model_extend(LanguageModel *model, KeyValues *cache, const Batch *batch)
    int model_logits(LanguageModel *model, const float *states, int rows, float *logits)


cdef extern from "decoder.h" nogil:
    int PIECE_TOKENS, PARTS

    ctypedef struct DecoderSizes:
        int input, dim, inner, blocks, embed_taps, block_taps, hop, frames_per_token

    ctypedef struct Block:
        float *kernel
        float *kernel_bias
        float *norm
        float *norm_bias
        Matrix expand, contract
        float *expand_bias
        float *contract_bias
        float *gamma

    ctypedef struct Decoder:
        DecoderSizes sizes
        Matrix embed
        float *embed_bias
        float *norm
        float *norm_bias
        Block *blocks
        float *final_norm
        float *final_norm_bias
        Matrix head
        float *head_bias
        size_t memory_bytes

    ctypedef struct Voice:
        pass

    Decoder *decoder_create(const Kernels *kernels, const DecoderSizes *sizes, int dtype)
    void decoder_set_window(Decoder *decoder, const double *window)
    void decoder_free(Decoder *decoder)
    int voice_create(Voice *voice, const Decoder *decoder)
    void voice_free(Voice *voice)
    int voice_samples(const Voice *voice, int tokens, int finish)
    void voice_push(Decoder *decoder, Voice *voice, const float *states, int tokens, int finish, float *samples)

# cython: language_level=3, boundscheck=False, wraparound=False
"""The C engine's objects for Python: they check shapes, release the GIL and call; nothing else."""

from libc.string cimport memcpy

import numpy as np

from ..errors import ParameterError

DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}


def instruction_sets():
    """Names of the kernel tables that this processor can run, best last."""
    cdef const char *names[8]
    cdef int count = kernels_available(names, 8)
    return [names[i].decode() for i in range(count)]


def set_threads(int threads):
    """Threads that compute from the next call on, the caller included; returns what was set."""
    return team_resize(threads)


def trim_memory():
    """Give what was freed back to the system: reading a checkpoint leaves megabytes that nothing needs any more."""
    return_freed_memory()


def get_threads():
    """Threads that compute."""
    return team_size()


cdef const Kernels *find_kernels(name) except NULL:
    cdef bytes encoded = b"" if name is None else name.encode()
    cdef const Kernels *kernels = kernels_find(NULL if name is None else <const char *>encoded)
    if kernels == NULL:
        raise ParameterError(f"instruction set {name!r} is not available; this processor has {instruction_sets()}")
    return kernels


cdef int source_dtype(array) except -1:
    """The C name of a source array's dtype: float32, or uint16 for the bits of bfloat16."""
    if not array.flags.c_contiguous:
        raise ParameterError("weights must be C-contiguous")
    if array.dtype == np.float32:
        return FLOAT32
    if array.dtype == np.uint16:
        return BFLOAT16
    raise ParameterError(f"weights must be float32 or bfloat16 bits (uint16), not {array.dtype}")


cdef pack(const Kernels *kernels, Matrix *m, parts):
    """Pack (array, first output, interleave) parts into a matrix."""
    cdef Source sources[4]
    cdef int count = len(parts), i
    cdef const uint8_t[::1] view
    if count > 4:
        raise ParameterError("at most 4 parts make a matrix")
    for i, (array, first, interleave) in enumerate(parts):
        if array.ndim != 2 or array.shape[1] != m.inputs:
            raise ParameterError(f"weights of shape {array.shape} do not fit a matrix of {m.inputs} inputs")
        view = array.reshape(-1).view(np.uint8)
        sources[i] = Source(&view[0], source_dtype(array), array.shape[0], first, interleave)
    with nogil:
        matrix_pack(kernels, m, sources, count)


cdef class PackedMatrix:
    """A weight matrix by itself: (outputs, inputs) packed for one dtype."""

    cdef Matrix matrix
    cdef const Kernels *kernels

    def __cinit__(self, weights, dtype, isa=None):
        self.kernels = find_kernels(isa)
        self.matrix = matrix_shape(DTYPES[dtype], weights.shape[0], weights.shape[1])
        self.matrix.data = <uint8_t *>map_memory(matrix_bytes(&self.matrix), 0)
        if self.matrix.data == NULL:
            raise MemoryError
        pack(self.kernels, &self.matrix, [(weights, 0, 0)])

    def __dealloc__(self):
        unmap_memory(self.matrix.data, matrix_bytes(&self.matrix))

    def multiply(self, x):
        """x (rows, inputs) float32 -> (rows, outputs) float32."""
        cdef const float[:, ::1] rows = x
        if rows.shape[1] != self.matrix.inputs or rows.shape[0] < 1:
            raise ParameterError(f"rows of shape {x.shape} do not fit a matrix of {self.matrix.inputs} inputs")
        out = np.empty((rows.shape[0], self.matrix.outputs), np.float32)
        cdef float[:, ::1] target = out
        cdef int failed
        with nogil:
            failed = product_run(self.kernels, &self.matrix, &rows[0, 0], rows.shape[0], &target[0, 0])
        if failed:
            raise MemoryError
        return out


cdef copy_vector(float *target, int size, values):
    cdef const float[::1] source = np.ascontiguousarray(values, np.float32)
    if source.shape[0] != size:
        raise ParameterError(f"a vector of {source.shape[0]} values where {size} belong")
    memcpy(target, &source[0], size * sizeof(float))


cdef class Cache:
    """Keys and values of the language model."""

    cdef KeyValues values
    cdef readonly int slots

    def __cinit__(self, Model model, int slots, int tokens):
        cdef ModelSizes *s = &model.model.sizes
        self.slots = slots
        if cache_create(&self.values, model.model.cache_dtype, s.layers, slots, s.kv_heads, s.head_dim, tokens):
            raise MemoryError

    def __dealloc__(self):
        cache_free(&self.values)

    def move(self, int source, int target, int tokens):
        """Copy the first tokens of one slot over another."""
        if not (0 <= source < self.slots and 0 <= target < self.slots and 0 <= tokens <= self.values.capacity):
            raise ParameterError(f"no slots {source} and {target} with {tokens} tokens")
        cache_move(&self.values, source, target, tokens)

    def poison(self):
        """Fill all keys and values with NaN."""
        cache_poison(&self.values)


cdef class Model:
    """A language model whose weights are handed over one by one."""

    cdef LanguageModel *model
    cdef const Kernels *kernels
    cdef readonly str isa

    def __cinit__(self, config, dtype, embedding_dtype, isa=None):
        self.kernels = find_kernels(isa)
        cdef ModelSizes sizes = ModelSizes(
            config.vocab_size, config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads,
            config.head_dim, config.intermediate_size, config.rms_norm_eps,
        )
        self.isa = self.kernels.name.decode()
        self.model = model_create(self.kernels, &sizes, DTYPES[dtype], DTYPES[embedding_dtype])
        if self.model == NULL:
            raise MemoryError

    def __dealloc__(self):
        model_free(self.model)

    @property
    def positions(self):
        """Positions that rotary angles are there for."""
        return self.model.positions

    @property
    def weight_bytes(self):
        """Memory of all packed weights."""
        return self.model.memory_bytes

    def set_norms(self, int layer, input_norm, q_norm, k_norm, post_norm):
        cdef Layer *target = &self.model.layers[self._check_layer(layer)]
        cdef ModelSizes *s = &self.model.sizes
        copy_vector(target.input_norm, s.hidden, input_norm)
        copy_vector(target.q_norm, s.head_dim, q_norm)
        copy_vector(target.k_norm, s.head_dim, k_norm)
        copy_vector(target.post_norm, s.hidden, post_norm)

    def set_attention(self, int layer, q, k, v, o):
        cdef Layer *target = &self.model.layers[self._check_layer(layer)]
        pack(self.kernels, &target.qkv, [(q, 0, 0), (k, q.shape[0], 0), (v, q.shape[0] + k.shape[0], 0)])
        pack(self.kernels, &target.o, [(o, 0, 0)])

    def set_mlp(self, int layer, gate, up, down):
        cdef Layer *target = &self.model.layers[self._check_layer(layer)]
        pack(self.kernels, &target.gate_up, [(gate, 0, 1), (up, 16, 1)])
        pack(self.kernels, &target.down, [(down, 0, 0)])

    def set_ends(self, embeddings, norm, head):
        """The embeddings (float32 or bfloat16 bits, as they are kept), the final norm and the output matrix."""
        cdef const uint8_t[::1] bytes
        if embeddings.shape != (self.model.sizes.vocab, self.model.sizes.hidden):
            raise ParameterError(f"embeddings of shape {embeddings.shape}")
        if source_dtype(embeddings) != self.model.embedding_dtype:
            raise ParameterError(f"embeddings of dtype {embeddings.dtype}")
        bytes = embeddings.reshape(-1).view(np.uint8)
        memcpy(self.model.embeddings, &bytes[0], bytes.shape[0])
        copy_vector(self.model.norm, self.model.sizes.hidden, norm)
        pack(self.kernels, &self.model.head, [(head, 0, 0)])

    def set_angles(self, angles):
        """Rotary angles (positions, head_dim) float32: cosines, then sines."""
        cdef const float[:, ::1] view = angles
        if view.shape[1] != self.model.sizes.head_dim:
            raise ParameterError(f"angles of shape {angles.shape}")
        if model_set_angles(self.model, &view[0, 0], view.shape[0]):
            raise MemoryError

    def extend(self, Cache cache, ids, cu_seqlens, lengths, *, last_only):
        """Append rows to the sequences in slots 0 to n - 1; `lengths` (slots,) is updated."""
        cdef const int32_t[::1] tokens = np.ascontiguousarray(ids, np.int32)
        cdef const int32_t[::1] starts = np.ascontiguousarray(cu_seqlens, np.int32)
        cdef int32_t[::1] held = lengths
        cdef int count = starts.shape[0] - 1
        self._check_batch(cache, tokens, starts, held)
        states = np.empty((count if last_only else tokens.shape[0], self.model.sizes.hidden), np.float32)
        cdef float[:, ::1] target = states
        cdef Batch batch = Batch(&tokens[0], &starts[0], count, &held[0], last_only, &target[0, 0])
        with nogil:
            model_extend(self.model, &cache.values, &batch)
        return states

    def logits(self, states):
        """states (rows, hidden) float32 -> (rows, vocab) float32."""
        cdef const float[:, ::1] rows = np.ascontiguousarray(states, np.float32)
        if rows.shape[1] != self.model.sizes.hidden:
            raise ParameterError(f"states of shape {states.shape}")
        out = np.empty((rows.shape[0], self.model.sizes.vocab), np.float32)
        cdef float[:, ::1] target = out
        cdef int failed = 0
        if rows.shape[0] == 0:
            return out
        with nogil:
            failed = model_logits(self.model, &rows[0, 0], rows.shape[0], &target[0, 0])
        if failed:
            raise MemoryError
        return out

    cdef int _check_layer(self, int layer) except -1:
        if not 0 <= layer < self.model.sizes.layers:
            raise ParameterError(f"layer {layer} of {self.model.sizes.layers}")
        return layer

    cdef int _check_batch(
        self, Cache cache, const int32_t[::1] tokens, const int32_t[::1] starts, int32_t[::1] held
    ) except -1:
        """Everything that the C code relies on: it writes where these numbers say."""
        cdef int count = starts.shape[0] - 1, i
        if count < 1 or count > cache.slots or held.shape[0] < count or starts[0] != 0:
            raise ParameterError(f"{count} sequences for a cache of {cache.slots} slots")
        for i in range(count):
            if starts[i + 1] <= starts[i] or held[i] < 0:
                raise ParameterError(f"sequence {i} adds no token")
            if held[i] + (starts[i + 1] - starts[i]) > min(cache.values.capacity, self.model.positions):
                raise ParameterError(f"sequence {i} outgrows the cache's {cache.values.capacity} tokens")
        if starts[count] != tokens.shape[0]:
            raise ParameterError(f"{tokens.shape[0]} ids where the sequences add {starts[count]}")
        for i in range(tokens.shape[0]):
            if not 0 <= tokens[i] < self.model.sizes.vocab:
                raise ParameterError(f"id {tokens[i]} is outside the vocabulary")
        return 0


cdef class VocosModel:
    """A decoder whose weights are handed over one by one."""

    cdef Decoder *decoder
    cdef const Kernels *kernels
    cdef readonly str isa

    def __cinit__(self, config, dtype, isa=None):
        self.kernels = find_kernels(isa)
        cdef DecoderSizes sizes = DecoderSizes(
            config.input_size, config.dim, config.intermediate_size, config.num_blocks, config.embed_kernel,
            config.block_kernel, config.hop_length, config.frames_per_token,
        )
        self.isa = self.kernels.name.decode()
        self.decoder = decoder_create(self.kernels, &sizes, DTYPES[dtype])
        if self.decoder == NULL:
            raise MemoryError

    def __dealloc__(self):
        decoder_free(self.decoder)

    @property
    def weight_bytes(self):
        """Memory of all packed weights."""
        return self.decoder.memory_bytes

    @property
    def input_size(self):
        """Width of the states."""
        return self.decoder.sizes.input

    def set_embedding(self, taps, bias, norm, norm_bias):
        """taps: (taps * dim, input), tap after tap."""
        cdef int dim = self.decoder.sizes.dim
        pack(self.kernels, &self.decoder.embed, [(taps, 0, 0)])
        copy_vector(self.decoder.embed_bias, dim, bias)
        copy_vector(self.decoder.norm, dim, norm)
        copy_vector(self.decoder.norm_bias, dim, norm_bias)

    def set_convolution(self, int index, kernel, bias, norm, norm_bias):
        """kernel: (taps, dim), the depthwise convolution of block `index`."""
        cdef int dim = self.decoder.sizes.dim
        cdef Block *block = &self.decoder.blocks[self._check_block(index)]
        copy_vector(block.kernel, self.decoder.sizes.block_taps * dim, kernel.reshape(-1))
        copy_vector(block.kernel_bias, dim, bias)
        copy_vector(block.norm, dim, norm)
        copy_vector(block.norm_bias, dim, norm_bias)

    def set_mlp(self, int index, expand, expand_bias, contract, contract_bias, gamma):
        cdef int dim = self.decoder.sizes.dim
        cdef Block *block = &self.decoder.blocks[self._check_block(index)]
        pack(self.kernels, &block.expand, [(expand, 0, 0)])
        pack(self.kernels, &block.contract, [(contract, 0, 0)])
        copy_vector(block.expand_bias, self.decoder.sizes.inner, expand_bias)
        copy_vector(block.contract_bias, dim, contract_bias)
        copy_vector(block.gamma, dim, gamma)

    def set_head(self, norm, norm_bias, head, bias):
        copy_vector(self.decoder.final_norm, self.decoder.sizes.dim, norm)
        copy_vector(self.decoder.final_norm_bias, self.decoder.sizes.dim, norm_bias)
        pack(self.kernels, &self.decoder.head, [(head, 0, 0)])
        copy_vector(self.decoder.head_bias, self.decoder.head.outputs, bias)

    def set_window(self, window):
        """The synthesis window (n_fft,) float64."""
        cdef const double[::1] values = window
        if values.shape[0] != PARTS * self.decoder.sizes.hop:
            raise ParameterError(f"a window of {values.shape[0]} samples")
        decoder_set_window(self.decoder, &values[0])

    cdef int _check_block(self, int index) except -1:
        if not 0 <= index < self.decoder.sizes.blocks:
            raise ParameterError(f"block {index} of {self.decoder.sizes.blocks}")
        return index


cdef class Utterance:
    """One utterance on its way through the decoder."""

    cdef VocosModel model
    cdef Voice voice
    cdef readonly bint finished

    def __cinit__(self, VocosModel model):
        self.model = model
        if voice_create(&self.voice, model.decoder):
            raise MemoryError

    def __dealloc__(self):
        voice_free(&self.voice)

    def samples(self, int states, *, finish=False):
        """How many samples so many further states would make final."""
        return voice_samples(&self.voice, states, finish)

    def push(self, states, *, finish):
        """Take (n, input) float32 states; return the samples that are final now. `finish`: these are the last."""
        cdef const float[:, ::1] rows = states
        cdef int count = rows.shape[0], start = 0, tokens, last, total
        cdef Py_ssize_t written = 0, made
        cdef const float *source
        if self.finished:
            raise ParameterError("the utterance has ended; begin a new stream")
        if rows.shape[1] != self.model.decoder.sizes.input:
            raise ParameterError(f"states of shape {states.shape}")
        samples = np.empty(voice_samples(&self.voice, count, finish), np.float32)
        cdef float[::1] target = samples
        while start < count or (finish and not self.finished):
            tokens = min(count - start, PIECE_TOKENS)
            last = finish and start + tokens == count
            made = voice_samples(&self.voice, tokens, last)
            source = &rows[start, 0] if tokens else NULL
            with nogil:
                voice_push(
                    self.model.decoder, &self.voice, source, tokens, last, &target[written] if made else NULL
                )
            written += made
            start += tokens
            self.finished = last
        return samples

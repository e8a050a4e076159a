// Kernels that expose one stage of the Hopper prefill kernel each; hopper_check.py compiles them behind its source,
// whose constants and helpers they use.

extern "C" __global__ void probe_copy(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                                      uint4* q_bytes, uint4* k_bytes, int head, int token, int batch, int key,
                                      int kv_head) {
    extern __shared__ unsigned char shared_bytes[];
    const Shared smem(smem_address(shared_bytes));
    if (threadIdx.x == 0) {
        mbarrier_init(smem.q_full(), 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(smem.q_full(), Q_BYTES + KV_BYTES);
        load_panels(smem.q, Q_PANEL_BYTES, &q_map, smem.q_full(), head, token, batch);
        load_panels(smem.k, KV_PANEL_BYTES, &k_map, smem.q_full(), key, kv_head, batch);
    }
    mbarrier_wait(smem.q_full(), 0);
    auto read = [](u32 address) {
        uint4 x;
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "r"(address));
        return x;
    };
    for (int i = threadIdx.x; i < Q_BYTES / 16; i += blockDim.x) q_bytes[i] = read(smem.q + 16 * i);
    for (int i = threadIdx.x; i < KV_BYTES / 16; i += blockDim.x) k_bytes[i] = read(smem.k + 16 * i);
}

// weights: (BLOCK_M, BLOCK_N) float. scores: (BLOCK_M, BLOCK_N). outputs: (BLOCK_M, HEAD_DIM).
extern "C" __global__ void __launch_bounds__(CONSUMERS * 128, 1)
    probe_products(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map, const float* weights, float* scores, float* outputs) {
    extern __shared__ unsigned char shared_bytes[];
    const Shared smem(smem_address(shared_bytes));
    if (threadIdx.x == 0) {
        mbarrier_init(smem.q_full(), 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(smem.q_full(), Q_BYTES + 2 * KV_BYTES);
        load_panels(smem.q, Q_PANEL_BYTES, &q_map, smem.q_full(), 0, 0, 0);
        load_panels(smem.k, KV_PANEL_BYTES, &k_map, smem.q_full(), 0, 0, 0);
        load_panels(smem.v, KV_PANEL_BYTES, &v_map, smem.q_full(), 0, 0, 0);
    }
    mbarrier_wait(smem.q_full(), 0);
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    const int row = group * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const int column = 2 * (threadIdx.x % 4);
    float s_rmem[S_REGISTERS], o_rmem[O_REGISTERS];
    issue_scores(s_rmem, descriptor_k_major(smem.q + group * 64 * PANEL_ROW_BYTES), descriptor_k_major(smem.k));
    wgmma_wait<0>(s_rmem);
    for (int i = 0; i < S_REGISTERS; ++i) {
        const int at = (row + 8 * (i / 2 % 2)) * BLOCK_N + 8 * (i / 4) + column + i % 2;
        scores[at] = s_rmem[i];
        s_rmem[i] = weights[at];
    }
    u32 p_rmem[S_REGISTERS / 2];
    round_weights(p_rmem, s_rmem);
    for (int i = 0; i < O_REGISTERS; ++i) o_rmem[i] = 0.0f;
    issue_output(o_rmem, p_rmem, descriptor_n_major<KV_PANEL_BYTES>(smem.v));
    wgmma_wait<0>(o_rmem);
    for (int i = 0; i < O_REGISTERS; ++i)
        outputs[(row + 8 * (i / 2 % 2)) * HEAD_DIM + 8 * (i / 4) + column + i % 2] = o_rmem[i];
}

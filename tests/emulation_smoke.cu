// A kernel that touches every primitive once: per block, out = q k^T for one 16 x 8 tile of depth HEAD_DIM by tensor
// cores, staged through asynchronous copies and shared memory. q: (16, HEAD_DIM), k: (8, HEAD_DIM), lse: (16, 8).
#include "attention_params.cuh"
#include "softmax_state.cuh"

extern "C" __global__ void __launch_bounds__(32) smoke(const __grid_constant__ AttentionParams params) {
    constexpr int ROW_BYTES = HEAD_DIM * 2;
    const int lane = lane_index();
    const unsigned q_smem = shared_base(), k_smem = q_smem + 16 * ROW_BYTES;
    for (int chunk = lane; chunk < 24 * ROW_BYTES / 16; chunk += WARP_LANES) {
        const bool is_q = chunk < ROW_BYTES;
        const char* source = is_q ? static_cast<const char*>(params.q) + chunk * 16
                                  : static_cast<const char*>(params.k) + (chunk - ROW_BYTES) * 16;
        copy_async_16(q_smem + chunk * 16, source, true);
    }
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    float s_rmem[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int k = 0; k < HEAD_DIM; k += 16) {
        unsigned a[4], b[2];
        load_matrix_x4(a, q_smem + (lane % 16) * ROW_BYTES + k * 2 + (lane / 16) * 16);
        load_matrix_x2(b, k_smem + (lane % 8) * ROW_BYTES + k * 2 + (lane / 8 % 2) * 16);
        mma_16x8x16(s_rmem, a, b[0], b[1]);
    }
    // Out through shared memory and one exchange between neighbours and back.
    sync_block();
    const int row = lane / 4, column = lane % 4 * 2;
    const float2 top = {shuffle_xor(shuffle_xor(s_rmem[0], 1), 1), s_rmem[1]}, bottom = {s_rmem[2], s_rmem[3]};
    store_shared<float2>(q_smem + (row * 8 + column) * 4, top);
    store_shared<float2>(q_smem + ((row + 8) * 8 + column) * 4, bottom);
    sync_warp();
    store_global<float4>(params.lse + lane * 4, load_shared<float4>(q_smem + lane * 16));
}

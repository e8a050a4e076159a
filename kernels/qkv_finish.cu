// From raw query, key and value products to what attention reads, for the rows of a prefill: head norms, rotation,
// queries in 16 bits, and keys and values into the cache at each row's slot and position.
//
// Compile-time: HEAD_DIM 32, 64 or 128; DTYPE_FP16 or DTYPE_BF16. Launch (soprano_cupy/gpu/step.py): one thread block
// for each row, whose warps share out the heads.
#include "device.cuh"
#include "head_pairs.cuh"
#include "step_params.cuh"

extern "C" __global__ void __launch_bounds__(256) qkv_finish(const __grid_constant__ QkvFinishParams params) {
    grid_dependency_launch();
    const int row = blockIdx.x, warps = blockDim.x / WARP_LANES;
    const int q_heads = params.q_heads, kv_heads = params.kv_heads, heads = q_heads + 2 * kv_heads;
    HeadPairs q_gain, k_gain;
    q_gain.load(params.q_gain);
    k_gain.load(params.k_gain);
    grid_dependency_wait();
    if (row >= params.rows) return;
    const int slot = load_global_fresh<int>(params.row_slots + row);
    const int position = load_global_fresh<int>(params.row_positions + row);
    if (slot < 0 || position < 0 || position >= params.capacity) return;
    const float4 angles = load_angles(params.rope, position);
    const long long first = static_cast<long long>(row) * heads;
    const long long place = (static_cast<long long>(slot) * params.capacity + position) * kv_heads;
    for (int head = warp_index(); head < heads; head += warps) {
        const bool query = head < q_heads, key = !query && head < q_heads + kv_heads;
        HeadPairs pairs;
        pairs.clear();
        if (HeadPairs::holds()) pairs.load_fresh(params.qkv + (first + head) * HEAD_DIM + 2 * lane_index());
        if (query || key) {
            pairs.normalise(HeadPairs::select(query, q_gain, k_gain), params.epsilon);
            pairs.rotate(angles);
        }
        if (query) {
            const long long offset = (static_cast<long long>(row) * q_heads + head) * HEAD_DIM;
            pairs.store(static_cast<Element*>(params.queries) + offset);
            continue;
        }
        const int kv_head = head - q_heads - (key ? 0 : kv_heads);
        pairs.store(static_cast<Element*>(key ? params.keys : params.values) + (place + kv_head) * HEAD_DIM);
        void* packed = key ? params.packed_keys : params.packed_values;
        if (packed != nullptr) {
            const long long offset = (static_cast<long long>(row) * kv_heads + kv_head) * HEAD_DIM;
            pairs.store(static_cast<Element*>(packed) + offset);
        }
    }
}

// Layers of one token, one behind the other, by a grid that stays: what benchmarks/exchange.py checks and times.
//
// TRANSPORT 0: clusters (persistent_cluster.cuh). 1: one group of blocks through global memory (flat_exchange.cuh).
#include "persistent_watch.cuh"
#include "persistent_sizes.cuh"
#if TRANSPORT == 0
#include "persistent_cluster.cuh"
#else
#include "experiments/flat_exchange.cuh"
#endif
#include "persistent_start.cuh"

struct LayersParams {
    LayerParams layer;
    const float* input;  // (HIDDEN,)
    float* output;       // (HIDDEN,) behind the last layer
    int rounds;          // through all layers
    int position;
};

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) layers(const __grid_constant__ LayersParams params) {
    const unsigned base = shared_base();
    const LayerParams& p = params.layer;
    const Watch watch{p.error, base + DEAD_AT};
    Worker worker(p, base, blockIdx.x / RANKS, blockIdx.x % RANKS, watch);
#if TRANSPORT == 1
    worker.exchange.words = p.words;
#endif
    begin_block(worker);
#if TRANSPORT == 0
    sync_cluster();
#else
    sync_block();
#endif
    if (warp_index() == STREAM_WARP) {
        const Work work(worker.rank, blockIdx.x);
        const char* stream = static_cast<const char*>(p.stream) + blockIdx.x * p.stream_bytes;
        Streamer streamer{base, watch, stream, work, p.layers, false};
        streamer.run();
    } else if (warp_index() < TEAM_WARPS) {
        worker.fetch_angles(params.position);
        worker.begin_token(params.position);
        if (worker.owns()) {
            worker.residual = worker.owns_row() ? load_global<float>(params.input + worker.row()) : 0.0f;
            worker.publish_residual<EX_HIDDEN, EX_SUMS>(worker.owns_row() ? load_global<float>(worker.gain(0)) : 0.0f);
        }
        for (int round = 0; round < params.rounds; ++round)
#pragma unroll 1
            for (int i = 0; i < p.layers; ++i) worker.layer(i);
        worker.exchange.await<EX_HIDDEN>();
        worker.exchange.await<EX_SUMS>();
        if (worker.cluster == 0 && worker.owns() && worker.owns_row())
            store_global<float>(params.output + worker.row(), worker.residual);
        if (threadIdx.x == 0) store_flag_shared(base + STOP_AT, 1u);
    }
    linger(watch);
#if TRANSPORT == 0
    sync_warp();
    sync_cluster();
#endif
}

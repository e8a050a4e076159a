// One sequence, or a few, from the first token to [STOP] in one launch: all layers, the output head and the sampling, token after token.
//
// The grid is CLUSTERS clusters of RANKS blocks, which all run at once and stay; persistent_sizes.cuh says who computes what,
// persistent_layer.cuh how a layer goes. Block v chooses the tokens of voice v. Semantics, random numbers and published data are those
// of sample.cu. If a wait takes too long, `error` is set and the launch ends with nothing more published.
//
// Compile-time: see persistent_sizes.cuh; THREADS = 256 and SEARCH_BARRIER = 1 for the search.
// Launch (soprano_cupy/gpu/persistent.py): blocks of 320 threads, clusters of RANKS along x; layer.words and layer.error zeroed.
#include "persistent_watch.cuh"

#include "persistent_cluster.cuh"
#include "persistent_sampler.cuh"
#include "persistent_start.cuh"

// The threads that compute.
DEVICE void generate(const PersistentParams& p, Worker& worker, Choir& choir, const Sampler& sampler) {
    choir.begin();
    worker.fetch_angles(min(worker.position, p.positions - 1));
    float first_gain = worker.owns_row() ? load_global<float>(worker.gain(0)) : 0.0f;
    for (unsigned number = 1; choir.alive != 0; ++number) {
        worker.begin_token(worker.position);
        if (worker.owns()) worker.publish_residual<EX_HIDDEN, EX_SUMS>(first_gain);
#pragma unroll 1
        for (int i = 0; i < p.layer.layers; ++i) worker.layer(i);
        const bool chooses = blockIdx.x < VOICES && choir.is_alive(blockIdx.x);
        const bool greedy = chooses && choir.greedy(blockIdx.x);
        choir.score(number);
        // On their way while the tokens are chosen.
        worker.fetch_angles(min(worker.position + 1, p.positions - 1));
        first_gain = worker.owns_row() ? load_global<float>(worker.gain(0)) : 0.0f;
        if (chooses) sampler.choose(number, greedy);
        if (IN_ROOM && chooses && !greedy) fence_copies();
        WORKER_MARK(28);
        choir.receive(number);
        if (choir.alive != 0) choir.give_back();
    }
    if (threadIdx.x == 0) store_flag_shared(worker.base + STOP_AT, 1u);
}

// The warp that tells: of states, in the first cluster, and of tokens, in the blocks that choose.
DEVICE void tell(const PersistentParams& p, const Worker& worker, const Sampler& sampler, bool chooses) {
    const bool scribes = worker.cluster == 0 && worker.hidden.count() > 0;
    bool tells = chooses && is_running(sampler.place);
    for (unsigned number = 1; scribes || tells; ++number) {
        if (scribes && !Choir::scribe(p, worker, number)) break;
        tells = tells && sampler.tell(number);
    }
    if (blockIdx.x != 0) return;
    while (all_lanes(load_flag_shared(sampler.base + STOP_AT) == 0)) pause();  // the team ends, one way or another
    if (lane_index() == 0 && p.report != nullptr) publish(p.report, 1ull + load_flag(p.layer.error));
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    decode_persistent(const __grid_constant__ PersistentParams params) {
    const unsigned base = shared_base();
    const Watch watch{params.layer.error, base + DEAD_AT};
    const bool chooses = static_cast<int>(blockIdx.x) < params.voices;
    const int voice = chooses ? blockIdx.x : 0;
    const Sampler sampler{params, params.places[voice], voice, base, watch};
    Worker worker(params.layer, base, blockIdx.x / RANKS, blockIdx.x % RANKS, watch);
    begin_block(worker);
    if (chooses && warp_index() < TEAM_WARPS) sampler.begin();
    if (threadIdx.x == 0) {
        store_release(base + NEWS_AT + 4, 0u);
        for (int unit = 0; unit < Worker::UNITS; ++unit) store_release(base + STATED_AT + unit * 4, 0u);
    }
    sync_cluster();
    if (warp_index() < TEAM_WARPS) {
        Choir choir(params, worker);
        generate(params, worker, choir, sampler);
    } else if (warp_index() == STREAM_WARP) {
        const Work work(worker.rank, blockIdx.x);
        const char* stream = static_cast<const char*>(params.layer.stream) + blockIdx.x * params.layer.stream_bytes;
        Streamer streamer{base, watch, stream, work, params.layer.layers, true};
        streamer.run();
    } else {
        tell(params, worker, sampler, chooses);
    }
    linger(watch);
    sync_warp();
    sync_cluster();
}

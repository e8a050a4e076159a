// The two ends of a prefill's rows: embed (ids to the residual stream), gather_rows (the last row of each sequence, for
// the head), and final_norm (the states of all rows).
//
// Compile-time: DTYPE_*. Launch (soprano_cupy/gpu/step.py): one thread block for each row; any multiple of 32 threads.
#include "device.cuh"
#include "residual_row.cuh"
#include "step_params.cuh"

extern "C" __global__ void __launch_bounds__(256) embed(const __grid_constant__ EmbedParams params) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int row = blockIdx.x;
    if (row >= params.rows) return;
    const int columns = params.columns, id = load_global_fresh<int>(params.ids + row);
    const Element* embedding = static_cast<const Element*>(params.embeddings) + static_cast<long long>(id) * columns;
    const long long offset = static_cast<long long>(row) * params.stride;
    for (int first = 0; first < columns; first += blockDim.x) {
        const int column = first + threadIdx.x;
        const bool exists = column < columns;
        const float value = exists ? to_float(load_global<Element>(embedding + column)) : 0.0f;
        write_residual(params.residual + offset, static_cast<Element*>(params.hidden) + offset,
                       params.square_sums + static_cast<long long>(row) * sum_tiles(columns), column, columns, value,
                       exists ? load_global<float>(params.gain + column) : 0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(256) gather_rows(const __grid_constant__ GatherParams params) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int sequence = blockIdx.x;
    if (sequence >= params.sequences) return;
    const int row = load_global_fresh<int>(params.starts + sequence + 1) - 1;
    const int columns = params.columns, tiles = sum_tiles(columns);
    const long long from = static_cast<long long>(row) * params.stride;
    const long long to = static_cast<long long>(sequence) * params.stride;
    const Element* hidden = static_cast<const Element*>(params.hidden) + from;
    Element* last_hidden = static_cast<Element*>(params.last_hidden) + to;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        store_global<float>(params.last_residual + to + i, load_global_fresh<float>(params.residual + from + i));
        store_global<Element>(last_hidden + i, load_global_fresh<Element>(hidden + i));
    }
    const float* sums = params.square_sums + static_cast<long long>(row) * tiles;
    float* last_sums = params.last_square_sums + static_cast<long long>(sequence) * tiles;
    for (int i = threadIdx.x; i < tiles; i += blockDim.x) {
        store_global<float>(last_sums + i, load_global_fresh<float>(sums + i));
    }
}

extern "C" __global__ void __launch_bounds__(256) final_norm(const __grid_constant__ FinalNormParams params) {
    grid_dependency_launch();
    grid_dependency_wait();
    const long long row = blockIdx.x;
    if (row >= params.rows) return;
    const int columns = params.columns;
    const float factor =
        inverse_rms(params.square_sums + row * sum_tiles(columns), columns, params.inverse_width, params.epsilon);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        const float value = load_global_fresh<float>(params.residual + row * params.stride + i);
        store_global<float>(params.states + row * columns + i, value * factor * load_global<float>(params.gain + i));
    }
}

// Part of device.cuh: barriers of a block and a warp, and the wait for the kernel before.
#pragma once

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }

// Waits for `threads` threads (a multiple of 32) at barrier `id` (1 to 15).
DEVICE void sync_named(int id, int threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Programmatic dependent launch (PTX griddepcontrol): the next kernel of the stream may begin once every block of this one
// has called grid_dependency_launch; grid_dependency_wait returns when the kernels before are done and their writes seen.
DEVICE void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

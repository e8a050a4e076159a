// The part of CUDA's driver interface that the launcher calls, declared by ourselves: no CUDA header is needed to build,
// and libcuda is opened when it is first needed, not linked.
//
// Structures follow the driver's binary interface of CUDA 11.8 and later on 64-bit Linux.
#pragma once

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

typedef int Status;        // CUresult
typedef void* Context;     // CUcontext
typedef void* Stream;      // CUstream
typedef void* Function;    // CUfunction
typedef void* Event;       // CUevent
typedef void* Graph;       // CUgraph
typedef void* GraphExec;   // CUgraphExec
typedef void* GraphNode;   // CUgraphNode
typedef uint64_t Address;  // CUdeviceptr

enum {
    SUCCESS = 0,
    NOT_READY = 600,

    ATTRIBUTE_COOPERATIVE = 2,
    ATTRIBUTE_CLUSTER = 4,
    ATTRIBUTE_PROGRAMMATIC = 6,  // programmatic stream serialization

    FUNCTION_MAX_THREADS = 0,
    FUNCTION_STATIC_SHARED_BYTES = 1,
    FUNCTION_LOCAL_BYTES = 3,
    FUNCTION_REGISTERS = 4,
    FUNCTION_MAX_DYNAMIC_SHARED = 8,
    FUNCTION_LARGE_CLUSTERS = 14,  // more than the portable 8 blocks

    CAPTURE_THREAD_LOCAL = 1,
    EDGE_PROGRAMMATIC = 1,
    HOST_PORTABLE = 1,
    HOST_MAPPED = 2,
    EVENT_BLOCKING = 1,
    EVENT_NO_TIMING = 2,
};

typedef struct {  // CUlaunchAttribute
    uint32_t id;
    uint32_t pad;
    union {
        uint64_t size[8];
        int cooperative;
        struct {
            uint32_t x, y, z;
        } cluster;
        int programmatic;
    } value;
} LaunchAttribute;

typedef struct {  // CUlaunchConfig
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared_bytes;
    Stream stream;
    LaunchAttribute* attributes;
    uint32_t attribute_count;
} LaunchConfig;

typedef struct {  // CUgraphEdgeData
    uint8_t from_port, to_port, type, reserved[5];
} EdgeData;

static_assert(sizeof(LaunchAttribute) == 72 && offsetof(LaunchAttribute, value) == 8, "layout of CUlaunchAttribute");
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32, "layout of CUlaunchConfig");
static_assert(offsetof(LaunchConfig, attributes) == 40, "layout of CUlaunchConfig");
static_assert(sizeof(EdgeData) == 8, "layout of CUgraphEdgeData");

// X(member, exported name, arguments): every driver that CuPy still runs on has these.
#define REQUIRED_ENTRIES(X)                                                                                     \
    X(driver_version, "cuDriverGetVersion", (int*))                                                             \
    X(error_name, "cuGetErrorName", (Status, const char**))                                                     \
    X(error_text, "cuGetErrorString", (Status, const char**))                                                   \
    X(context_current, "cuCtxGetCurrent", (Context*))                                                           \
    X(context_push, "cuCtxPushCurrent_v2", (Context))                                                           \
    X(context_pop, "cuCtxPopCurrent_v2", (Context*))                                                            \
    X(launch, "cuLaunchKernel",                                                                                 \
      (Function, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, Stream, void**, void**)) \
    X(function_get, "cuFuncGetAttribute", (int*, int, Function))                                                \
    X(function_set, "cuFuncSetAttribute", (Function, int, int))                                                 \
    X(active_blocks, "cuOccupancyMaxActiveBlocksPerMultiprocessor", (int*, Function, int, size_t))              \
    X(stream_query, "cuStreamQuery", (Stream))                                                                  \
    X(stream_synchronize, "cuStreamSynchronize", (Stream))                                                      \
    X(stream_wait_event, "cuStreamWaitEvent", (Stream, Event, unsigned))                                        \
    X(capture_begin, "cuStreamBeginCapture_v2", (Stream, int))                                                  \
    X(capture_end, "cuStreamEndCapture", (Stream, Graph*))                                                      \
    X(graph_instantiate, "cuGraphInstantiateWithFlags", (GraphExec*, Graph, unsigned long long))                \
    X(graph_launch, "cuGraphLaunch", (GraphExec, Stream))                                                       \
    X(graph_upload, "cuGraphUpload", (GraphExec, Stream))                                                       \
    X(graph_nodes, "cuGraphGetNodes", (Graph, GraphNode*, size_t*))                                             \
    X(graph_destroy, "cuGraphDestroy", (Graph))                                                                 \
    X(graph_exec_destroy, "cuGraphExecDestroy", (GraphExec))                                                    \
    X(event_create, "cuEventCreate", (Event*, unsigned))                                                        \
    X(event_record, "cuEventRecord", (Event, Stream))                                                           \
    X(event_query, "cuEventQuery", (Event))                                                                     \
    X(event_synchronize, "cuEventSynchronize", (Event))                                                         \
    X(event_elapsed, "cuEventElapsedTime", (float*, Event, Event))                                              \
    X(event_destroy, "cuEventDestroy_v2", (Event))                                                              \
    X(host_alloc, "cuMemHostAlloc", (void**, size_t, unsigned))                                                 \
    X(host_free, "cuMemFreeHost", (void*))                                                                      \
    X(host_device_pointer, "cuMemHostGetDevicePointer_v2", (Address*, void*, unsigned))                         \
    X(copy, "cuMemcpyAsync", (Address, Address, size_t, Stream))

// NULL in older drivers.
#define OPTIONAL_ENTRIES(X)                                                                   \
    X(launch_ex, "cuLaunchKernelEx", (const LaunchConfig*, Function, void**, void**))         \
    X(active_clusters, "cuOccupancyMaxActiveClusters", (int*, Function, const LaunchConfig*)) \
    X(graph_edges, "cuGraphGetEdges_v2", (Graph, GraphNode*, GraphNode*, EdgeData*, size_t*)) \
    X(parameter_info, "cuFuncGetParamInfo", (Function, size_t, size_t*, size_t*))

typedef struct Driver {
#define MEMBER(member, name, arguments) Status(*member) arguments;
    REQUIRED_ENTRIES(MEMBER)
    OPTIONAL_ENTRIES(MEMBER)
#undef MEMBER
} Driver;

// Opens the library and finds the entries. 0, or -1 with one line in `problem`: the loader's, or the entry that is missing.
int driver_open(const char* path, Driver* driver, char* problem, size_t room);

// Makes `context` this thread's current one; `pushed` says whether driver_leave has to undo that.
Status driver_enter(const Driver* driver, Context context, int* pushed);
void driver_leave(const Driver* driver, int pushed);

// What a word of `bytes` (4 or 8) has to do with `value`: differ from it, or have reached it. Words are counters that
// wrap around: one has reached another when it is less than half their range ahead.
enum { UNTIL_CHANGED = 0, UNTIL_REACHED = 1 };

typedef struct {
    const void* address;  // a multiple of `bytes`
    uint64_t value;
    int bytes, until;
} Awaited;

// Looks at the word once, with acquire ordering: what its writer wrote before it can be read afterwards.
int word_arrived(const Awaited* awaited, uint64_t* current);

// Looks at the word without a pause for `hot_ns`, then every 20 microseconds up to `limit_ns` in all. 1 once it arrived.
int word_wait(const Awaited* awaited, int64_t hot_ns, int64_t limit_ns, uint64_t* current);

// Asks for the event without a pause for `hot_ns`, then every 20 microseconds up to `limit_ns` in all; the last answer.
Status event_wait(const Driver* driver, Event event, int64_t hot_ns, int64_t limit_ns);

int64_t monotonic_ns(void);

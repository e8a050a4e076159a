// A stand-in for libcuda that records what it is asked to do and fails on demand; built by test_gpu_driver.py.
//
// -DOLD_DRIVER leaves out what drivers before CUDA 11.8 do not have, -DBROKEN_DRIVER an entry that all have.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_RECORDS 4096
#define MAX_NAMES 64

typedef uint32_t u32;
typedef uint64_t u64;

typedef struct {
    u64 function, stream, context, address;  // address: of the parameters
    u32 grid[3], block[3], shared, cluster;
    int cooperative, programmatic, extended, captured;
    uint8_t params[256];
} Record;

typedef struct {
    int nodes, programmatic;
} FakeGraph;

EXPORT Record fake_records[MAX_RECORDS];
EXPORT int fake_record_count, fake_graphs, fake_executables, fake_events, fake_host_blocks;
EXPORT int fake_stream_status, fake_gate_timed_out, fake_version = 12040;

static __thread u64 context;
static u64 parameter_bytes[64], capturing;
static FakeGraph recorded;
static int invalid, gate_closed, attribute_values[64][16];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    char name[48];
    int calls, fail_at, code;
} entries[MAX_NAMES];

EXPORT void fake_reset(void) {
    memset(fake_records, 0, sizeof fake_records);
    memset(entries, 0, sizeof entries);
    memset(parameter_bytes, 0, sizeof parameter_bytes);
    memset(attribute_values, 0, sizeof attribute_values);
    fake_record_count = fake_stream_status = fake_gate_timed_out = invalid = gate_closed = 0;
    capturing = 0;
    fake_version = 12040;
}

static int entry_of(const char* name) {
    int i = 0;
    while (entries[i].name[0] && strcmp(entries[i].name, name)) i++;
    strncpy(entries[i].name, name, sizeof entries[i].name - 1);
    return i;
}

EXPORT int fake_calls(const char* name) { return entries[entry_of(name)].calls; }
EXPORT void fake_set_context(u64 value) { context = value; }
EXPORT u64 fake_get_context(void) { return context; }
EXPORT void fake_set_parameter_bytes(u64 function, u64 bytes) { parameter_bytes[function] = bytes; }
EXPORT int fake_get_attribute(u64 function, int attribute) { return attribute_values[function][attribute]; }
EXPORT void fake_close_gate(void) { gate_closed = 1; }
EXPORT void fake_open_gate(void) { __atomic_store_n(&gate_closed, 0, __ATOMIC_RELEASE); }

// The call `skip` calls from now fails with the code.
EXPORT void fake_fail(const char* name, int skip, int code) {
    const int i = entry_of(name);
    entries[i].fail_at = entries[i].calls + 1 + skip;
    entries[i].code = code;
}

static int called(const char* name) {
    pthread_mutex_lock(&lock);
    const int i = entry_of(name);
    entries[i].calls++;
    const int code = entries[i].calls == entries[i].fail_at ? entries[i].code : 0;
    pthread_mutex_unlock(&lock);
    return code;
}

#define CALLED()                           \
    do {                                   \
        const int code = called(__func__); \
        if (code) return code;             \
    } while (0)

static int wait_at_gate(void) {
    for (int i = 0; i < 10000; i++) {
        if (!__atomic_load_n(&gate_closed, __ATOMIC_ACQUIRE)) return 0;
        const struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
    }
    return fake_gate_timed_out = 1;
}

static int add_record(Record record, const void* params) {
    wait_at_gate();
    pthread_mutex_lock(&lock);
    const u64 bytes = record.function < 64 ? parameter_bytes[record.function] : 0;
    memcpy(record.params, params, bytes < sizeof record.params ? bytes : sizeof record.params);
    record.context = context;
    record.captured = capturing && capturing == record.stream;
    if (record.captured) {
        recorded.nodes++;
        recorded.programmatic += record.programmatic && recorded.nodes > 1;
    }
    fake_records[fake_record_count++ % MAX_RECORDS] = record;
    pthread_mutex_unlock(&lock);
    return 0;
}

EXPORT int cuLaunchKernel(u64 function, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared, u64 stream,
                          void** arguments, void** extra) {
    CALLED();
    if (extra) return 1;
    Record record = {
        .function = function, .stream = stream, .address = (u64)arguments[0], .shared = shared, .cluster = 1};
    const u32 sizes[6] = {gx, gy, gz, bx, by, bz};
    memcpy(record.grid, sizes, 12);
    memcpy(record.block, sizes + 3, 12);
    return add_record(record, arguments[0]);
}

#ifndef OLD_DRIVER
// The driver's own layout, by offsets: sizes at 0, stream at 32, attributes at 40, their count at 48; attributes of 72
// bytes with their number at 0 and their value at 8.
static u32 word(const void* base, size_t offset) { return *(const u32*)((const char*)base + offset); }
static u64 wide(const void* base, size_t offset) { return *(const u64*)((const char*)base + offset); }

EXPORT int cuLaunchKernelEx(const void* config, u64 function, void** arguments, void** extra) {
    const int code = called(__func__);
    if (code) {
        invalid = capturing != 0;
        return code;
    }
    if (extra) return 1;
    Record record = {.function = function, .stream = wide(config, 32), .address = (u64)arguments[0], .cluster = 1};
    record.shared = word(config, 24);
    record.extended = 1;
    memcpy(record.grid, config, 12);
    memcpy(record.block, (const char*)config + 12, 12);
    for (u32 i = 0; i < word(config, 48); i++) {
        const char* attribute = (const char*)wide(config, 40) + 72 * i;
        const u32 value = word(attribute, 8);
        if (word(attribute, 0) == 2)
            record.cooperative = value;
        else if (word(attribute, 0) == 4 && word(attribute, 12) == 1 && word(attribute, 16) == 1)
            record.cluster = value;
        else if (word(attribute, 0) == 6)
            record.programmatic = value;
        else
            return 1;
    }
    return add_record(record, arguments[0]);
}

EXPORT int cuOccupancyMaxActiveClusters(int* clusters, u64 function, const void* config) {
    CALLED();
    const char* attribute = (const char*)wide(config, 40);
    if (!function || word(config, 48) != 1 || word(attribute, 0) != 4) return 1;
    *clusters = (int)(word(config, 0) / word(attribute, 8) + word(config, 12) + word(config, 24));
    return 0;
}

EXPORT int cuFuncGetParamInfo(u64 function, size_t index, size_t* offset, size_t* size) {
    CALLED();
    if (index) return 1;
    *offset = 0;
    *size = parameter_bytes[function];
    return 0;
}

EXPORT int cuGraphGetEdges_v2(FakeGraph* graph, u64* from, u64* to, uint8_t* data, size_t* count) {
    CALLED();
    const int edges = graph->nodes ? graph->nodes - 1 : 0;
    if (from && to && data)
        for (int i = 0; i < edges; i++) data[8 * i + 2] = i < graph->programmatic;
    *count = edges;
    return 0;
}
#endif

EXPORT int cuDriverGetVersion(int* version) {
    CALLED();
    *version = fake_version;
    return 0;
}

EXPORT int cuGetErrorName(int code, const char** name) {
    *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : NULL;
    return *name ? 0 : 1;
}

EXPORT int cuGetErrorString(int code, const char** text) {
    *text = code == 700 ? "an illegal memory access was encountered" : NULL;
    return *text ? 0 : 1;
}

EXPORT int cuCtxGetCurrent(u64* current) {
    CALLED();
    *current = context;
    return 0;
}

static __thread u64 below;

EXPORT int cuCtxPushCurrent_v2(u64 pushed) {
    CALLED();
    below = context;
    context = pushed;
    return 0;
}

EXPORT int cuCtxPopCurrent_v2(u64* popped) {
    CALLED();
    *popped = context;
    context = below;
    return 0;
}

EXPORT int cuFuncGetAttribute(int* value, int attribute, u64 function) {
    CALLED();
    *value = (int)function * 1000 + attribute;
    return 0;
}

EXPORT int cuFuncSetAttribute(u64 function, int attribute, int value) {
    CALLED();
    attribute_values[function][attribute] = value;
    return 0;
}

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, u64 function, int threads, size_t shared) {
    CALLED();
    *blocks = (int)(2048 / threads - shared / 65536 + (function == 0));
    return 0;
}

EXPORT int cuStreamQuery(u64 stream) {
    CALLED();
    return stream ? fake_stream_status : 0;
}

EXPORT int cuStreamSynchronize(u64 stream) {
    CALLED();
    return stream ? 0 : 1;
}

EXPORT int cuStreamWaitEvent(u64 stream, u64 event, u32 flags) {
    CALLED();
    return stream && event && !flags ? 0 : 1;
}

EXPORT int cuStreamBeginCapture_v2(u64 stream, int mode) {
    CALLED();
    if (mode != 1 || capturing) return 1;
    capturing = stream;
    invalid = 0;
    memset(&recorded, 0, sizeof recorded);
    return 0;
}

EXPORT int cuStreamEndCapture(u64 stream, FakeGraph** graph) {
    CALLED();
    if (capturing != stream) return 1;
    capturing = 0;
    *graph = NULL;
    if (invalid) return 901;
    *graph = malloc(sizeof **graph);
    **graph = recorded;
    fake_graphs++;
    return 0;
}

EXPORT u64 fake_capturing(void) { return capturing; }

EXPORT int cuGraphGetNodes(FakeGraph* graph, u64* nodes, size_t* count) {
    CALLED();
    if (nodes) return 1;
    *count = graph->nodes;
    return 0;
}

EXPORT int cuGraphInstantiateWithFlags(u64* executable, FakeGraph* graph, unsigned long long flags) {
    CALLED();
    if (flags) return 1;
    *executable = 1000 + graph->nodes;
    fake_executables++;
    return 0;
}

EXPORT int cuGraphLaunch(u64 executable, u64 stream) {
    CALLED();
    return executable > 1000 && stream ? 0 : 1;
}

EXPORT int cuGraphUpload(u64 executable, u64 stream) {
    CALLED();
    return executable > 1000 && stream ? 0 : 1;
}

EXPORT int cuGraphDestroy(FakeGraph* graph) {
    CALLED();
    free(graph);
    fake_graphs--;
    return 0;
}

EXPORT int cuGraphExecDestroy(u64 executable) {
    CALLED();
    fake_executables--;
    return executable > 1000 ? 0 : 1;
}

EXPORT int cuEventCreate(u64* event, u32 flags) {
    CALLED();
    *event = 0x1000 + flags;
    fake_events++;
    return 0;
}

EXPORT int cuEventRecord(u64 event, u64 stream) {
    CALLED();
    return event && stream ? 0 : 1;
}

EXPORT int cuEventQuery(u64 event) {
    CALLED();
    return event ? fake_stream_status : 1;
}

EXPORT int cuEventSynchronize(u64 event) {
    CALLED();
    return event && context ? 0 : 201;
}

EXPORT int cuEventElapsedTime(float* milliseconds, u64 start, u64 end) {
    CALLED();
    *milliseconds = 1.5f;
    return start == 0x1000 && end == 0x1000 ? 0 : 400;
}

EXPORT int cuEventDestroy_v2(u64 event) {
    CALLED();
    fake_events--;
    return event ? 0 : 1;
}

EXPORT int cuMemHostAlloc(void** memory, size_t bytes, u32 flags) {
    CALLED();
    if (flags != 3) return 1;
    *memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    memset(*memory, 0xff, bytes);
    fake_host_blocks++;
    return 0;
}

EXPORT int cuMemFreeHost(void* memory) {
    CALLED();
    free(memory);
    fake_host_blocks--;
    return 0;
}

EXPORT int cuMemHostGetDevicePointer_v2(u64* address, void* memory, u32 flags) {
    CALLED();
    *address = (u64)memory + (1ull << 56);
    return flags ? 1 : 0;
}

#ifndef BROKEN_DRIVER
EXPORT int cuMemcpyAsync(u64 target, u64 source, size_t bytes, u64 stream) {
    CALLED();
    memcpy((void*)target, (void*)source, bytes);
    return stream ? 0 : 1;
}
#endif

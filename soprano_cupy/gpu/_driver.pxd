# cython: language_level=3
"""The C surface of the launcher: `csrc/*.h` say what each thing is and does."""

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t


cdef extern from "cuda_driver.h" nogil:
    ctypedef int Status
    ctypedef void *Context
    ctypedef void *Stream
    ctypedef void *Function
    ctypedef void *EventHandle "Event"
    ctypedef void *GraphHandle "Graph"
    ctypedef void *GraphNode
    ctypedef void *GraphExec
    ctypedef uint64_t Address

    int SUCCESS, NOT_READY
    int FUNCTION_MAX_THREADS, FUNCTION_STATIC_SHARED_BYTES, FUNCTION_LOCAL_BYTES, FUNCTION_REGISTERS
    int FUNCTION_MAX_DYNAMIC_SHARED, FUNCTION_LARGE_CLUSTERS
    int CAPTURE_THREAD_LOCAL, EDGE_PROGRAMMATIC, HOST_PORTABLE, HOST_MAPPED, EVENT_BLOCKING, EVENT_NO_TIMING
    int UNTIL_CHANGED, UNTIL_REACHED

    ctypedef struct LaunchConfig:
        uint32_t grid[3]
        uint32_t block[3]
        uint32_t shared_bytes

    ctypedef struct EdgeData:
        uint8_t type

    ctypedef struct Driver:
        Status (*driver_version)(int *version) noexcept nogil
        Status (*error_name)(Status status, const char **name) noexcept nogil
        Status (*error_text)(Status status, const char **text) noexcept nogil
        Status (*context_current)(Context *context) noexcept nogil
        Status (*function_get)(int *value, int attribute, Function function) noexcept nogil
        Status (*function_set)(Function function, int attribute, int value) noexcept nogil
        Status (*active_blocks)(int *blocks, Function function, int threads, size_t shared_bytes) noexcept nogil
        Status (*stream_query)(Stream stream) noexcept nogil
        Status (*stream_synchronize)(Stream stream) noexcept nogil
        Status (*stream_wait_event)(Stream stream, EventHandle event, unsigned int flags) noexcept nogil
        Status (*capture_begin)(Stream stream, int mode) noexcept nogil
        Status (*capture_end)(Stream stream, GraphHandle *graph) noexcept nogil
        Status (*graph_instantiate)(GraphExec *executable, GraphHandle graph, unsigned long long flags) noexcept nogil
        Status (*graph_launch)(GraphExec executable, Stream stream) noexcept nogil
        Status (*graph_upload)(GraphExec executable, Stream stream) noexcept nogil
        Status (*graph_nodes)(GraphHandle graph, GraphNode *nodes, size_t *count) noexcept nogil
        Status (*graph_destroy)(GraphHandle graph) noexcept nogil
        Status (*graph_exec_destroy)(GraphExec executable) noexcept nogil
        Status (*event_create)(EventHandle *event, unsigned int flags) noexcept nogil
        Status (*event_record)(EventHandle event, Stream stream) noexcept nogil
        Status (*event_query)(EventHandle event) noexcept nogil
        Status (*event_synchronize)(EventHandle event) noexcept nogil
        Status (*event_elapsed)(float *milliseconds, EventHandle start, EventHandle end) noexcept nogil
        Status (*event_destroy)(EventHandle event) noexcept nogil
        Status (*host_alloc)(void **memory, size_t nbytes, unsigned int flags) noexcept nogil
        Status (*host_free)(void *memory) noexcept nogil
        Status (*host_device_pointer)(Address *address, void *memory, unsigned int flags) noexcept nogil
        Status (*copy)(Address target, Address source, size_t nbytes, Stream stream) noexcept nogil
        Status (*launch_ex)(
            const LaunchConfig *config, Function function, void **arguments, void **extra
        ) noexcept nogil
        Status (*active_clusters)(int *clusters, Function function, const LaunchConfig *config) noexcept nogil
        Status (*graph_edges)(
            GraphHandle graph, GraphNode *sources, GraphNode *targets, EdgeData *data, size_t *count
        ) noexcept nogil
        Status (*parameter_info)(Function function, size_t index, size_t *offset, size_t *size) noexcept nogil

    int driver_open(const char *path, Driver *driver, char *problem, size_t room)
    Status driver_enter(const Driver *driver, Context context, int *pushed)
    void driver_leave(const Driver *driver, int pushed)

    ctypedef struct Awaited:
        const void *address
        uint64_t value
        int bytes, until

    int word_arrived(const Awaited *awaited, uint64_t *current)
    int word_wait(const Awaited *awaited, int64_t hot_ns, int64_t limit_ns, uint64_t *current)
    Status event_wait(const Driver *driver, EventHandle event, int64_t hot_ns, int64_t limit_ns)
    int64_t monotonic_ns()


cdef extern from "program.h" nogil:
    int SYMBOLS, MAX_GRID_X, MAX_GRID_YZ

    ctypedef struct Step:
        LaunchConfig config
        Function function
        void *arguments[1]

    ctypedef struct Rule:
        int32_t step, axis, symbol
        int64_t of_each, times, repeat

    ctypedef struct Patch:
        int32_t *target
        int32_t symbol

    ctypedef struct Plan:
        int step_count, rule_count, patch_count
        Step *steps
        Rule *rules
        Patch *patches

    void step_add_cluster(Step *step, uint32_t blocks)
    void step_add_cooperative(Step *step)
    void step_add_programmatic(Step *step)
    uint32_t step_cluster(const Step *step)
    int64_t rule_blocks(const Rule *rule, const int32_t *symbols)
    int plan_resolve(Plan *plan, const int32_t *symbols, int *bad)
    Status step_launch(Step *step, const Driver *driver, Stream stream)
    Status plan_launch(Plan *plan, const Driver *driver, Stream stream, int checked, int *at)


cdef extern from "<pthread.h>" nogil:
    ctypedef struct Mutex "pthread_mutex_t":
        pass
    int pthread_mutex_init(Mutex *mutex, void *attributes)
    int pthread_mutex_lock(Mutex *mutex)
    int pthread_mutex_unlock(Mutex *mutex)
    int pthread_mutex_destroy(Mutex *mutex)

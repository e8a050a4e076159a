# cython: language_level=3
"""A thin binding of CUDA's driver: programs of kernel launches, graphs, events, mapped memory, occupancy.

libcuda is opened at the first use, so the module builds and imports on machines without CUDA. CuPy owns context,
streams, memory and modules; streams and functions come here as their integer handles. Whatever is created here belongs
to the context that is current in the thread that creates it, and can be used from any thread.
"""

import atexit
from typing import NamedTuple

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from ..errors import DeviceError, ParameterError
from .launch import Blocks

LIBRARY = "libcuda.so.1"
STICKY = frozenset((4, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721))  # the context is gone
PARAMETER_ALIGNMENT = 64  # of a tensor map
MAX_CLUSTER = 16
CHECK_NS = 10_000_000  # a wait looks after the GPU and after signals this often

cdef Driver *_driver = NULL  # a table that was handed out stays: objects keep the one they were made with
cdef bint _leaving = False  # the process ends, and the driver may be gone before our objects are
_problem = None
_path = LIBRARY


class FunctionFacts(NamedTuple):
    """What the driver knows of a loaded kernel."""

    registers: int  # of a thread
    local_bytes: int  # of a thread: spills and arrays in local memory
    static_shared_bytes: int
    max_dynamic_shared_bytes: int  # as it is allowed now
    max_threads: int


# ---- the library ----


def _use_library(path=None):
    """Open another library than libcuda from the next object on (None: libcuda again). For tests."""
    global _driver, _problem, _path
    _driver, _problem, _path = NULL, None, path or LIBRARY


def _leave():
    global _leaving
    _leaving = True


def problem():
    """Why the driver cannot be used, as one line; None when it can. Never raises."""
    global _driver, _problem
    cdef char text[512]
    cdef Driver *opened
    if _driver == NULL and _problem is None:
        opened = <Driver *>calloc(1, sizeof(Driver))
        encoded = _path.encode()
        if driver_open(encoded, opened, text, sizeof(text)):
            free(opened)
            said = " ".join(text.decode(errors="replace").split())
            if "it has no" in said:
                _problem = f"the NVIDIA driver is too old ({_path}: {said}); install one for CUDA 12 or newer"
            else:
                _problem = f"the NVIDIA driver cannot be opened ({said}); check that nvidia-smi works"
        else:
            _driver = opened
            atexit.register(_leave)
    return _problem


cdef const Driver *driver_table() except NULL:
    if _driver == NULL:
        reason = problem()
        if reason is not None:
            raise DeviceError(reason)
    return _driver


cdef failure(const Driver *driver, Status status, what):
    """The exception for a status of the driver, with `sticky` set."""
    cdef const char *name = NULL
    cdef const char *text = NULL
    driver.error_name(status, &name)
    driver.error_text(status, &text)
    said = f"CUDA error {status}" if name == NULL else name.decode()
    if text != NULL:
        said += f", {text.decode()}"
    if status in STICKY:
        advice = "nothing works on the GPU any more in this process; start again, and please report it"
    elif status == 2:
        advice = "free some memory, or use a smaller batch"
    elif status == 201:
        advice = "select a device first, with cupy.cuda.Device(n).use()"
    elif 900 <= status <= 908:
        advice = "nothing else may use the stream while it is captured"
    else:
        advice = "please report it with the output of soprano-cupy doctor"
    error = DeviceError(f"{what} failed ({said}); {advice}")
    error.sticky = status in STICKY
    return error


cdef int check(const Driver *driver, Status status, what) except -1:
    if status != SUCCESS:
        raise failure(driver, status, what)
    return 0


cdef Context current_context(const Driver *driver) except NULL:
    cdef Context context = NULL
    cdef Status status = driver.context_current(&context)
    if status == SUCCESS and context == NULL:
        status = 201
    check(driver, status, "finding the current GPU")
    return context


def driver_version():
    """The CUDA version that the driver supports: 12040 for 12.4."""
    cdef int version = 0
    cdef const Driver *driver = driver_table()
    check(driver, driver.driver_version(&version), "reading the driver's version")
    return version


def launches_with_attributes():
    """Whether the driver knows cuLaunchKernelEx (CUDA 11.8), which clusters and programmatic launches need."""
    return driver_table().launch_ex != NULL


def synchronize(size_t stream):
    """Wait until a stream's work is done."""
    cdef const Driver *driver = driver_table()
    cdef Status status
    with nogil:
        status = driver.stream_synchronize(<Stream>stream)
    check(driver, status, "waiting for the GPU")


def copy(uint64_t target, uint64_t source, size_t nbytes, size_t stream):
    """Copy bytes between any two addresses, of the device or of pinned host memory, in a stream's order."""
    cdef const Driver *driver = driver_table()
    cdef Status status = driver.copy(target, source, nbytes, <Stream>stream)  # with the GIL: it takes a microsecond
    if status != SUCCESS:
        check(driver, status, f"copying {nbytes} bytes")


def copy_on_host(parts):
    """Copy within host memory, all without the GIL: (target, source, nbytes) each, addresses of memory that stays."""
    cdef size_t count = len(parts), i
    if count == 0:  # and nobody need wait to have the GIL back
        return
    cdef size_t *places = <size_t *>calloc(3 * count + 1, sizeof(size_t))
    if places == NULL:
        raise MemoryError
    try:
        for i in range(count):
            places[3 * i], places[3 * i + 1], places[3 * i + 2] = parts[i]
        with nogil:
            for i in range(count):
                memcpy(<void *>places[3 * i], <const void *>places[3 * i + 1], places[3 * i + 2])
    finally:
        free(places)


# ---- functions ----


def function_facts(size_t function):
    """`FunctionFacts` of a CUfunction."""
    cdef const Driver *driver = driver_table()
    cdef int value = 0
    values = []
    for attribute in (
        FUNCTION_REGISTERS, FUNCTION_LOCAL_BYTES, FUNCTION_STATIC_SHARED_BYTES, FUNCTION_MAX_DYNAMIC_SHARED,
        FUNCTION_MAX_THREADS,
    ):
        check(driver, driver.function_get(&value, attribute, <Function>function), "reading a kernel's attributes")
        values.append(value)
    return FunctionFacts(*values)


def set_shared_bytes(size_t function, int nbytes):
    """Allow a kernel `nbytes` of dynamic shared memory a block; without it, 48 KB."""
    cdef const Driver *driver = driver_table()
    status = driver.function_set(<Function>function, FUNCTION_MAX_DYNAMIC_SHARED, nbytes)
    check(driver, status, f"asking for {nbytes} bytes of shared memory a block")


def allow_large_clusters(size_t function):
    """Allow a kernel clusters of more than the portable 8 blocks."""
    cdef const Driver *driver = driver_table()
    status = driver.function_set(<Function>function, FUNCTION_LARGE_CLUSTERS, 1)
    check(driver, status, "asking for clusters of more than 8 blocks")


def max_active_blocks(size_t function, int threads, size_t shared_bytes=0):
    """Blocks of a kernel that one multiprocessor holds at once."""
    cdef const Driver *driver = driver_table()
    cdef int blocks = 0
    status = driver.active_blocks(&blocks, <Function>function, threads, shared_bytes)
    check(driver, status, "asking for a kernel's occupancy")
    return blocks


def max_active_clusters(size_t function, grid, int threads, int shared_bytes, int cluster):
    """Clusters of `cluster` blocks that the whole GPU holds at once. grid: (x, y, z), x a multiple of the cluster."""
    cdef const Driver *driver = driver_table()
    cdef Step step
    cdef int clusters = 0
    if driver.active_clusters == NULL:
        raise DeviceError("this NVIDIA driver does not know clusters; install one for CUDA 12 or newer")
    memset(&step, 0, sizeof(step))
    for axis in range(3):
        step.config.grid[axis] = grid[axis]
        step.config.block[axis] = 1
    step.config.block[0] = threads
    step.config.shared_bytes = shared_bytes
    step_add_cluster(&step, cluster)
    status = driver.active_clusters(&clusters, <Function>function, &step.config)
    check(driver, status, "asking for a kernel's occupancy")
    return clusters


include "_program.pxi"
include "_graph.pxi"
include "_memory.pxi"

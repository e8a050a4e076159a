"""Memory that host and GPU share; a part of `_driver.pyx`."""


cdef class MappedMemory:
    """Zeroed host memory that never leaves its place and that the GPU reads and writes in place.

    numpy.frombuffer(memory.view(), dtype) is an array on it, which keeps it. It must outlive the GPU's work with it.
    A kernel that writes here for `wait` makes its writes visible to the host in order: __threadfence_system() before
    the word is stored.
    """

    cdef const Driver *driver
    cdef Context context
    cdef void *memory
    cdef Address address
    cdef readonly Py_ssize_t nbytes

    def __cinit__(self, Py_ssize_t nbytes):
        if nbytes < 1:
            raise ParameterError(f"mapped memory cannot have {nbytes} bytes")
        self.driver = driver_table()
        self.nbytes = nbytes
        what = f"allocating {nbytes} bytes of mapped memory"
        self.context = current_context(self.driver)
        check(self.driver, self.driver.host_alloc(&self.memory, nbytes, HOST_PORTABLE | HOST_MAPPED), what)
        memset(self.memory, 0, nbytes)
        check(self.driver, self.driver.host_device_pointer(&self.address, self.memory, 0), what)

    def __dealloc__(self):
        cdef int pushed
        if self.memory != NULL and not _leaving:
            if driver_enter(self.driver, self.context, &pushed) == SUCCESS:
                self.driver.host_free(self.memory)
            driver_leave(self.driver, pushed)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.memory, self.nbytes, 0, flags)

    def __len__(self):
        return self.nbytes

    @property
    def device(self):
        """Where the GPU finds it."""
        return self.address

    @property
    def host(self):
        """Where the host finds it."""
        return <size_t>self.memory

    def view(self):
        """Its bytes, writable."""
        return memoryview(self)

    def wait(
        self, Py_ssize_t offset, value, size_t stream, *, bint changed=False, int nbytes=4, double spin_s=50e-6,
        double timeout_s=30.0
    ):
        """Wait, without the GIL, until a word has reached `value`; returns the word, an unsigned integer.

        offset: of the word, in bytes. stream: where the work that writes it has been launched. changed: wait until it
        is no longer `value`. nbytes: 4 or 8. Words are counters that wrap around: one has reached another when it is
        less than half their range ahead. spin_s: how long the processor spins; then it looks every 20 microseconds.
        Raises `DeviceError` when the GPU reports an error, when the stream is done and the word is not there, and
        after `timeout_s`; what a signal handler raises comes through.
        """
        cdef Awaited awaited
        cdef uint64_t word = 0
        cdef int64_t start, slice_ns, hot_ns = <int64_t>(spin_s * 1e9), limit_ns = <int64_t>(timeout_s * 1e9)
        cdef int arrived, pushed
        cdef Status status = SUCCESS
        if nbytes not in (4, 8) or offset % nbytes or not 0 <= offset <= self.nbytes - nbytes:
            raise ParameterError(f"there is no word of {nbytes} bytes at byte {offset} of {self.nbytes}")
        if not 0 <= value < (<object>1) << 8 * nbytes:
            raise ParameterError(f"a word of {nbytes} bytes never holds {value}")
        awaited.address = <char *>self.memory + offset
        awaited.value = value
        awaited.bytes = nbytes
        awaited.until = UNTIL_CHANGED if changed else UNTIL_REACHED
        slice_ns = min(limit_ns, <int64_t>CHECK_NS)
        start = monotonic_ns()
        while True:
            with nogil:
                arrived = word_wait(&awaited, hot_ns, slice_ns, &word)
                if not arrived:
                    status = driver_enter(self.driver, self.context, &pushed)
                    if status == SUCCESS:
                        status = self.driver.stream_query(<Stream>stream)
                    driver_leave(self.driver, pushed)
                    arrived = word_arrived(&awaited, &word)
            if arrived:
                return word
            if status == SUCCESS:
                raise DeviceError(
                    f"the GPU is done, but word {offset // nbytes} holds {word} where {value} was "
                    f"{'to change' if changed else 'awaited'}; please report it"
                )
            if status != NOT_READY:
                raise failure(self.driver, status, "the GPU's work")
            if monotonic_ns() - start > limit_ns:
                raise DeviceError(
                    f"the GPU has not answered within {timeout_s:g} s; see in nvidia-smi whether it is busy or hung"
                )
            PyErr_CheckSignals()
            hot_ns = 0

"""Graphs and events; a part of `_driver.pyx`."""


cdef enum EventAct:
    RECORD, HOLD, QUERY, SYNCHRONIZE, DESTROY


cdef class Graph:
    """A CUDA graph: what a stream is given while it is captured, launched again as one.

        with Graph(stream) as graph:
            program.run(stream, rows=1)
        graph.launch(stream)

    Captures with thread-local mode: other threads go on as they were. When the block raises, the capture is ended all
    the same, and the stream is as it was before. Parameters are copied into the graph; memory and modules must outlive
    it, for which `keep` holds references. Launches of one graph follow each other, whatever stream they are given.
    """

    cdef const Driver *driver
    cdef Context context
    cdef GraphExec executable
    cdef Stream stream
    cdef Mutex mutex
    cdef bint capturing
    cdef object keep
    cdef readonly int nodes  # captured
    cdef readonly object programmatic_edges  # of its dependencies; None where the driver cannot tell

    def __cinit__(self, size_t stream, keep=()):
        pthread_mutex_init(&self.mutex, NULL)
        if stream <= 1:
            raise ParameterError("the default stream cannot be captured; use a cupy.cuda.Stream(non_blocking=True)")
        self.driver = driver_table()
        self.context = current_context(self.driver)
        self.stream = <Stream>stream
        self.keep = keep

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)
        cdef int pushed
        if self.executable != NULL and not _leaving:
            if driver_enter(self.driver, self.context, &pushed) == SUCCESS:
                self.driver.graph_exec_destroy(self.executable)
            driver_leave(self.driver, pushed)

    @staticmethod
    def capture(size_t stream, steps, keep=()):
        """A graph of `steps`, each (program, *symbols), one after the other."""
        steps = [tuple(step) for step in steps]
        graph = Graph(stream, (keep, steps))
        with graph:
            for program, *symbols in steps:
                program.run(stream, *symbols)
        return graph

    def __enter__(self):
        cdef Status status
        if self.capturing or self.executable != NULL:
            raise ParameterError("a graph is captured once; make another one")
        with nogil:
            status = self.driver.capture_begin(self.stream, CAPTURE_THREAD_LOCAL)
        check(self.driver, status, "beginning a capture")
        self.capturing = True
        return self

    def __exit__(self, kind, error, trace):
        cdef GraphHandle graph = NULL
        cdef Status status
        self.capturing = False
        with nogil:
            status = self.driver.capture_end(self.stream, &graph)
        try:
            if kind is None:
                check(self.driver, status, "ending a capture")
                self._instantiate(graph)
        finally:
            if graph != NULL:
                self.driver.graph_destroy(graph)

    cdef _instantiate(self, GraphHandle graph):
        cdef size_t count = 0
        cdef Status status
        check(self.driver, self.driver.graph_nodes(graph, NULL, &count), "counting a graph's nodes")
        self.nodes = count
        self._count_edges(graph)
        with nogil:
            status = self.driver.graph_instantiate(&self.executable, graph, 0)
        check(self.driver, status, f"making a graph of {self.nodes} nodes")

    cdef _count_edges(self, GraphHandle graph):
        cdef size_t count = 0
        cdef EdgeData *edges
        cdef GraphNode *ends
        cdef size_t i
        if self.driver.graph_edges == NULL:
            return
        check(self.driver, self.driver.graph_edges(graph, NULL, NULL, NULL, &count), "counting a graph's edges")
        edges = <EdgeData *>calloc(count + 1, sizeof(EdgeData))
        ends = <GraphNode *>calloc(2 * count + 1, sizeof(GraphNode))
        try:
            if edges == NULL or ends == NULL:
                raise MemoryError
            if count:
                status = self.driver.graph_edges(graph, ends, ends + count, edges, &count)
                check(self.driver, status, "reading a graph's edges")
            self.programmatic_edges = sum(edges[i].type == EDGE_PROGRAMMATIC for i in range(count))
        finally:
            free(edges)
            free(ends)

    def launch(self, size_t stream, int times=1):
        """Launch the graph `times` times on a stream. Returns before the GPU is done."""
        cdef Status status
        cdef int pushed, i
        self._check_whole()
        with nogil:
            pthread_mutex_lock(&self.mutex)
            status = driver_enter(self.driver, self.context, &pushed)
            for i in range(times):
                if status == SUCCESS:
                    status = self.driver.graph_launch(self.executable, <Stream>stream)
            driver_leave(self.driver, pushed)
            pthread_mutex_unlock(&self.mutex)
        check(self.driver, status, f"launching a graph of {self.nodes} nodes")

    def upload(self, size_t stream):
        """Bring the graph to the GPU ahead of its first launch."""
        cdef Status status
        cdef int pushed
        self._check_whole()
        with nogil:
            pthread_mutex_lock(&self.mutex)
            status = driver_enter(self.driver, self.context, &pushed)
            if status == SUCCESS:
                status = self.driver.graph_upload(self.executable, <Stream>stream)
            driver_leave(self.driver, pushed)
            pthread_mutex_unlock(&self.mutex)
        check(self.driver, status, f"uploading a graph of {self.nodes} nodes")

    cdef _check_whole(self):
        if self.executable == NULL:
            raise ParameterError("the graph has not been captured")


cdef class Event:
    """A place in a stream's work. timing: it keeps the time; blocking: who waits sleeps instead of spinning."""

    cdef const Driver *driver
    cdef Context context
    cdef EventHandle event

    def __cinit__(self, *, bint timing=False, bint blocking=False):
        cdef unsigned int flags = (0 if timing else EVENT_NO_TIMING) | (EVENT_BLOCKING if blocking else 0)
        self.driver = driver_table()
        self.context = current_context(self.driver)
        check(self.driver, self.driver.event_create(&self.event, flags), "creating an event")

    def __dealloc__(self):
        if self.event != NULL and not _leaving:
            self._do(DESTROY, NULL)

    cdef Status _do(self, EventAct act, Stream stream) noexcept:
        """One call of the driver, in the event's context; but for waiting they take a microsecond, and giving the GIL
        away for that may cost the caller a whole turn of another thread."""
        cdef int pushed
        cdef Status status = driver_enter(self.driver, self.context, &pushed)
        if status != SUCCESS:
            pass
        elif act == RECORD:
            status = self.driver.event_record(self.event, stream)
        elif act == HOLD:
            status = self.driver.stream_wait_event(stream, self.event, 0)
        elif act == QUERY:
            status = self.driver.event_query(self.event)
        elif act == SYNCHRONIZE:
            with nogil:
                status = self.driver.event_synchronize(self.event)
        else:
            status = self.driver.event_destroy(self.event)
        driver_leave(self.driver, pushed)
        return status

    def record(self, size_t stream):
        """Mark the end of what the stream has been given so far."""
        check(self.driver, self._do(RECORD, <Stream>stream), "recording an event")

    def hold(self, size_t stream):
        """Let what the stream is given from now on begin after the event."""
        check(self.driver, self._do(HOLD, <Stream>stream), "making a stream wait for an event")

    def done(self):
        """Whether the work before the last record is done; True before the first."""
        status = self._do(QUERY, NULL)
        if status == NOT_READY:
            return False
        check(self.driver, status, "the GPU's work")
        return True

    def wait(self, double seconds, *, double spin_s=50e-6):
        """Wait at most so long, without the GIL; whether the work before the last record is done.

        spin_s: how long the processor spins; then it looks every 20 microseconds.
        """
        cdef int pushed
        cdef int64_t limit_ns = <int64_t>(seconds * 1e9), hot_ns = <int64_t>(spin_s * 1e9)
        cdef Status status
        with nogil:
            status = driver_enter(self.driver, self.context, &pushed)
            if status == SUCCESS:
                status = event_wait(self.driver, self.event, hot_ns, limit_ns)
            driver_leave(self.driver, pushed)
        if status == NOT_READY:
            return False
        check(self.driver, status, "the GPU's work")
        return True

    def synchronize(self):
        """Wait until the work before the last record is done."""
        check(self.driver, self._do(SYNCHRONIZE, NULL), "the GPU's work")

    def elapsed_ms(self, Event start not None):
        """Milliseconds on the GPU from `start` to this event; both with timing, and both done."""
        cdef float milliseconds = 0
        status = self.driver.event_elapsed(&milliseconds, start.event, self.event)
        check(self.driver, status, "measuring time")
        return milliseconds

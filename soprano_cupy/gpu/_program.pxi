"""Programs; a part of `_driver.pyx`."""


cdef int read_symbols(int32_t *symbols, values) except -1:
    """Symbols in the order of `launch.Symbol`; what is not given is 0."""
    cdef int i = 0
    memset(symbols, 0, SYMBOLS * sizeof(int32_t))
    if len(values) > SYMBOLS:
        raise ParameterError(f"{len(values)} symbols were given; a program has {SYMBOLS}")
    for value in values:
        if not 0 <= value <= MAX_GRID_X:
            raise ParameterError(f"a program cannot run with the symbols {tuple(values)}; each is 0 to {MAX_GRID_X}")
        symbols[i] = value
        i += 1
    return 0


cdef class Program:
    """Launches packed once; a run derives grids and parameters from its symbols and launches all in one go.

    launches: `launch.Launch` objects. functions: the CUfunction of each. programmatic: the GPU and its driver know
    programmatic dependent launches; the launches that want one get it. keep: objects that must outlive the program.
    Raises `ParameterError` for a launch that cannot be, `DeviceError` when the driver cannot launch it.

    Threads that run one program at the same time take turns; different programs do not wait for each other.
    """

    cdef const Driver *driver
    cdef Context context
    cdef Plan plan
    cdef Mutex mutex
    cdef void *memory
    cdef size_t next_place  # for the parameters of the next launch
    cdef readonly tuple names
    cdef object keep

    def __cinit__(self, launches, functions, *, bint programmatic=False, keep=()):
        pthread_mutex_init(&self.mutex, NULL)
        launches = list(launches)
        functions = list(functions)
        if not launches or len(functions) != len(launches):
            raise ParameterError(f"{len(launches)} launches with {len(functions)} functions make no program")
        self.driver = driver_table()
        self.context = current_context(self.driver)
        self.keep = (tuple(launches), keep)
        self.names = tuple(launch.kernel for launch in launches)
        self._allocate(launches)
        for launch, function in zip(launches, functions):
            self._add(launch, function, programmatic)

    def __dealloc__(self):
        pthread_mutex_destroy(&self.mutex)
        free(self.memory)
        free(self.plan.steps)
        free(self.plan.rules)
        free(self.plan.patches)

    cdef _allocate(self, launches):
        """Room for the launches, and their parameters in one block, each at a multiple of the alignment."""
        cdef size_t nbytes = PARAMETER_ALIGNMENT + sum(aligned(len(launch.params)) for launch in launches)
        cdef size_t rules = sum(isinstance(size, Blocks) for launch in launches for size in launch.grid)
        cdef size_t patches = sum(len(launch.fields) for launch in launches)
        self.memory = calloc(1, nbytes)
        self.plan.steps = <Step *>calloc(len(launches), sizeof(Step))
        self.plan.rules = <Rule *>calloc(rules + 1, sizeof(Rule))
        self.plan.patches = <Patch *>calloc(patches + 1, sizeof(Patch))
        if not (self.memory and self.plan.steps and self.plan.rules and self.plan.patches):
            raise MemoryError
        self.next_place = aligned(<size_t>self.memory)

    cdef _add(self, launch, size_t function, bint programmatic):
        cdef int index = self.plan.step_count
        cdef Step *step = &self.plan.steps[index]
        cdef bytes params = bytes(launch.params)
        cdef const char *source = params
        name = f"launch {index} ({launch.kernel})"
        check_launch(launch, function, name)
        step.function = <Function>function
        step.config.block[0] = launch.threads
        step.config.block[1] = step.config.block[2] = 1
        step.config.shared_bytes = launch.shared_bytes
        step.arguments[0] = <void *>self.next_place
        self.next_place += aligned(len(params))
        memcpy(step.arguments[0], source, len(params))
        self._check_parameters(step, len(params), name)
        self._add_attributes(step, launch, programmatic, name)
        for axis, size in enumerate(launch.grid):
            self._add_dimension(step, index, axis, size, name)
        for offset, symbol in launch.fields:
            self.plan.patches[self.plan.patch_count].target = <int32_t *>(<char *>step.arguments[0] + <size_t>offset)
            self.plan.patches[self.plan.patch_count].symbol = symbol
            self.plan.patch_count += 1
        self.plan.step_count += 1

    cdef _check_parameters(self, Step *step, size_t nbytes, name):
        """The struct is as long as the kernel thinks, where the driver (CUDA 12.4) can tell."""
        cdef size_t offset, size
        if self.driver.parameter_info == NULL:
            return
        check(self.driver, self.driver.parameter_info(step.function, 0, &offset, &size), f"reading {name}'s parameters")
        if size != nbytes:
            raise ParameterError(f"{name} has {nbytes} bytes of parameters where the kernel takes {size}")

    cdef _add_attributes(self, Step *step, launch, bint programmatic, name):
        cdef int cluster = launch.cluster
        if self.driver.launch_ex == NULL and (cluster > 1 or launch.cooperative):
            raise DeviceError(f"{name} needs a newer NVIDIA driver; install one for CUDA 12 or newer")
        if cluster > 1:
            step_add_cluster(step, cluster)
        if launch.cooperative:
            step_add_cooperative(step)
        # without it the launch only waits longer: a driver that does not know it needs no refusal
        if programmatic and launch.programmatic and self.driver.launch_ex != NULL:
            step_add_programmatic(step)

    cdef _add_dimension(self, Step *step, int index, int axis, size, name):
        cdef Rule *rule
        most = MAX_GRID_X if axis == 0 else MAX_GRID_YZ
        if not isinstance(size, Blocks):
            if not 1 <= size <= most or (axis == 0 and size % step_cluster(step)):
                raise ParameterError(f"{name} cannot have {size} blocks along {'xyz'[axis]}")
            step.config.grid[axis] = size
            return
        if min(size.of_each, size.times, size.repeat) < 1 or max(size.of_each, size.times, size.repeat) > MAX_GRID_X:
            raise ParameterError(f"{name} cannot follow {size} along {'xyz'[axis]}")
        if not 0 <= size.symbol < SYMBOLS:
            raise ParameterError(f"{name} follows the symbol {size.symbol}, which does not exist")
        rule = &self.plan.rules[self.plan.rule_count]
        rule.step, rule.axis, rule.symbol = index, axis, size.symbol
        rule.of_each, rule.times, rule.repeat = size.of_each, size.times, size.repeat
        self.plan.rule_count += 1

    def __len__(self):
        return self.plan.step_count

    def run(self, size_t stream, rows=0, sequences=0, longest=0, spare=0, *, bint checked=False):
        """Launch everything on a stream. Returns before the GPU is done.

        rows, sequences, longest, spare: the symbols. checked: wait after each launch, so that a kernel that faults is
        named itself; slow, and not while the stream is captured.
        Raises `ParameterError`, with nothing launched, where a grid would exceed the machine's limits, and
        `DeviceError` at the driver's first error, which may come from an earlier launch.
        """
        cdef int32_t symbols[4]
        read_symbols(symbols, (rows, sequences, longest, spare))
        self._run(<Stream>stream, symbols, checked)

    cdef _run(self, Stream stream, const int32_t *symbols, bint checked):
        cdef int at = 0, pushed = 0, unfit = 0
        cdef Status status
        with nogil:
            pthread_mutex_lock(&self.mutex)
            unfit = plan_resolve(&self.plan, symbols, &at)
            status = SUCCESS
            if not unfit:
                at = -1
                status = driver_enter(self.driver, self.context, &pushed)
                if status == SUCCESS:
                    status = plan_launch(&self.plan, self.driver, stream, checked, &at)
                driver_leave(self.driver, pushed)
            pthread_mutex_unlock(&self.mutex)
        if unfit:
            raise self._unfit(symbols, at)
        if status != SUCCESS:
            name = "entering its context" if at < 0 else f"launch {at} of {len(self)} ({self.names[at]})"
            raise failure(self.driver, status, name)

    cdef _unfit(self, const int32_t *symbols, int at):
        cdef Rule *rule = &self.plan.rules[at]
        blocks = rule_blocks(rule, symbols)
        reason = f"it would have {blocks} blocks along {'xyz'[rule.axis]}"
        if blocks <= (MAX_GRID_X if rule.axis == 0 else MAX_GRID_YZ):
            reason += f", which is no whole number of clusters of {step_cluster(&self.plan.steps[rule.step])}"
        values = ", ".join(str(symbols[i]) for i in range(SYMBOLS))
        return ParameterError(
            f"launch {rule.step} ({self.names[rule.step]}) cannot run with the symbols {values}: {reason}; "
            "give it a smaller batch"
        )

    def profile(self, size_t stream, rows=0, sequences=0, longest=0, spare=0):
        """Run once with an event around each launch: (kernel, GPU microseconds) of each, in order.

        Launches do not overlap then, and each figure has the events' own microsecond or so in it.
        """
        cdef int32_t symbols[4]
        cdef int i, at = 0, pushed = 0
        cdef Status status
        read_symbols(symbols, (rows, sequences, longest, spare))
        events = [Event(timing=True) for _ in range(len(self) + 1)]
        with nogil:
            pthread_mutex_lock(&self.mutex)
        try:
            if plan_resolve(&self.plan, symbols, &at):
                raise self._unfit(symbols, at)
            check(self.driver, driver_enter(self.driver, self.context, &pushed), "entering its context")
            events[0].record(stream)
            for i in range(len(self)):
                status = step_launch(&self.plan.steps[i], self.driver, <Stream>stream)
                check(self.driver, status, f"launch {i} of {len(self)} ({self.names[i]})")
                events[i + 1].record(stream)
        finally:
            driver_leave(self.driver, pushed)
            pthread_mutex_unlock(&self.mutex)
        events[-1].synchronize()
        return [(name, end.elapsed_ms(start) * 1e3) for name, start, end in zip(self.names, events, events[1:])]

    def grids(self, rows=0, sequences=0, longest=0, spare=0):
        """The grid (x, y, z) of every launch for these symbols."""
        cdef int32_t symbols[4]
        cdef int i, axis, at = 0
        cdef Step *step
        read_symbols(symbols, (rows, sequences, longest, spare))
        with nogil:
            pthread_mutex_lock(&self.mutex)
        try:
            if plan_resolve(&self.plan, symbols, &at):
                raise self._unfit(symbols, at)
            return [tuple([self.plan.steps[i].config.grid[axis] for axis in range(3)]) for i in range(len(self))]
        finally:
            pthread_mutex_unlock(&self.mutex)


cdef size_t aligned(size_t nbytes):
    """The next multiple of the parameters' alignment."""
    return (nbytes + PARAMETER_ALIGNMENT - 1) // PARAMETER_ALIGNMENT * PARAMETER_ALIGNMENT


cdef check_launch(launch, size_t function, name):
    """What can be wrong with a launch by itself."""
    if not function:
        raise ParameterError(f"{name} has no function")
    if not 1 <= launch.threads <= 1024:
        raise ParameterError(f"{name} cannot have blocks of {launch.threads} threads")
    if not 0 <= launch.shared_bytes <= MAX_GRID_X:
        raise ParameterError(f"{name} cannot have {launch.shared_bytes} bytes of shared memory")
    if not 1 <= launch.cluster <= MAX_CLUSTER:
        raise ParameterError(f"{name} cannot have clusters of {launch.cluster} blocks; at most {MAX_CLUSTER}")
    if len(launch.grid) != 3:
        raise ParameterError(f"{name} has a grid of {len(launch.grid)} dimensions; it takes 3")
    for offset, symbol in launch.fields:
        if offset % 4 or not 0 <= offset <= len(launch.params) - 4 or not 0 <= symbol < SYMBOLS:
            raise ParameterError(f"{name} has no parameter at byte {offset} for the symbol {symbol}")

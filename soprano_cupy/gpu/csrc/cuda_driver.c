#define _GNU_SOURCE
#include "cuda_driver.h"

#include <dlfcn.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <time.h>

#define POLLS_PER_CLOCK 32
#define SLEEP_NS 20000
#define SLACK_NS 1000  // Linux wakes a sleeper up to 50 microseconds late unless it is told otherwise

int driver_open(const char* path, Driver* driver, char* problem, size_t room) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char* why = dlerror();
        snprintf(problem, room, "%s", why ? why : "unknown error");
        return -1;
    }
#define FIND(member, name, arguments) *(void**)&driver->member = dlsym(library, name);
    REQUIRED_ENTRIES(FIND)
    OPTIONAL_ENTRIES(FIND)
#undef FIND
#define CHECK(member, name, arguments)                 \
    if (driver->member == NULL) {                      \
        snprintf(problem, room, "it has no %s", name); \
        dlclose(library);                              \
        return -1;                                     \
    }
    REQUIRED_ENTRIES(CHECK)
#undef CHECK
    return 0;
}

Status driver_enter(const Driver* driver, Context context, int* pushed) {
    Context current = NULL;
    *pushed = 0;
    Status status = driver->context_current(&current);
    if (status == SUCCESS && current != context) {
        status = driver->context_push(context);
        *pushed = status == SUCCESS;
    }
    return status;
}

void driver_leave(const Driver* driver, int pushed) {
    Context popped;
    if (pushed) driver->context_pop(&popped);
}

int word_arrived(const Awaited* awaited, uint64_t* current) {
    if (awaited->bytes == 4) {
        const uint32_t word = __atomic_load_n((const uint32_t*)awaited->address, __ATOMIC_ACQUIRE);
        *current = word;
        return awaited->until == UNTIL_CHANGED ? word != (uint32_t)awaited->value
                                               : (int32_t)(word - (uint32_t)awaited->value) >= 0;
    }
    const uint64_t word = __atomic_load_n((const uint64_t*)awaited->address, __ATOMIC_ACQUIRE);
    *current = word;
    return awaited->until == UNTIL_CHANGED ? word != awaited->value : (int64_t)(word - awaited->value) >= 0;
}

int64_t monotonic_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

// Tells the processor that this is a spin: it saves power and leaves the core to its other thread.
static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

int word_wait(const Awaited* awaited, int64_t hot_ns, int64_t limit_ns, uint64_t* current) {
    const int64_t start = monotonic_ns();
    const int64_t hot = hot_ns < limit_ns ? hot_ns : limit_ns;
    do {
        for (int i = 0; i < POLLS_PER_CLOCK; i++) {
            if (word_arrived(awaited, current)) return 1;
            relax();
        }
    } while (monotonic_ns() - start < hot);
    const int slack_ns = prctl(PR_GET_TIMERSLACK);
    prctl(PR_SET_TIMERSLACK, SLACK_NS);
    int arrived = 0;
    while (!arrived && monotonic_ns() - start < limit_ns) {
        const struct timespec pause = {0, SLEEP_NS};
        nanosleep(&pause, NULL);
        arrived = word_arrived(awaited, current);
    }
    if (slack_ns > 0) prctl(PR_SET_TIMERSLACK, slack_ns);
    return arrived;
}

Status event_wait(const Driver* driver, Event event, int64_t hot_ns, int64_t limit_ns) {
    const int64_t start = monotonic_ns();
    Status status = driver->event_query(event);
    while (status == NOT_READY && monotonic_ns() - start < (hot_ns < limit_ns ? hot_ns : limit_ns)) {
        relax();
        status = driver->event_query(event);
    }
    if (status != NOT_READY || monotonic_ns() - start >= limit_ns) return status;
    const int slack_ns = prctl(PR_GET_TIMERSLACK);
    prctl(PR_SET_TIMERSLACK, SLACK_NS);
    while (status == NOT_READY && monotonic_ns() - start < limit_ns) {
        const struct timespec pause = {0, SLEEP_NS};
        nanosleep(&pause, NULL);
        status = driver->event_query(event);
    }
    if (slack_ns > 0) prctl(PR_SET_TIMERSLACK, slack_ns);
    return status;
}

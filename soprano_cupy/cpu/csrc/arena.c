#define _GNU_SOURCE
#include "arena.h"

#include <stdlib.h>
#include <sys/mman.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#define HUGE_PAGE ((size_t)2 << 20)

/* Whole huge pages, so that the system can align them. */
static size_t mapped_bytes(size_t bytes) { return (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE; }

void *map_memory(size_t bytes, int huge) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *memory = mmap(NULL, mapped_bytes(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) return NULL;
    if (huge) madvise(memory, mapped_bytes(bytes), MADV_HUGEPAGE);
    return memory;
}

void unmap_memory(void *memory, size_t bytes) {
    if (!memory) return;
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
    munmap(memory, mapped_bytes(bytes));
}

void return_freed_memory(void) {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

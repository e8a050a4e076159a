/* Memory by the page, given back to the system as a whole. */
#ifndef SOPRANO_ARENA_H
#define SOPRANO_ARENA_H

#include <stddef.h>
#include <stdint.h>

/* Under AddressSanitizer, a forbidden gap follows every piece. */
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define ARENA_GAP 64
#else
#define ARENA_GAP 0
#define ASAN_POISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(start, bytes) ((void)(start), (void)(bytes))
#endif

/* Zeroed address space; a page takes memory when it is first written. NULL when there is none.
 * `huge`: in pages of 2 MB where the system allows, for what is read from end to end. */
void *map_memory(size_t bytes, int huge);
void unmap_memory(void *memory, size_t bytes);

/* Hand back what malloc keeps of freed memory, where it can be asked to. */
void return_freed_memory(void);

/* A run of memory handed out from front to back, each piece 64-byte aligned. With `memory` NULL it only counts, so
 * one function lays out a structure twice: to learn its size, then for good. */
typedef struct Arena {
    uint8_t *memory;
    size_t used;
} Arena;

static inline void *arena_take(Arena *arena, size_t bytes) {
    void *piece = arena->memory ? arena->memory + arena->used : NULL;
    size_t taken = ((bytes + 63) & ~(size_t)63) + ARENA_GAP;
    if (piece) ASAN_POISON_MEMORY_REGION((uint8_t *)piece + bytes, taken - bytes);
    arena->used += taken;
    return piece;
}

static inline float *arena_floats(Arena *arena, size_t count) { return arena_take(arena, count * sizeof(float)); }

#endif

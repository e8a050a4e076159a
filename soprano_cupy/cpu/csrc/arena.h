/* Memory by the page, given back to the system as a whole. */
#ifndef SOPRANO_ARENA_H
#define SOPRANO_ARENA_H

#include <stddef.h>
#include <stdint.h>

/* Zeroed address space; a page takes memory when it is first written. NULL when there is none.
 * `huge`: in pages of 2 MB where the system allows, for what is read from end to end. */
void *map_memory(size_t bytes, int huge);
void unmap_memory(void *memory, size_t bytes);

/* A run of memory handed out from front to back, each piece 64-byte aligned. With `memory` NULL it only counts, so
 * one function lays out a structure twice: to learn its size, then for good. */
typedef struct Arena {
    uint8_t *memory;
    size_t used;
} Arena;

static inline void *arena_take(Arena *arena, size_t bytes) {
    void *piece = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += (bytes + 63) & ~(size_t)63;
    return piece;
}

static inline float *arena_floats(Arena *arena, size_t count) { return arena_take(arena, count * sizeof(float)); }

#endif

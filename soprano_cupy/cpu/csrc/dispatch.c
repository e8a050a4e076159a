#define _GNU_SOURCE
#include "kernels.h"
#include "products_amx.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static int has_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

#if AMX_COMPILER
/* The instructions (CPUID leaf 7: tiles, int8, bfloat16), and the kernel's leave to use their 8 KB of state. */
static int has_amx(void) {
    const unsigned needed = 1u << 24 | 1u << 25 | 1u << 22;
    const int request_permission = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM */
    unsigned a, b, c, d;
    if (!has_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) return 0;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

static const struct {
    const Kernels *kernels;
    int (*usable)(void);
} TABLES[] = {
    {&kernels_avx2, has_avx2},
    {&kernels_avx512, has_avx512},
    {&kernels_vnni, has_vnni},
#if AMX_COMPILER
    {&kernels_amx, has_amx},
#endif
};
#define TABLE_COUNT (int)(sizeof TABLES / sizeof *TABLES)

#endif

static int list_kernels(const Kernels *list[], int room) {
    int count = 0;
    if (room > 0) list[count++] = &kernels_portable;
#if defined(__x86_64__)
    for (int i = 0; i < TABLE_COUNT && count < room; i++) {
        if (TABLES[i].usable()) list[count++] = TABLES[i].kernels;
    }
#endif
    return count;
}

#define MAX_TABLES 8

const Kernels *kernels_find(const char *name) {
    const Kernels *list[MAX_TABLES];
    int count = list_kernels(list, MAX_TABLES);
    if (name == NULL) return list[count - 1];
    for (int i = 0; i < count; i++) {
        if (strcmp(list[i]->name, name) == 0) return list[i];
    }
    return NULL;
}

int kernels_available(const char *names[], int room) {
    const Kernels *list[MAX_TABLES];
    int count = list_kernels(list, room < MAX_TABLES ? room : MAX_TABLES);
    for (int i = 0; i < count; i++) names[i] = list[i]->name;
    return count;
}

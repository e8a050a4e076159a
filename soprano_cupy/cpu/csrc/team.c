#define _GNU_SOURCE
#include "team.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WORKER_STACK_BYTES (512 * 1024)
#define BARRIER_SPINS 400 /* about 20 us: phases take microseconds; longer waits mean that a member lost its core */
#define JOB_SPINS 4000    /* about 200 us: the host samples a token between two jobs */

static struct {
    Team team;
    pthread_mutex_t turn; /* held while a job runs or the team changes */
    _Atomic int wanted;
    int sized_for; /* what was wanted when the workers were started; the system may have granted fewer */
    int started;   /* workers alive: members 1 to started */
    int stopping;
    pthread_t workers[TEAM_MAX_THREADS];
    TeamJob job;
    void *argument;
    _Atomic uint32_t generation; /* jobs begun; idle workers sleep on it */
    _Atomic int idle_sleepers;
    int handles_fork;
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER, .wanted = 1};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

/* Return once *word differs from `old`: spin first, then sleep. `sleepers` tells the waker whom to wake. */
static void await_change(_Atomic uint32_t *word, uint32_t old, int spins, _Atomic int *sleepers) {
    for (int i = 0; i < spins; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old) return;
        relax();
    }
    atomic_fetch_add(sleepers, 1);
    while (atomic_load(word) == old) syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(sleepers, 1);
}

static void change(_Atomic uint32_t *word, _Atomic int *sleepers) {
    atomic_fetch_add(word, 1); /* sequentially consistent against the sleepers' count: no wake-up is lost */
    if (atomic_load(sleepers)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void team_barrier(Team *team) {
    /* Once it has arrived, a member must not look at the team again: the last one may begin the next job at once. */
    int threads = team->threads;
    uint32_t epoch = atomic_load_explicit(&team->epoch, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 < threads) {
        await_change(&team->epoch, epoch, BARRIER_SPINS, &team->epoch_sleepers);
        return;
    }
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&team->next_unit, 0, memory_order_relaxed);
    if (threads > 1) change(&team->epoch, &team->epoch_sleepers);
}

static void *work(void *member) {
    uint32_t seen = 0;
    for (;;) {
        await_change(&pool.generation, seen, JOB_SPINS, &pool.idle_sleepers);
        seen++;
        if (pool.stopping) return NULL;
        pool.job(&pool.team, (int)(intptr_t)member, pool.argument);
        team_barrier(&pool.team);
    }
}

/* A forked child has the caller's thread only: it starts workers of its own with its first job. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.turn, NULL);
    pool.started = pool.sized_for = 0;
    pool.team = (Team){0};
}

static void stop_workers(void) {
    pool.stopping = 1;
    change(&pool.generation, &pool.idle_sleepers);
    for (int i = 1; i <= pool.started; i++) pthread_join(pool.workers[i], NULL);
    pool.stopping = pool.started = 0;
}

/* As many workers as wanted, or as the system grants. */
static void start_workers(int wanted) {
    pthread_attr_t attributes;
    if (!pool.handles_fork) pool.handles_fork = pthread_atfork(NULL, NULL, forget_workers) == 0;
    atomic_store(&pool.generation, 0);
    atomic_store(&pool.idle_sleepers, 0);
    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setstacksize(&attributes, WORKER_STACK_BYTES);
    while (pool.started + 1 < wanted) {
        int member = pool.started + 1;
        if (pthread_create(&pool.workers[member], &attributes, work, (void *)(intptr_t)member)) break;
        pool.started = member;
    }
    pthread_attr_destroy(&attributes);
}

void team_run(TeamJob job, void *argument) {
    pthread_mutex_lock(&pool.turn);
    int wanted = atomic_load(&pool.wanted);
    if (pool.sized_for != wanted) {
        if (pool.started) stop_workers();
        start_workers(wanted);
        pool.sized_for = wanted;
    }
    pool.job = job;
    pool.argument = argument;
    pool.team.threads = pool.started + 1;
    atomic_store_explicit(&pool.team.next_unit, 0, memory_order_relaxed);
    if (pool.started) change(&pool.generation, &pool.idle_sleepers);
    job(&pool.team, 0, argument);
    team_barrier(&pool.team);
    pthread_mutex_unlock(&pool.turn);
}

int team_resize(int threads) {
    threads = threads < 1 ? 1 : threads > TEAM_MAX_THREADS ? TEAM_MAX_THREADS : threads;
    atomic_store(&pool.wanted, threads);
    return threads;
}

int team_size(void) { return atomic_load(&pool.wanted); }

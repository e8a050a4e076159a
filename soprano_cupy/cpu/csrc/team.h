/* A team of threads that runs one job at a time, all of its members in step.
 *
 * A job is one function that every member runs from start to end; inside it, members share out the units of
 * each phase with `team_take` and meet at `team_barrier`. Waking the team once per job and not once per phase is
 * what makes a token's 170 short phases affordable. */
#ifndef SOPRANO_TEAM_H
#define SOPRANO_TEAM_H

#include <stdatomic.h>
#include <stdint.h>

#define TEAM_MAX_THREADS 256

typedef struct Team {
    int threads;            /* members of the running job, the caller included */
    _Atomic int arrived;    /* at the present barrier */
    _Atomic int next_unit;  /* of the present phase */
    _Atomic uint32_t epoch; /* barriers passed; members sleep on it */
    _Atomic int epoch_sleepers;
} Team;

typedef void (*TeamJob)(Team *team, int member, void *argument);

/* Run `job` on all members, 0 (the caller) to threads - 1; returns when all have ended. Callers take turns. */
void team_run(TeamJob job, void *argument);

/* Members from the next job on, 1 to TEAM_MAX_THREADS; returns what was set. Threads start with the first job. */
int team_resize(int threads);
int team_size(void);

/* Wait for all members. What each wrote before is visible to all after; the unit counter starts anew. */
void team_barrier(Team *team);

/* The next unit of the phase, each handed out once, or -1 when all `units` are taken. */
static inline int team_take(Team *team, int units) {
    int unit = atomic_fetch_add_explicit(&team->next_unit, 1, memory_order_relaxed);
    return unit < units ? unit : -1;
}

#endif

#include "product.h"

#include <stdlib.h>

#define SHARED_ROWS 48 /* of a unit where blocks are few: members end together */

/* A piece of work: `panels` panels from `panel` on of a block, times up to TILE_ROWS rows from `first` on. */
typedef struct Unit {
    int block, panel, panels, first, rows;
} Unit;

static void finish_unit(const Kernels *k, const Product *p, const Unit *u, const float *tile) {
    int column = u->block * BLOCK + u->panel * PANEL;
    int columns = p->matrix->outputs - column;
    tile += u->panel * PANEL;
    if (columns <= 0) return;
    if (columns > u->panels * PANEL) columns = u->panels * PANEL;
    if (p->finish == SWIGLU) {
        float *out = p->out + u->first * p->stride + column / 2;
        for (int i = 0; i < u->panels; i += 2)
            k->finish_swiglu(tile + i * PANEL, u->rows, out + i / 2 * PANEL, p->stride);
        return;
    }
    ptrdiff_t offset = u->first * p->stride + column;
    switch (p->finish) {
        case STORE:
            k->finish_store(tile, u->rows, columns, p->out + offset, p->stride);
            break;
        case ADD:
            k->finish_add(tile, u->rows, columns, p->out + offset, p->stride);
            break;
        case BIAS:
            k->finish_bias(tile, u->rows, columns, p->bias + column, p->out + offset, p->stride);
            break;
        case GELU:
            k->finish_gelu(tile, u->rows, columns, p->bias + column, p->out + offset, p->stride);
            break;
        default:
            k->finish_residual(tile, u->rows, columns, p->bias + column, p->gamma + column, p->residual + offset,
                               p->out + offset, p->stride);
    }
}

void product_share(Team *team, const Kernels *k, const Product *p) {
    const Matrix *m = p->matrix;
    float tile[TILE_ROWS * BLOCK] __attribute__((aligned(4096)));
    /* Where blocks are many, all rows stay with a block, so that its weights come from memory once; and a block's
     * panels are taken together, unless that leaves members idle. */
    int rows = m->blocks < 8 * team->threads ? SHARED_ROWS : p->x->rows, panels = PANELS;
    int groups = ceil_div(p->x->rows, rows);
    if (m->blocks * groups < 2 * team->threads) panels = p->finish == SWIGLU ? 2 : 1;
    int splits = PANELS / panels;
    for (int i; (i = team_take(team, m->blocks * splits * groups)) >= 0;) {
        Unit u = {.block = i / (splits * groups), .panel = i / groups % splits * panels, .panels = panels};
        int first = i % groups * rows, end = p->x->rows - first < rows ? p->x->rows : first + rows;
        for (u.first = first; u.first < end; u.first += TILE_ROWS) {
            u.rows = end - u.first < TILE_ROWS ? end - u.first : TILE_ROWS;
            k->multiply[m->dtype](m, u.block, u.panel, u.panels, p->x, u.first, u.rows, tile);
            finish_unit(k, p, &u, tile);
        }
    }
}

typedef struct Run {
    const Kernels *kernels;
    const float *rows;
    Operand x;
    Product product;
} Run;

static void run_job(Team *team, int member, void *argument) {
    Run *run = argument;
    const Matrix *m = run->product.matrix;
    (void)member;
    run->kernels->enter();
    for (int r; (r = team_take(team, run->x.rows)) >= 0;) {
        run->kernels->prepare[m->dtype](run->rows + (size_t)r * m->inputs, m->inputs, &run->x, r);
    }
    team_barrier(team);
    product_share(team, run->kernels, &run->product);
    run->kernels->leave();
}

int product_run(const Kernels *kernels, const Matrix *m, const float *x, int rows, float *out) {
    Run run = {.kernels = kernels, .rows = x};
    void *memory = aligned_alloc(64, operand_bytes(m->dtype, rows, m->inputs));
    if (!memory) return -1;
    operand_place(&run.x, m->dtype, rows, m->inputs, memory);
    run.product = (Product){.matrix = m, .x = &run.x, .finish = STORE, .out = out, .stride = m->outputs};
    team_run(run_job, &run);
    free(memory);
    return 0;
}

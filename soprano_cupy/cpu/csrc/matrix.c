#include "matrix.h"

#include "kernels.h"
#include "team.h"

Matrix matrix_shape(int dtype, int outputs, int inputs) {
    return (Matrix){
        .dtype = dtype,
        .outputs = outputs,
        .inputs = inputs,
        .blocks = ceil_div(outputs, BLOCK),
        .tiles = ceil_div(inputs, tile_depth(dtype)),
        .tile_bytes = dtype == INT8 ? INT8_TILE_BYTES : PANELS * PANEL_BYTES,
    };
}

static size_t round_up(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static size_t element_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

/* bfloat16 weights meet float32 rows where there is no bfloat16 unit: room for either. int8 rows come in groups. */
static size_t operand_data_bytes(int dtype, size_t rows, size_t stride) {
    if (dtype == INT8) return (rows + OPERAND_GROUP - 1) / OPERAND_GROUP * OPERAND_GROUP * stride * sizeof(int16_t);
    return rows * stride * sizeof(float);
}

size_t operand_bytes(int dtype, int rows, int inputs) {
    size_t tiles = ceil_div(inputs, tile_depth(dtype)), stride = tiles * tile_depth(dtype);
    return round_up(operand_data_bytes(dtype, rows, stride)) + round_up(rows * sizeof(float)) +
           round_up(rows * tiles * sizeof(int32_t));
}

void operand_place(Operand *x, int dtype, int rows, int inputs, void *memory) {
    uint8_t *p = memory;
    x->dtype = dtype;
    x->rows = rows;
    x->tiles = ceil_div(inputs, tile_depth(dtype));
    x->stride = x->tiles * tile_depth(dtype);
    x->data = p;
    p += round_up(operand_data_bytes(dtype, rows, x->stride));
    x->scales = (float *)p;
    x->sums = (int32_t *)(p + round_up(rows * sizeof(float)));
}

/* ---- packing ---- */

typedef struct Packing {
    const Kernels *kernels;
    Matrix *matrix;
    const Source *sources;
    int count;
} Packing;

/* Which source row becomes `output`, or NULL: *dtype says how to read it. */
static const void *source_row(const Packing *packing, int output, int *dtype) {
    size_t inputs = packing->matrix->inputs;
    for (int i = 0; i < packing->count; i++) {
        const Source *s = &packing->sources[i];
        int row = output - s->first;
        if (s->interleave) {
            if (row < 0 || row % 32 >= PANEL) continue;
            row = row / BLOCK * 32 + row % BLOCK / 32 * PANEL + row % PANEL;
        }
        if (row < 0 || row >= s->rows) continue;
        *dtype = s->dtype;
        return (const uint8_t *)s->data + row * inputs * element_bytes(s->dtype);
    }
    return NULL;
}

static void pack_tile(const Packing *packing, int panel, int tile, const void *rows[PANEL], const int dtypes[PANEL]) {
    const Matrix *m = packing->matrix;
    int depth = tile_depth(m->dtype), first = tile * depth;
    int count = m->inputs - first < depth ? m->inputs - first : depth;
    uint8_t *base = (uint8_t *)matrix_tile(m, panel / PANELS, tile);
    uint32_t (*target)[PANEL] = (uint32_t (*)[PANEL])(base + panel % PANELS * PANEL_BYTES);
    uint16_t *scales = (uint16_t *)(base + PANELS * PANEL_BYTES) + panel % PANELS * PANEL;
    uint32_t words[PANEL][WORDS];
    for (int n = 0; n < PANEL; n++) {
        uint16_t scale = packing->kernels->encode_words(m->dtype, rows[n], dtypes[n], first, count, words[n]);
        if (m->dtype == INT8) scales[n] = scale;
    }
    for (int k = 0; k < WORDS; k++) {
        for (int n = 0; n < PANEL; n++) target[k][n] = words[n][k];
    }
}

static void pack_panels(Team *team, int member, void *argument) {
    const Packing *packing = argument;
    const Matrix *m = packing->matrix;
    (void)member;
    for (int panel; (panel = team_take(team, m->blocks * PANELS)) >= 0;) {
        const void *rows[PANEL];
        int dtypes[PANEL] = {0};
        for (int n = 0; n < PANEL; n++) rows[n] = source_row(packing, panel * PANEL + n, &dtypes[n]);
        for (int tile = 0; tile < m->tiles; tile++) pack_tile(packing, panel, tile, rows, dtypes);
    }
}

void matrix_pack(const Kernels *kernels, Matrix *m, const Source *sources, int count) {
    Packing packing = {kernels, m, sources, count};
    team_run(pack_panels, &packing);
}

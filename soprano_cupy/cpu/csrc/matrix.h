/* Weights and activations as the matrix products read them.
 *
 * A matrix W (outputs x inputs) is cut into blocks of 64 outputs and, inside a block, into tiles as deep as 64
 * bytes of inputs hold: 16 float32, 32 bfloat16 or 64 int8. A block's four panels of 16 outputs lie side by side
 * in each tile, 1 KB each, so a product with one row reads the weights from first to last byte once:
 *
 *   data[block][tile][panel 4][word 16][output 16] of 32-bit words; a word holds 1 float32, 2 bfloat16 or 4 int8
 *   of consecutive inputs. In int8, 64 bfloat16 scales [panel 4][output 16] follow each tile's panels.
 *
 * int8 is w = scale * byte with a scale for every 64 inputs of every output. Outputs and inputs are padded
 * with zero weights. The layout is that of AMX tiles and of every dot-product instruction, so one packing serves
 * all instruction sets. */
#ifndef SOPRANO_MATRIX_H
#define SOPRANO_MATRIX_H

#include <stddef.h>
#include <stdint.h>

enum { FLOAT32, BFLOAT16, INT8, DTYPES };

#define PANEL 16 /* outputs of a panel */
#define PANELS 4 /* panels of a block */
#define BLOCK (PANEL * PANELS)
#define PANEL_BYTES 1024
#define WORDS 16      /* 32-bit words of inputs in a tile */
#define TILES_AHEAD 2 /* weights are asked for so many tiles before their use: one core alone hides no memory latency */
#define INT8_TILE_BYTES (PANELS * PANEL_BYTES + BLOCK * 2) /* of a block's four panels with their scales */
#define INT8_GROUP 64                                      /* inputs that share a scale: one tile */

typedef struct Matrix {
    int dtype;
    int outputs, inputs;
    int blocks, tiles;
    int tile_bytes; /* of a block's four panels, scales included */
    uint8_t *data;  /* 64-byte aligned */
} Matrix;

/* Activations, converted once per product by `prepare` of the instruction set that multiplies.
 *
 * floats: (rows, stride) float32, or bits: (rows, stride) bfloat16 where the products run in bfloat16.
 * int8 products take rows rounded to 15 bits, x = scale * X with X = 128 * high + low: as words (rows, stride)
 * int16, or as bytes where high and low of 8 rows form the 16 rows of an AMX tile; rows that fill up the last group
 * are never written, and what becomes of them is dropped.
 * sums: (rows, tiles) 128 * sum of X over each tile, for dot products that take the weights plus 128. */
typedef struct Operand {
    int dtype;
    int rows;   /* prepared rows of this product */
    int stride; /* elements from row to row: inputs padded to whole tiles */
    int tiles;
    union {
        void *data;
        float *floats;
        uint16_t *bits;
        int16_t *words;
        int8_t *bytes;
    };
    float *scales; /* (rows,) */
    int32_t *sums;
} Operand;

#define OPERAND_GROUP 8 /* rows whose high and low bytes share a tile */

static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

/* Inputs that one tile of a dtype holds. */
static inline int tile_depth(int dtype) { return dtype == FLOAT32 ? 16 : dtype == BFLOAT16 ? 32 : 64; }

Matrix matrix_shape(int dtype, int outputs, int inputs);

static inline size_t matrix_bytes(const Matrix *m) { return (size_t)m->blocks * m->tiles * m->tile_bytes; }

static inline const uint8_t *matrix_tile(const Matrix *m, int block, int tile) {
    return m->data + ((size_t)block * m->tiles + tile) * m->tile_bytes;
}

/* Bytes of an operand's parts for up to `rows` rows of `inputs`, and the operand laid into `memory` of that size. */
size_t operand_bytes(int dtype, int rows, int inputs);
void operand_place(Operand *x, int dtype, int rows, int inputs, void *memory);

/* The high bytes of row r: each group of 8 rows has 8 rows of high bytes, then 8 of low bytes. */
static inline int8_t *operand_high(const Operand *x, int r) {
    int group = r / OPERAND_GROUP;
    return x->bytes + (size_t)(2 * OPERAND_GROUP * group + r % OPERAND_GROUP) * x->stride;
}

/* From a row's high bytes to its low bytes. */
static inline ptrdiff_t operand_low_offset(const Operand *x) { return (ptrdiff_t)OPERAND_GROUP * x->stride; }

/* A source of weights: a C-contiguous (rows, inputs) array of float32 or bfloat16 that becomes outputs
 * first, first + 1, ... of a matrix; with `interleave` set, its row i becomes output 64 (i / 32) + 32 (i % 32 / 16)
 * + i % 16 + first instead: the gate and up projections share blocks, so that SwiGLU can work on one block. */
typedef struct Source {
    const void *data;
    int dtype;
    int rows;
    int first;
    int interleave;
} Source;

/* Convert and lay out all sources, on the team; outputs that no source covers become zero. */
struct Kernels;
void matrix_pack(const struct Kernels *kernels, Matrix *m, const Source *sources, int count);

#endif

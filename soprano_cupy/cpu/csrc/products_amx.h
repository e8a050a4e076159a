/* Products by AMX tiles. */
#ifndef SOPRANO_PRODUCTS_AMX_H
#define SOPRANO_PRODUCTS_AMX_H

#include "matrix.h"

/* Whether this compiler knows AMX: GCC from 11 on. Without it the VNNI kernels are the best there are. */
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define AMX_COMPILER 1
#else
#define AMX_COMPILER 0
#endif

void multiply_bfloat16_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                           float *tile);
void multiply_int8_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                       float *tile);

/* Give the tiles back when a job ends: the system saves them at every switch while they are in use. */
void amx_release(void);

#endif

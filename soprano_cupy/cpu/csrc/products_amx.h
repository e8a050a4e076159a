/* Products by AMX tiles. */
#ifndef SOPRANO_PRODUCTS_AMX_H
#define SOPRANO_PRODUCTS_AMX_H

#include "matrix.h"

void multiply_bfloat16_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                           float *tile);
void multiply_int8_amx(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                       float *tile);

/* Give the tiles back when a job ends: the system saves them at every switch while they are in use. */
void amx_release(void);

#endif

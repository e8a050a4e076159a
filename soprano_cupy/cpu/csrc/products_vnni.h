/* int8 products by AVX-512 VNNI. */
#ifndef SOPRANO_PRODUCTS_VNNI_H
#define SOPRANO_PRODUCTS_VNNI_H

#include "matrix.h"

void multiply_int8_vnni(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                        float *tile);

#endif

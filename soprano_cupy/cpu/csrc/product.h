/* A matrix product with what happens to its result, shared out over a team. */
#ifndef SOPRANO_PRODUCT_H
#define SOPRANO_PRODUCT_H

#include "kernels.h"
#include "team.h"

typedef enum Finish {
    STORE,    /* out = W x */
    ADD,      /* out += W x */
    SWIGLU,   /* W's panels alternate gate and up: out = silu(gate) * up */
    BIAS,     /* out = W x + bias */
    GELU,     /* out = gelu(W x + bias) */
    RESIDUAL, /* out = residual + gamma * (W x + bias) */
} Finish;

typedef struct Product {
    const Matrix *matrix;
    const Operand *x;
    Finish finish;
    float *out; /* (x->rows, stride) */
    ptrdiff_t stride;
    const float *bias, *gamma; /* (outputs padded to whole panels,) where the finish uses them */
    const float *residual;     /* (x->rows, stride) */
} Product;

/* One member's share; every member calls it, and the barrier after it makes the result whole. */
void product_share(Team *team, const Kernels *kernels, const Product *product);

/* out (rows, outputs) = x (rows, inputs) times the matrix, on the team; 0, or -1 when there is no memory. */
int product_run(const Kernels *kernels, const Matrix *matrix, const float *x, int rows, float *out);

#endif

/* All kernels of one instruction set. The including file names it with ISA and VEC_FLOATS and has selected it with a
 * target pragma; the included headers come first there, untouched by the pragma. */

#include "attention.inc.h"

static void enter_nothing(void) {}

/* The fields of a table that follow from VEC_FLOATS alone. */
#define COMMON_KERNELS                                                                                       \
    .rms_norm = rms_norm, .layer_norm = layer_norm, .rotate_head = rotate_head, .finish_store = finish_store, \
    .finish_add = finish_add, .finish_swiglu = finish_swiglu, .finish_bias = finish_bias,                    \
    .finish_gelu = finish_gelu, .finish_residual = finish_residual, .attend_split = attend_split,            \
    .merge_partials = merge_partials, .normalise_partial = normalise_partial

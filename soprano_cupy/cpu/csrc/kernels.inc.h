/* All kernels of one instruction set. The including file defines VEC_FLOATS and has selected the set with a
 * target pragma; headers of the system come before that pragma. */

#include "bfloat16.h"
#include "simd.h"

#include "products.inc.h"
#include "products_int8.inc.h"
#include "packing.inc.h"
#include "rows.inc.h"
#include "attention.inc.h"
#include "convolution.inc.h"
#include "istft.inc.h"

static void enter_nothing(void) {}

/* The fields of a table that follow from VEC_FLOATS alone. */
#define COMMON_KERNELS                                                                                        \
    .encode_words = encode_words, .rms_norm = rms_norm, .layer_norm = layer_norm, .rotate_head = rotate_head, \
    .finish_store = finish_store, .finish_add = finish_add, .finish_swiglu = finish_swiglu,                   \
    .finish_bias = finish_bias, .finish_gelu = finish_gelu, .finish_residual = finish_residual,               \
    .attend_split = attend_split, .merge_partials = merge_partials, .normalise_partial = normalise_partial,   \
    .depthwise_row = depthwise_row, .add_interpolated = add_interpolated, .overlap_hop = overlap_hop,         \
    .lanes = VEC_FLOATS, .synthesise_frames = synthesise_frames, .synthesis_scratch = synthesis_scratch

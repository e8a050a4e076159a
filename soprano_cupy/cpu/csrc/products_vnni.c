/* int8 products by AVX-512 VNNI: unsigned bytes times signed ones, 64 products an instruction. The weights become
 * unsigned by adding 128, which 128 times the sum of the rows takes out again. The integers, and so the results, are those of every other instruction set. */
#if defined(__x86_64__)
#include "products_vnni.h"

#include <immintrin.h>
#include <string.h>

#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")

#define VNNI_ROWS 2 /* rows x 4 panels x (high, low) sums stay in registers */
#define UNROLL _Pragma("GCC unroll 8")

static inline __attribute__((always_inline)) __m512i broadcast_word(const int8_t *bytes) {
    int32_t word;
    memcpy(&word, bytes, sizeof word);
    return _mm512_set1_epi32(word);
}

/* out += scale * (sum of X * (byte + 128) - offset), 128 high + low = X, for one tile. */
static inline __attribute__((always_inline)) void vnni_block(const int rows, const int panels, const uint8_t *weights,
                                                             const uint16_t *scales, const int8_t *const high[],
                                                             const int8_t *const low[], const int32_t offsets[],
                                                             float *out) {
    __m512i high_sums[VNNI_ROWS][PANELS], low_sums[VNNI_ROWS][PANELS];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int p = 0; p < panels; p++) {
            high_sums[r][p] = _mm512_setzero_si512();
            low_sums[r][p] = _mm512_set1_epi32(-offsets[r]);
        }
    }
    for (int k = 0; k < WORDS; k++) {
        UNROLL for (int p = 0; p < panels; p++) {
            const uint8_t *word = weights + p * PANEL_BYTES + k * 64;
            __m512i w = _mm512_xor_si512(_mm512_load_si512(word), _mm512_set1_epi8(-128));
            __builtin_prefetch(word + TILES_AHEAD * INT8_TILE_BYTES);
            UNROLL for (int r = 0; r < rows; r++) {
                high_sums[r][p] = _mm512_dpbusd_epi32(high_sums[r][p], w, broadcast_word(high[r] + 4 * k));
                low_sums[r][p] = _mm512_dpbusd_epi32(low_sums[r][p], w, broadcast_word(low[r] + 4 * k));
            }
        }
    }
    for (int p = 0; p < panels; p += 2) {
        __builtin_prefetch((const uint8_t *)(scales + p * PANEL) + TILES_AHEAD * INT8_TILE_BYTES);
    }
    UNROLL for (int p = 0; p < panels; p++) {
        __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(scales + p * PANEL)));
        __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        UNROLL for (int r = 0; r < rows; r++) {
            float *target = out + r * BLOCK + p * PANEL;
            __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high_sums[r][p], 7), low_sums[r][p]);
            __m512 value = _mm512_cvtepi32_ps(sum);
            _mm512_storeu_ps(target, _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(target)));
        }
    }
}

void multiply_int8_vnni(const Matrix *m, int block, int panel, int panels, const Operand *x, int first, int rows,
                        float *tile) {
    for (int r = 0; r < rows; r += VNNI_ROWS) {
        int count = rows - r < VNNI_ROWS ? rows - r : VNNI_ROWS;
        float *out = tile + r * BLOCK + panel * PANEL;
        for (int i = 0; i < count; i++) memset(out + i * BLOCK, 0, panels * PANEL * sizeof *out);
        for (int t = 0; t < m->tiles; t++) {
            const uint8_t *base = matrix_tile(m, block, t), *weights = base + panel * PANEL_BYTES;
            const uint16_t *scales = (const uint16_t *)(base + PANELS * PANEL_BYTES) + panel * PANEL;
            const int8_t *high[VNNI_ROWS] = {0}, *low[VNNI_ROWS] = {0};
            int32_t offsets[VNNI_ROWS] = {0};
            for (int i = 0; i < count; i++) {
                high[i] = operand_high(x, first + r + i) + t * INT8_GROUP;
                low[i] = high[i] + operand_low_offset(x);
                offsets[i] = x->sums[(size_t)(first + r + i) * x->tiles + t];
            }
            if (panels == PANELS && count == 2) {
                vnni_block(2, PANELS, weights, scales, high, low, offsets, out);
            } else if (panels == PANELS) {
                vnni_block(1, PANELS, weights, scales, high, low, offsets, out);
            } else {
                for (int p = 0; p < panels; p++) {
                    for (int i = 0; i < count; i++) {
                        vnni_block(1, 1, weights + p * PANEL_BYTES, scales + p * PANEL, high + i, low + i, offsets + i,
                                   out + i * BLOCK + p * PANEL);
                    }
                }
            }
        }
        for (int i = 0; i < count; i++) {
            for (int c = 0; c < panels * PANEL; c++) out[i * BLOCK + c] *= x->scales[first + r + i];
        }
    }
}

TARGET_END
#endif

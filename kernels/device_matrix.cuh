// Part of device.cuh: matrix fragments and tensor-core products.
#pragma once

// Matrix fragments: 8 x 8 matrices of 2-byte elements. Lane l passes the address of row l % 8 of matrix l / 8 (16
// aligned bytes; x1 uses lanes 0-7, x2 lanes 0-15). Register i of lane l receives elements (l / 4, 2 (l % 4)) and
// the next of matrix i; with _trans, of its transpose.

#if __CUDA_ARCH__ >= 750 && !defined(DTYPE_FP32)

DEVICE void load_matrix_x1(unsigned& r, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(address) : "memory");
}
DEVICE void load_matrix_x2(unsigned (&r)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrix_x4(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrix_x1_trans(unsigned& r, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(address) : "memory");
}
DEVICE void load_matrix_x2_trans(unsigned (&r)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrix_x4_trans(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d (16 x 8, fp32) += a (16 x 8) b (8 x 8). a: rows l / 4 and l / 4 + 8; b: column l / 4; d: rows l / 4 (d[0], d[1]) and
// l / 4 + 8 (d[2], d[3]), columns 2 (l % 4) and the next.
DEVICE void mma_16x8x8(float (&d)[4], unsigned a0, unsigned a1, unsigned b) {
#if defined(DTYPE_FP16)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
#endif
}

// d (16 x 8, fp32) += a (16 x 16) b (16 x 8). a: {rows l / 4, rows l / 4 + 8} of k 0-7, then of k 8-15; b: column
// l / 4 of k 0-7 and k 8-15, each lane the pair of k from 2 (l % 4). Turing forms it from two products of depth 8.
DEVICE void mma_16x8x16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
#if defined(DTYPE_FP16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
#else
    mma_16x8x8(d, a[0], a[1], b0);
    mma_16x8x8(d, a[2], a[3], b1);
#endif
}

#endif

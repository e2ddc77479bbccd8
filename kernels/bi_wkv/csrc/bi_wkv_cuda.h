/* What kernels/bi_wkv/cuda.py hands to bi_wkv.cu. Plain C; sizes and strides count elements. */
#ifndef VISION_BI_WKV_CUDA_H
#define VISION_BI_WKV_CUDA_H

#include <stdint.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* A tensor (batch, tokens, channels) whose channels lie side by side. */
typedef struct {
    void *data;
    int64_t batch, token;
} bi_wkv_rows;

/* The tokens are cut into chunks, one per thread block, of `segments` segments of 8 tokens. */
typedef struct {
    int32_t dtype;             /* of k, v, gy, y, gk, gv */
    int32_t width;             /* channels of a block, a power of two */
    int32_t segments;          /* at least 2; width * segments is at most 896, 640 for gradients */
    int32_t device;
    int64_t batch, tokens, channels, chunks;
    const float *w, *u;        /* (channels,) */
    bi_wkv_rows k, v, gy, y, gk, gv;
    void *sums, *grad_sums;    /* (2, batch, chunks, channels) of 12 bytes; unused with one chunk */
    float *parts;              /* (2, batch, chunks, channels): partial sums of gw and of gu */
} bi_wkv_cuda_call;

#endif

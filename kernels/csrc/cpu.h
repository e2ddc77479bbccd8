/* The CPU operators' arguments, and the table of their kernels for one instruction set.

   Plain C, no torch headers. Sizes and strides count elements. kernels/cpu.py packs the calls. */
#ifndef VISION_CPU_H
#define VISION_CPU_H

#include <stdint.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };

#define MOST_TOKENS 64     /* in a segment */
#define TASK_CHANNELS 256  /* of a task; the last one has up to twice as many */

#define MOST_MIXED 8

/* A tensor (batch, tokens, channels) whose channels lie side by side. */
typedef struct {
    void *data;
    int64_t batch, token;
} rows;

/* Per channel: what of w and u the kernels need. e^x = m 2^n with an integer n. */
typedef struct {
    float *decay;              /* e^{-w} as one number, for steps inside a segment */
    float *step_m;             /* e^{-w} = step_m 2^step_n, for any w */
    int32_t *step_n;
    float *stride_m, *stride_low; /* e^{-w L} = (stride_m + stride_low) 2^stride_n over a segment */
    int32_t *stride_n;
    float *bonus_m;            /* e^u = bonus_m 2^bonus_n */
    int32_t *bonus_n;
} bi_wkv_factors;

typedef struct {
    int32_t dtype;
    int64_t batch, tokens, channels;
    rows k, v, y, gy, gk, gv;
    /* Filled in by the library, in its own copy: */
    double *gw, *gu;           /* partial sums, (parts, batch, channels) */
    rows parked;               /* where e^k waits for the next phase; no data: nowhere */
    bi_wkv_factors of;
} bi_wkv_call;

/* One item of a batch, some of its channels, some of its segments. */
typedef struct {
    int64_t item, first_channel, end_channel;
    int64_t length, first_segment, end_segment, segments; /* of `length` tokens */
    int64_t part;              /* which row of partial sums is this one's */
    void *state, *grads;       /* of all segments of these channels; grads: in a backward pass */
} bi_wkv_task;

typedef struct {
    int32_t dtype, count;      /* count: proportions, at most MOST_MIXED */
    int64_t batch, height, width, channels, pixels;
    int64_t edges[5];
    const float *mu;           /* (count, channels) */
    rows x, gx;
    void *mixed[MOST_MIXED];   /* forward: outputs; backward: gradients; (batch, tokens, channels) */
} shift_mix_call;

typedef struct {
    int32_t dtype;
    const void *r, *y, *grad;
    void *out, *gr, *gy;
} gate_call;

typedef struct {
    int64_t batch, tokens, heads, size; /* of a head: `size` channels */
    rows r, k, v, w, y;                 /* float32 */
    const float *u;                     /* (heads, size) */
} wkv6_call;

/* One head of one item, some of its channels of v. */
typedef struct {
    int64_t item, head, first_column, end_column;
    float *scratch;
} wkv6_task;

typedef struct {
    int64_t lanes;
    /* Bytes of bi_wkv_task.state and .grads for a segment of `lanes` channels. */
    int64_t state_size, grads_size;
    void (*bi_wkv_summaries)(const bi_wkv_call *, const bi_wkv_task *);
    void (*bi_wkv_carry)(const bi_wkv_call *, const bi_wkv_task *);
    void (*bi_wkv_outputs)(const bi_wkv_call *, const bi_wkv_task *);
    void (*bi_wkv_grad_summaries)(const bi_wkv_call *, const bi_wkv_task *);
    void (*bi_wkv_grad_carry)(const bi_wkv_call *, const bi_wkv_task *);
    void (*bi_wkv_grads)(const bi_wkv_call *, const bi_wkv_task *);
    void (*shift_mix)(const shift_mix_call *, int64_t item, int64_t first_row, int64_t end_row);
    void (*shift_mix_grads)(const shift_mix_call *, int64_t item, int64_t first_row,
                            int64_t end_row, double *gmu, float *row_gmu);
    void (*gate)(const gate_call *, int64_t begin, int64_t end);
    void (*gate_grads)(const gate_call *, int64_t begin, int64_t end);
    int64_t (*wkv6_scratch)(const wkv6_call *, int64_t columns); /* floats */
    void (*wkv6)(const wkv6_call *, const wkv6_task *);
} kernels;

extern const kernels vision_kernels_generic;
#if defined(__x86_64__)
extern const kernels vision_kernels_avx2;
extern const kernels vision_kernels_avx512;
#endif

#endif

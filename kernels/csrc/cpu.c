/* What Python calls: shares the work among threads, for the best instruction set of this machine.

   Functions return 0, or -1 if there is no memory for their scratch space. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#define EXPORT __attribute__((visibility("default")))

static const kernels *const every[] = {
#if defined(__x86_64__)
    &vision_kernels_avx512,
    &vision_kernels_avx2,
#endif
    &vision_kernels_generic,
};
static const char *const names[] = {
#if defined(__x86_64__)
    "avx512",
    "avx2",
#endif
    "generic",
};
enum { KINDS = sizeof every / sizeof *every };

static int runs_here(const char *name) {
#if defined(__x86_64__)
    if (!strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return !strcmp(name, "generic");
}

static int chosen = -1;

static const kernels *serving(void) {
    if (chosen < 0)
        for (chosen = 0; !runs_here(names[chosen]);) chosen++;
    return every[chosen];
}

/* The instruction set in use. */
EXPORT const char *vision_cpu_kind(void) {
    serving();
    return names[chosen];
}

/* Use another one; -1 if it is unknown or does not run on this machine. */
EXPORT int vision_cpu_use(const char *name) {
    for (int i = 0; i < KINDS; i++)
        if (!strcmp(name, names[i]) && runs_here(name)) {
            chosen = i;
            return 0;
        }
    return -1;
}

/* Digest of the sources this was compiled from. */
EXPORT const char *vision_cpu_source(void) { return VISION_SOURCE_DIGEST; }

/* --- bi_wkv -------------------------------------------------------------------------------- */

/* Keeps the sums inside a segment, which are not rescaled, far from the ends of a float. */
static const float most_decay = 20.0f;

static int64_t segment_length(const float *w, const float *u, int64_t channels, int64_t tokens) {
    int64_t length = MOST_TOKENS;
    for (int64_t c = 0; c < channels; c++) {
        while (length > 1 && !(fabsf(w[c]) * (float)length <= most_decay)) length /= 2;
        if (!(fabsf(u[c]) <= most_decay)) length = 1;
    }
    int64_t segments = (tokens + length - 1) / length;
    return (tokens + segments - 1) / segments; /* no short rest */
}

/* e^x = m 2^n. */
static double split(double x, int32_t *n) {
    x = x > 22000 ? 22000 : x < -22000 ? -22000 : x; /* a NaN stays */
    double whole = rint(x * 1.4426950408889634);
    *n = whole == whole ? (int32_t)whole : 0;
    return exp(x - whole * 0.69314718055994531);
}

enum { FACTORS = 8 };

static void fill_factors(bi_wkv_factors *of, float *room, const float *w, const float *u,
                         int64_t channels, int64_t length) {
    float *column[FACTORS];
    for (int i = 0; i < FACTORS; i++) column[i] = room + i * channels;
    *of = (bi_wkv_factors){
        .decay = column[0],
        .step_m = column[1],
        .step_n = (int32_t *)column[2],
        .stride_m = column[3],
        .stride_low = column[4],
        .stride_n = (int32_t *)column[5],
        .bonus_m = column[6],
        .bonus_n = (int32_t *)column[7],
    };
    for (int64_t c = 0; c < channels; c++) {
        double step = split(-(double)w[c], &of->step_n[c]);
        double stride = split(-(double)w[c] * (double)length, &of->stride_n[c]);
        of->step_m[c] = (float)step;
        /* Of no meaning in segments of one token, where it might be infinite. */
        of->decay[c] = length > 1 ? (float)ldexp(step, of->step_n[c]) : 1;
        of->stride_m[c] = (float)stride;
        of->stride_low[c] = (float)(stride - of->stride_m[c]);
        of->bonus_m[c] = (float)split(u[c], &of->bonus_n[c]);
    }
}

typedef void phase(const bi_wkv_call *, const bi_wkv_task *);

/* Run phases for every item and block of channels: whole tasks where they suffice for all threads,
   else one phase at a time with the segments cut into parts. */
static int run_phases(const bi_wkv_call *call, int64_t length, int threads, int64_t parts,
                      phase *const *phases, int count) {
    const kernels *with = serving();
    int64_t blocks = call->channels / TASK_CHANNELS ? call->channels / TASK_CHANNELS : 1;
    int64_t tasks = call->batch * blocks, segments = (call->tokens + length - 1) / length;
    int64_t most_channels = call->channels - (blocks - 1) * TASK_CHANNELS;
    int64_t vectors = (most_channels + with->lanes - 1) / with->lanes;
    int64_t size = segments * vectors * with->state_size;
    int64_t states = parts > 1 ? tasks : threads < tasks ? threads : tasks;
    char *state = aligned_alloc(64, (size_t)((size * states + 63) / 64 * 64));
    if (!state) return -1;
    int rounds = parts > 1 ? count : 1;
    for (int round = 0; round < rounds; round++) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < tasks * parts; i++) {
            int64_t task = i / parts, part = i % parts, block = task % blocks;
            bi_wkv_task of = {
                .item = task / blocks,
                .first_channel = block * TASK_CHANNELS,
                .end_channel = block + 1 < blocks ? (block + 1) * TASK_CHANNELS : call->channels,
                .length = length,
                .first_segment = segments * part / parts,
                .end_segment = segments * (part + 1) / parts,
                .segments = segments,
                .part = part,
                .state = state + size * (parts > 1 ? task : omp_get_thread_num()),
            };
            if (parts == 1)
                for (int p = 0; p < count; p++) phases[p](call, &of);
            else if (part == 0 || (phases[round] != with->bi_wkv_carry &&
                                   phases[round] != with->bi_wkv_grad_carry))
                phases[round](call, &of);
        }
    }
    free(state);
    return 0;
}

/* Into how many parts the tokens are cut, which is the number of rows of partial gradients. */
EXPORT int64_t vision_bi_wkv_parts(int64_t batch, int64_t tokens, int64_t channels, int threads) {
    int64_t tasks = batch * (channels / TASK_CHANNELS ? channels / TASK_CHANNELS : 1);
    int64_t segments = (tokens + MOST_TOKENS - 1) / MOST_TOKENS;
    if (tasks >= 2 * threads || threads == 1) return 1;
    int64_t parts = (2 * threads + tasks - 1) / tasks;
    return parts < segments ? parts : segments;
}

/* `results` is written by the last phase only: until then its memory can hold e^k in float32. */
static int run(const bi_wkv_call *given, rows results, const float *w, const float *u,
               int threads, int64_t parts, phase *const *phases, int count) {
    bi_wkv_call own = *given, *call = &own;
    int whole = call->channels % serving()->lanes == 0; /* overlapping vectors would meet results */
    call->parked = call->dtype == FLOAT32 && whole ? results : (rows){0};
    int64_t length = segment_length(w, u, call->channels, call->tokens);
    float *room = malloc((size_t)(FACTORS * call->channels) * sizeof(float));
    if (!room) return -1;
    fill_factors(&call->of, room, w, u, call->channels, length);
    int failed = run_phases(call, length, threads, parts, phases, count);
    free(room);
    return failed;
}

/* y from k and v; w and u are (channels,), channels at least `lanes` of the widest set, 16. */
EXPORT int vision_bi_wkv(const bi_wkv_call *call, const float *w, const float *u, int threads,
                         int64_t parts) {
    const kernels *with = serving();
    phase *phases[] = {with->bi_wkv_summaries, with->bi_wkv_carry, with->bi_wkv_outputs};
    return run(call, call->y, w, u, threads, parts, phases, 3);
}

/* Growth over all tokens, -w T, up to which float32 suffices for the gradient of w: beyond it that
   is the small rest of sums that cancel. */
static const float most_growth = 20.0f;

static void sum_rows(float *total, const double *rows, int64_t count, int64_t channels) {
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0;
        for (int64_t r = 0; r < count; r++) sum += rows[r * channels + c];
        total[c] = (float)sum;
    }
}

/* gk, gv, gw and gu from k, v, gy and, in float32, y. Does nothing and returns 1 where the weights
   grow too much for float32. */
EXPORT int vision_bi_wkv_grads(const bi_wkv_call *call, const float *w, const float *u,
                               float *gw, float *gu, int threads, int64_t parts) {
    for (int64_t c = 0; c < call->channels; c++)
        if (w[c] * (float)call->tokens < -most_growth) return 1;
    const kernels *with = serving();
    phase *phases[] = {with->bi_wkv_summaries,      with->bi_wkv_carry,
                       with->bi_wkv_grad_summaries, with->bi_wkv_grad_carry,
                       with->bi_wkv_grads};
    int failed = run(call, call->gk, w, u, threads, parts, phases, 5);
    if (failed) return failed;
    sum_rows(gw, call->gw, parts * call->batch, call->channels);
    sum_rows(gu, call->gu, parts * call->batch, call->channels);
    return 0;
}

/* --- shift_mix ----------------------------------------------------------------------------- */

/* Rows of the grid that one task takes: fixed by the shape, so that sums have one order. */
static int64_t rows_at_a_time(const shift_mix_call *call) {
    int64_t rows = 256 / call->width;
    return rows < 1 ? 1 : rows < call->height ? rows : call->height;
}

/* How many rows of partial gradients of mu there are. */
EXPORT int64_t vision_shift_mix_parts(const shift_mix_call *call) {
    int64_t rows = rows_at_a_time(call);
    return call->batch * ((call->height + rows - 1) / rows);
}

EXPORT int vision_shift_mix(const shift_mix_call *call, int threads) {
    const kernels *with = serving();
    int64_t rows = rows_at_a_time(call), chunks = (call->height + rows - 1) / rows;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < call->batch * chunks; i++) {
        int64_t first = i % chunks * rows, end = first + rows;
        with->shift_mix(call, i / chunks, first, end < call->height ? end : call->height);
    }
    return 0;
}

/* gx, and (parts, count, channels) partial sums of gmu, zero on entry. */
EXPORT int vision_shift_mix_grads(const shift_mix_call *call, double *gmu, int threads) {
    const kernels *with = serving();
    int64_t rows = rows_at_a_time(call), chunks = (call->height + rows - 1) / rows;
    int64_t size = call->count * call->channels;
    float *row_gmu = malloc((size_t)(threads * size) * sizeof(float));
    if (!row_gmu) return -1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < call->batch * chunks; i++) {
        int64_t first = i % chunks * rows, end = first + rows;
        with->shift_mix_grads(call, i / chunks, first, end < call->height ? end : call->height,
                              gmu + i * size, row_gmu + omp_get_thread_num() * size);
    }
    free(row_gmu);
    return 0;
}

/* --- gate ---------------------------------------------------------------------------------- */

static int run_gate(const gate_call *call, int64_t count, int threads,
                    void (*range)(const gate_call *, int64_t, int64_t)) {
    const int64_t step = 1 << 14;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t begin = 0; begin < count; begin += step)
        range(call, begin, begin + step < count ? begin + step : count);
    return 0;
}

EXPORT int vision_gate(const gate_call *call, int64_t count, int threads) {
    return run_gate(call, count, threads, serving()->gate);
}

EXPORT int vision_gate_grads(const gate_call *call, int64_t count, int threads) {
    return run_gate(call, count, threads, serving()->gate_grads);
}

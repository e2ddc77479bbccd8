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

/* How many of at most `threads` are worth waking for so many elements. */
static int worth_waking(int threads, int64_t elements) {
    int64_t most = elements / (1 << 14);
    return most < 1 ? 1 : most < threads ? (int)most : threads;
}

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

/* A call made ready. */
typedef struct {
    bi_wkv_call call;
    int64_t length, segments; /* tokens of a segment, and how many there are */
    int64_t blocks, tasks;    /* of an item's channels, and items times these */
    int64_t vectors, most_vectors; /* of an item, and of the largest task */
    int64_t parts;
    int threads;
    float *factors;
} plan;

/* Into how many parts the tokens are cut, where items and blocks are too few for the threads. */
static int64_t parts_of(int64_t tasks, int64_t tokens, int threads) {
    int64_t segments = (tokens + MOST_TOKENS - 1) / MOST_TOKENS;
    if (tasks >= 2 * threads || threads == 1) return 1;
    int64_t parts = (2 * threads + tasks - 1) / tasks;
    return parts < segments ? parts : segments;
}

static int make_plan(plan *of, const bi_wkv_call *call, const float *w, const float *u,
                     int threads) {
    threads = worth_waking(threads, call->batch * call->tokens * call->channels);
    int64_t length = segment_length(w, u, call->channels, call->tokens);
    int64_t lanes = serving()->lanes;
    int64_t blocks = call->channels / TASK_CHANNELS ? call->channels / TASK_CHANNELS : 1;
    int64_t vectors = (call->channels + lanes - 1) / lanes;
    *of = (plan){
        .call = *call,
        .length = length,
        .segments = (call->tokens + length - 1) / length,
        .blocks = blocks,
        .tasks = call->batch * blocks,
        .vectors = vectors,
        .most_vectors = vectors - (blocks - 1) * (TASK_CHANNELS / lanes),
        .parts = parts_of(call->batch * blocks, call->tokens, threads),
        .threads = threads,
        .factors = malloc((size_t)(FACTORS * call->channels) * sizeof(float)),
    };
    if (!of->factors) return -1;
    of->call.parked = (rows){0};
    fill_factors(&of->call.of, of->factors, w, u, call->channels, length);
    return 0;
}

/* `results` is written by the last phase only: until then its memory can hold e^k in float32. */
static void park_in(plan *of, rows results) {
    int whole = of->call.channels % serving()->lanes == 0; /* overlapping vectors would meet them */
    if (of->call.dtype == FLOAT32 && whole) of->call.parked = results;
}

/* Memory for the segments of every task, or of the task that each thread is at. */
typedef struct {
    char *data;
    int64_t size; /* of a segment of `lanes` channels */
    int all;
} room;

static int64_t bytes_of(const plan *of, int64_t size, int all) {
    int64_t slots = of->threads < of->tasks ? of->threads : of->tasks;
    return of->segments * size * (all ? of->call.batch * of->vectors : slots * of->most_vectors);
}

static room make_room(const plan *of, int64_t size, int all) {
    size_t bytes = (size_t)((bytes_of(of, size, all) + 63) / 64 * 64);
    return (room){aligned_alloc(64, bytes), size, all};
}

static void *place_in(const room *in, const plan *of, int64_t item, int64_t block) {
    int64_t vector = omp_get_thread_num() * of->most_vectors;
    if (in->all) vector = item * of->vectors + block * (TASK_CHANNELS / serving()->lanes);
    return in->data + vector * of->segments * in->size;
}

typedef void phase(const bi_wkv_call *, const bi_wkv_task *);

/* Run phases for every item and block of channels: whole tasks where they suffice for all threads,
   else one phase at a time with the segments cut into parts, which needs room for all tasks. */
static void run_phases(const plan *of, const room *state, const room *grads, phase *const *phases,
                       int count) {
    const kernels *with = serving();
    int64_t parts = of->parts, channels = of->call.channels;
    int rounds = parts > 1 ? count : 1;
    for (int round = 0; round < rounds; round++) {
#pragma omp parallel for num_threads(of->threads) schedule(static)
        for (int64_t i = 0; i < of->tasks * parts; i++) {
            int64_t task = i / parts, part = i % parts;
            int64_t item = task / of->blocks, block = task % of->blocks;
            bi_wkv_task at = {
                .item = item,
                .first_channel = block * TASK_CHANNELS,
                .end_channel = block + 1 < of->blocks ? (block + 1) * TASK_CHANNELS : channels,
                .length = of->length,
                .first_segment = of->segments * part / parts,
                .end_segment = of->segments * (part + 1) / parts,
                .segments = of->segments,
                .part = part,
                .state = place_in(state, of, item, block),
                .grads = grads ? place_in(grads, of, item, block) : NULL,
            };
            if (parts == 1)
                for (int p = 0; p < count; p++) phases[p](&of->call, &at);
            else if (part == 0 || (phases[round] != with->bi_wkv_carry &&
                                   phases[round] != with->bi_wkv_grad_carry))
                phases[round](&of->call, &at);
        }
    }
}

/* What a forward pass keeps for its backward pass: this, then the states of all tasks. */
typedef struct {
    int64_t lanes, length; /* the plan they belong to; no lanes: there are none */
    char unused[48];
} kept_head;

/* Where the states are in `bytes` of memory of the caller; null if they have no room there. */
static char *states_in(void *kept, int64_t bytes, const plan *of) {
    int64_t needed = (int64_t)sizeof(kept_head) + bytes_of(of, serving()->state_size, 1);
    return kept && (uintptr_t)kept % 64 == 0 && bytes >= needed ? (char *)kept + sizeof(kept_head)
                                                                : NULL;
}

/* y from k and v; w and u are (channels,), channels at least `lanes` of the widest set, 16.

   `kept`, of `bytes`, which may be null: aligned memory for what the backward pass would otherwise
   compute again, 64 bytes and 28 for each channel, up to a multiple of 16, of 64 tokens. */
EXPORT int vision_bi_wkv(const bi_wkv_call *call, const float *w, const float *u, void *kept,
                         int64_t bytes, int threads) {
    const kernels *with = serving();
    phase *phases[] = {with->bi_wkv_summaries, with->bi_wkv_carry, with->bi_wkv_outputs};
    plan of;
    if (make_plan(&of, call, w, u, threads)) return -1;
    park_in(&of, call->y);
    char *states = states_in(kept, bytes, &of);
    if (kept) *(kept_head *)kept = (kept_head){.lanes = states ? with->lanes : 0, .length = of.length};
    room state = states ? (room){states, with->state_size, 1}
                        : make_room(&of, with->state_size, of.parts > 1);
    if (state.data) run_phases(&of, &state, NULL, phases, 3);
    if (!states) free(state.data);
    free(of.factors);
    return state.data ? 0 : -1;
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

/* gk, gv, gw and gu from k, v, gy and, in float32, y; `kept` is what `vision_bi_wkv` left, or null.
   Does nothing and returns 1 where the weights grow too much for float32. */
EXPORT int vision_bi_wkv_grads(const bi_wkv_call *call, const float *w, const float *u,
                               float *gw, float *gu, void *kept, int64_t bytes, int threads) {
    for (int64_t c = 0; c < call->channels; c++)
        if (w[c] * (float)call->tokens < -most_growth) return 1;
    const kernels *with = serving();
    phase *states_again[] = {with->bi_wkv_summaries, with->bi_wkv_carry};
    phase *phases[] = {with->bi_wkv_grad_summaries, with->bi_wkv_grad_carry, with->bi_wkv_grads};
    plan of;
    if (make_plan(&of, call, w, u, threads)) return -1;
    char *states = states_in(kept, bytes, &of);
    const kept_head *head = kept;
    if (states && (head->lanes != with->lanes || head->length != of.length)) states = NULL;
    room state = states ? (room){states, with->state_size, 1} : make_room(&of, with->state_size, 1);
    room grads = make_room(&of, with->grads_size, of.parts > 1);
    int64_t rows = of.parts * call->batch;
    double *sums = malloc((size_t)(2 * rows * call->channels) * sizeof(double));
    int failed = state.data && grads.data && sums ? 0 : -1;
    if (!failed) {
        of.call.gw = sums;
        of.call.gu = sums + rows * call->channels;
        if (!states) run_phases(&of, &state, NULL, states_again, 2);
        park_in(&of, call->gk);
        run_phases(&of, &state, &grads, phases, 3);
        sum_rows(gw, of.call.gw, rows, call->channels);
        sum_rows(gu, of.call.gu, rows, call->channels);
    }
    free(sums);
    if (!states) free(state.data);
    free(grads.data);
    free(of.factors);
    return failed;
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

static int threads_of(const shift_mix_call *call, int threads) {
    return worth_waking(threads, call->batch * call->height * call->width * call->channels);
}

EXPORT int vision_shift_mix(const shift_mix_call *call, int threads) {
    const kernels *with = serving();
    int64_t rows = rows_at_a_time(call), chunks = (call->height + rows - 1) / rows;
    threads = threads_of(call, threads);
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
    threads = threads_of(call, threads);
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
    threads = worth_waking(threads, count);
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

/* --- wkv6 ---------------------------------------------------------------------------------- */

/* y from r, k, v, w and u. */
EXPORT int vision_wkv6(const wkv6_call *call, int threads) {
    const kernels *with = serving();
    int64_t wide = 2 * with->lanes, blocks = (call->size + wide - 1) / wide;
    /* Too few heads for the threads are cut by their columns, at the cost of decays taken twice. */
    int64_t heads = call->batch * call->heads;
    /* Every element meets a column of the state. */
    threads = worth_waking(threads, heads * call->tokens * call->size * call->size);
    int64_t parts = threads > 1 ? (2 * threads + heads - 1) / heads : 1;
    int64_t columns = (blocks + parts - 1) / parts * wide;
    parts = (call->size + columns - 1) / columns;
    int64_t tasks = heads * parts, slots = threads < tasks ? threads : tasks;
    int64_t each = with->wkv6_scratch(call, columns);
    float *scratch = aligned_alloc(64, (size_t)(slots * each) * sizeof(float));
    if (!scratch) return -1;
#pragma omp parallel for num_threads((int)slots) schedule(static)
    for (int64_t i = 0; i < tasks; i++) {
        int64_t head = i / parts, first = i % parts * columns, end = first + columns;
        wkv6_task at = {
            .item = head / call->heads,
            .head = head % call->heads,
            .first_column = first,
            .end_column = end < call->size ? end : call->size,
            .scratch = scratch + omp_get_thread_num() * each,
        };
        with->wkv6(call, &at);
    }
    free(scratch);
    return 0;
}

/* Token shift and mix, the 5-point stencil in one pass; included once per instruction set.

   A group of channels takes one neighbour, so the code walks (token, group, channels). What is left
   of a group after whole vectors is copied through a buffer. */

INLINE vf load_few(const void *p, int64_t i, int64_t count, int dtype) {
    char few[LANES * 4] = {0};
    memcpy(few, at(p, i, dtype), count * width_of(dtype));
    return load(few, 0, dtype);
}

INLINE void store_few(void *p, int64_t i, int64_t count, vf x, int dtype) {
    char few[LANES * 4];
    store(few, 0, x, dtype);
    memcpy((char *)p + i * width_of(dtype), few, count * width_of(dtype));
}

/* `count` is LANES or less. */
INLINE vf load_some(const void *p, int64_t i, int64_t count, int dtype) {
    return count == LANES ? load(p, i, dtype) : load_few(p, i, count, dtype);
}

INLINE void store_some(void *p, int64_t i, int64_t count, vf x, int dtype) {
    if (count == LANES) store(p, i, x, dtype);
    else store_few(p, i, count, x, dtype);
}

enum { GROUPS = 5 };

/* Where group `g` of a token finds its neighbour: a number of tokens to go, 0 if it has none.
   `sign` is 1 for the neighbour a token takes, -1 for the token that takes this one. */
INLINE int64_t way(const shift_mix_call *call, int g, int64_t y, int64_t x, int sign) {
    int64_t step = (g == 0 || g == 2 ? -call->pixels : call->pixels) * sign;
    int64_t place = g < 2 ? x + step : y + step, end = g < 2 ? call->width : call->height;
    if (g == 4 || place < 0 || place >= end) return 0;
    return g < 2 ? step : step * call->width;
}

#define FOR_VECTORS(first, end, c, count)                                         \
    for (int64_t c = (first), count;                                              \
         c < (end) && (count = (end) - c < LANES ? (end) - c : LANES, 1); c += LANES)

INLINE int64_t group_end(const shift_mix_call *call, int g) {
    return g == 4 ? call->channels : call->edges[g + 1];
}

INLINE void mix_row(int dtype, const shift_mix_call *call, int64_t item, int64_t y) {
    for (int64_t x = 0; x < call->width; x++) {
        int64_t t = y * call->width + x;
        int64_t from = item * call->x.batch + t * call->x.token;
        int64_t to = (item * call->height * call->width + t) * call->channels;
        for (int g = 0; g < GROUPS; g++) {
            int64_t step = way(call, g, y, x, 1) * call->x.token;
            int alone = g < 4 && step == 0;
            FOR_VECTORS(call->edges[g], group_end(call, g), c, count) {
                vf own = load_some(call->x.data, from + c, count, dtype);
                vf other = alone ? all(0) : load_some(call->x.data, from + step + c, count, dtype);
                for (int n = 0; n < call->count; n++) {
                    vf mu = load_some(call->mu, n * call->channels + c, count, FLOAT32);
                    store_some(call->mixed[n], to + c, count, other + (own - other) * mu, dtype);
                }
            }
        }
    }
}

static void shift_mix(const shift_mix_call *call, int64_t item, int64_t first, int64_t end) {
    for (int64_t y = first; y < end; y++) FOR_DTYPE(call->dtype, mix_row, call, item, y);
}

INLINE void mix_row_grads(int dtype, const shift_mix_call *call, int64_t item, int64_t y,
                          float *gmu) {
    int64_t tokens = call->height * call->width;
    for (int64_t x = 0; x < call->width; x++) {
        int64_t t = y * call->width + x;
        int64_t from = item * call->x.batch + t * call->x.token;
        int64_t to = (item * tokens + t) * call->channels;
        for (int g = 0; g < GROUPS; g++) {
            int64_t step = way(call, g, y, x, 1) * call->x.token;
            int64_t taker = way(call, g, y, x, -1) * call->channels;
            int alone = g < 4 && step == 0, taken = g == 4 || taker != 0;
            FOR_VECTORS(call->edges[g], group_end(call, g), c, count) {
                vf own = load_some(call->x.data, from + c, count, dtype);
                vf other = alone ? all(0) : load_some(call->x.data, from + step + c, count, dtype);
                vf gx = all(0);
                for (int n = 0; n < call->count; n++) {
                    int64_t at_mu = n * call->channels + c;
                    vf mu = load_some(call->mu, at_mu, count, FLOAT32);
                    vf grad = load_some(call->mixed[n], to + c, count, dtype);
                    gx += mu * grad;
                    if (taken)
                        gx += (1 - mu) * load_some(call->mixed[n], to + taker + c, count, dtype);
                    vf sum = load_some(gmu, at_mu, count, FLOAT32) + grad * (own - other);
                    store_some(gmu, at_mu, count, sum, FLOAT32);
                }
                store_some(call->gx.data, to + c, count, gx, dtype);
            }
        }
    }
}

/* Adds to gmu, (count, channels); `row_gmu` is room for as many floats. */
static void shift_mix_grads(const shift_mix_call *call, int64_t item, int64_t first, int64_t end,
                            double *gmu, float *row_gmu) {
    int64_t size = call->count * call->channels;
    for (int64_t y = first; y < end; y++) {
        memset(row_gmu, 0, size * sizeof(float));
        FOR_DTYPE(call->dtype, mix_row_grads, call, item, y, row_gmu);
        for (int64_t i = 0; i < size; i++) gmu[i] += row_gmu[i];
    }
}

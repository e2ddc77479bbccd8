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

/* Calls function(c, LANES, ...) for the whole vectors from `first` to `end`, the number a constant
   there, then once for what is left. */
#define FOR_VECTORS(first, end, function, ...)                           \
    do {                                                                 \
        int64_t c_ = (first);                                            \
        for (; c_ + LANES <= (end); c_ += LANES) function(c_, LANES, __VA_ARGS__); \
        if (c_ < (end)) function(c_, (end) - c_, __VA_ARGS__);           \
    } while (0)

INLINE int64_t group_end(const shift_mix_call *call, int g) {
    return g == 4 ? call->channels : call->edges[g + 1];
}

/* One group of one token. `count` is a constant where this is inlined, so that all proportions are
   computed from one load; `other` is null for a token without a neighbour. */
INLINE void mix_vector(int64_t c, int64_t size, int dtype, int count, const void *own,
                       const void *other, const float *mu, int64_t channels, void *const *mixed,
                       int64_t to) {
    vf x = load_some(own, c, size, dtype);
    vf s = other ? load_some(other, c, size, dtype) : all(0);
    for (int n = 0; n < count; n++) {
        vf share = load_some(mu, n * channels + c, size, FLOAT32);
        store_some(mixed[n], to + c, size, s + (x - s) * share, dtype);
    }
}

INLINE void mix_group(int dtype, int count, const void *own, const void *other, const float *mu,
                      int64_t channels, void *const *mixed, int64_t to, int64_t first,
                      int64_t end) {
    if (other)
        FOR_VECTORS(first, end, mix_vector, dtype, count, own, other, mu, channels, mixed, to);
    else
        FOR_VECTORS(first, end, mix_vector, dtype, count, own, NULL, mu, channels, mixed, to);
}

INLINE void mix_row(int dtype, int count, const shift_mix_call *call, int64_t item, int64_t y) {
    void *mixed[MOST_MIXED]; /* a copy, which no store can be taken to change */
    memcpy(mixed, call->mixed, count * sizeof *mixed);
    int64_t channels = call->channels, token = call->x.token;
    int64_t t = y * call->width, from = item * call->x.batch + t * token;
    int64_t to = (item * call->height * call->width + t) * channels;
    for (int64_t x = 0; x < call->width; x++, from += token, to += channels)
        for (int g = 0; g < GROUPS; g++) {
            int64_t step = way(call, g, y, x, 1) * token;
            const void *own = at(call->x.data, from, dtype);
            const void *other = g == 4 || step ? at(own, step, dtype) : NULL;
            mix_group(dtype, count, own, other, call->mu, channels, mixed, to, call->edges[g],
                      group_end(call, g));
        }
}

/* The models mix two or three. */
#define FOR_COUNT(count, dtype, function, ...)                                              \
    do {                                                                                    \
        if ((count) == 2) function(dtype, 2, __VA_ARGS__);                                  \
        else if ((count) == 3) function(dtype, 3, __VA_ARGS__);                             \
        else function(dtype, count, __VA_ARGS__);                                           \
    } while (0)

INLINE void mix_rows(int dtype, const shift_mix_call *call, int64_t item, int64_t first,
                     int64_t end) {
    for (int64_t y = first; y < end; y++) FOR_COUNT(call->count, dtype, mix_row, call, item, y);
}

static void shift_mix(const shift_mix_call *call, int64_t item, int64_t first, int64_t end) {
    FOR_DTYPE(call->dtype, mix_rows, call, item, first, end);
}

INLINE void mix_vector_grads(int64_t c, int64_t size, int dtype, int count, const void *own,
                             const void *other, const float *mu, int64_t channels,
                             void *const *grads, void *gx, float *gmu, int64_t to,
                             int64_t taker) {
    vf difference = load_some(own, c, size, dtype);
    if (other) difference -= load_some(other, c, size, dtype);
    vf sum = all(0);
    for (int n = 0; n < count; n++) {
        int64_t place = n * channels + c;
        vf share = load_some(mu, place, size, FLOAT32);
        vf grad = load_some(grads[n], to + c, size, dtype);
        sum += share * grad;
        if (taker >= 0) sum += (1 - share) * load_some(grads[n], taker + c, size, dtype);
        vf old = load_some(gmu, place, size, FLOAT32);
        store_some(gmu, place, size, old + grad * difference, FLOAT32);
    }
    store_some(gx, to + c, size, sum, dtype);
}

/* One group of one token: `other` as above, `taker` how far the token is that takes this one. */
INLINE void mix_group_grads(int dtype, int count, const void *own, const void *other,
                            const float *mu, int64_t channels, void *const *grads, void *gx,
                            float *gmu, int64_t to, int64_t taker, int64_t first, int64_t end) {
    FOR_VECTORS(first, end, mix_vector_grads, dtype, count, own, other, mu, channels, grads, gx,
                gmu, to, taker);
}

INLINE void mix_row_grads(int dtype, int count, const shift_mix_call *call, int64_t item,
                          int64_t y, float *gmu) {
    void *grads[MOST_MIXED];
    memcpy(grads, call->mixed, count * sizeof *grads);
    int64_t channels = call->channels, token = call->x.token;
    int64_t t = y * call->width, from = item * call->x.batch + t * token;
    int64_t to = (item * call->height * call->width + t) * channels;
    for (int64_t x = 0; x < call->width; x++, from += token, to += channels)
        for (int g = 0; g < GROUPS; g++) {
            int64_t step = way(call, g, y, x, 1) * token;
            int64_t back = way(call, g, y, x, -1) * channels;
            const void *own = at(call->x.data, from, dtype);
            const void *other = g == 4 || step ? at(own, step, dtype) : NULL;
            mix_group_grads(dtype, count, own, other, call->mu, channels, grads, call->gx.data,
                            gmu, to, g == 4 || back ? to + back : -1, call->edges[g],
                            group_end(call, g));
        }
}

INLINE void add_row_grads(int dtype, const shift_mix_call *call, int64_t item, int64_t y,
                          float *row_gmu) {
    FOR_COUNT(call->count, dtype, mix_row_grads, call, item, y, row_gmu);
}

/* Adds to gmu, (count, channels); `row_gmu` is room for as many floats. */
static void shift_mix_grads(const shift_mix_call *call, int64_t item, int64_t first, int64_t end,
                            double *gmu, float *row_gmu) {
    int64_t size = call->count * call->channels;
    for (int64_t y = first; y < end; y++) {
        memset(row_gmu, 0, size * sizeof(float));
        FOR_DTYPE(call->dtype, add_row_grads, call, item, y, row_gmu);
        for (int64_t i = 0; i < size; i++) gmu[i] += row_gmu[i];
    }
}

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

/* `count` is a constant where this is inlined, so that all proportions are computed from one load;
   `other` is null for a token without a neighbour. */
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

/* Spans of a row of the grid: from `begin` to `end` the neighbour of a group is there. */
typedef struct {
    int64_t step, begin, end;
} span;

INLINE span span_of(const shift_mix_call *call, int g, int64_t y, int sign) {
    int64_t pixels = call->pixels, width = call->width;
    if (g == 4) return (span){0, 0, width};
    int64_t step = (g == 0 || g == 2 ? -pixels : pixels) * sign;
    if (g >= 2) {
        int inside = y + step >= 0 && y + step < call->height;
        return (span){step * width, 0, inside ? width : 0};
    }
    int64_t most = pixels < width ? pixels : width;
    return step < 0 ? (span){step, most, width} : (span){step, 0, width - most};
}

INLINE void mix_row(int dtype, int count, const shift_mix_call *call, int64_t item, int64_t y) {
    void *mixed[MOST_MIXED]; /* a copy, which no store can be taken to change */
    memcpy(mixed, call->mixed, count * sizeof *mixed);
    const float *mu = call->mu;
    int64_t channels = call->channels, token = call->x.token, t = y * call->width;
    const char *own = at(call->x.data, item * call->x.batch + t * token, dtype);
    int64_t to = (item * call->height * call->width + t) * channels;
    span of[GROUPS];
    for (int g = 0; g < GROUPS; g++) of[g] = span_of(call, g, y, 1);
    /* A token after the other: that is how the results lie in memory. */
    for (int64_t x = 0; x < call->width; x++, own += token * width_of(dtype), to += channels)
        for (int g = 0; g < GROUPS; g++) {
            int64_t first = call->edges[g], last = group_end(call, g);
            if (x >= of[g].begin && x < of[g].end)
                FOR_VECTORS(first, last, mix_vector, dtype, count, own,
                            at(own, of[g].step * token, dtype), mu, channels, mixed, to);
            else
                FOR_VECTORS(first, last, mix_vector, dtype, count, own, NULL, mu, channels, mixed,
                            to);
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

/* One vector of channels of the tokens of a row from `begin` to `end`. `has_other` as above;
   `has_taker`: the tokens `back` elements away take these ones. The sums over the tokens stay in
   registers. */
INLINE void mix_column_grads(int64_t c, int64_t size, int dtype, int count,
                             const shift_mix_call *call, void *const *grads, float *gmu,
                             int64_t from, int64_t to, int64_t begin, int64_t end, int has_other,
                             int64_t step, int has_taker, int64_t back) {
    int64_t channels = call->channels;
    vf share[MOST_MIXED], sums[MOST_MIXED];
    for (int n = 0; n < count; n++) {
        share[n] = load_some(call->mu, n * channels + c, size, FLOAT32);
        sums[n] = load_some(gmu, n * channels + c, size, FLOAT32);
    }
    for (int64_t x = begin; x < end; x++) {
        const void *own = at(call->x.data, from + x * call->x.token, dtype);
        int64_t place = to + x * channels;
        vf difference = load_some(own, c, size, dtype);
        if (has_other) difference -= load_some(at(own, step, dtype), c, size, dtype);
        vf sum = all(0);
        for (int n = 0; n < count; n++) {
            vf grad = load_some(grads[n], place + c, size, dtype);
            sum += share[n] * grad;
            if (has_taker)
                sum += (1 - share[n]) * load_some(grads[n], place + back + c, size, dtype);
            sums[n] += grad * difference;
        }
        store_some(call->gx.data, place + c, size, sum, dtype);
    }
    for (int n = 0; n < count; n++)
        store_some(gmu, n * channels + c, size, sums[n], FLOAT32);
}

/* Where the first of two spans begins or ends after `begin`, else the end of the row. */
INLINE int64_t next_cut(int64_t begin, span a, span b, int64_t width) {
    int64_t cuts[4] = {a.begin, a.end, b.begin, b.end}, next = width;
    for (int i = 0; i < 4; i++)
        if (cuts[i] > begin && cuts[i] < next) next = cuts[i];
    return next;
}

INLINE void mix_row_grads(int dtype, int count, const shift_mix_call *call, int64_t item,
                          int64_t y, float *gmu) {
    void *grads[MOST_MIXED];
    memcpy(grads, call->mixed, count * sizeof *grads);
    int64_t channels = call->channels, width = call->width, t = y * width;
    int64_t from = item * call->x.batch + t * call->x.token;
    int64_t to = (item * call->height * width + t) * channels;
    for (int g = 0; g < GROUPS; g++) {
        span takes = span_of(call, g, y, 1), taken = span_of(call, g, y, -1);
        int64_t step = takes.step * call->x.token, back = taken.step * channels;
        int64_t first = call->edges[g], last = group_end(call, g);
        for (int64_t begin = 0, end; begin < width; begin = end) {
            end = next_cut(begin, takes, taken, width);
            int other = begin >= takes.begin && begin < takes.end;
            int taker = begin >= taken.begin && begin < taken.end;
            if (other && taker)
                FOR_VECTORS(first, last, mix_column_grads, dtype, count, call, grads, gmu, from,
                            to, begin, end, 1, step, 1, back);
            else
                FOR_VECTORS(first, last, mix_column_grads, dtype, count, call, grads, gmu, from,
                            to, begin, end, other, step, taker, back);
        }
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

/* Bidirectional WKV6 in float32; included once per instruction set.

   A head has a state, keys by channels of v, that fades by exp(-exp(w)) of every key and token. Per
   direction it is carried over the tokens in steps of STEP: the tokens of a step meet each other in
   pairs, and the tokens before (after) the step by the state. With the decays inside the step taken
   into r and k, a step reads and moves on the state once for all its tokens. No decay exceeds 1,
   none is divided by, and that of a step is held as the sum of two floats: over thousands of tokens
   that forget almost nothing, the rounding of one float would add up. */

enum { STEP = 4, COLUMNS = 2 * LANES, AHEAD = 2 };

/* A task's scratch space. Keys are filled up to whole vectors, columns to COLUMNS. */
typedef struct {
    int64_t keys, columns, steps;
    float *decay;         /* of a token, (steps, STEP, keys) */
    float *whole, *rest;  /* of a step: whole + rest, (steps, keys) */
    float *r, *k;         /* of a step, (STEP, keys) */
    float *read, *written; /* the same times the decays to the edge of the step */
    float *v, *y;         /* (STEP, columns) */
    float *state;         /* (columns / COLUMNS, keys, COLUMNS) */
} wkv6_room;

INLINE int64_t up_to(int64_t size, int64_t multiple) {
    return (size + multiple - 1) / multiple * multiple;
}

/* Lay out the scratch space at `floats`; returns how many it takes. */
INLINE int64_t wkv6_lay_out(wkv6_room *of, const wkv6_call *call, int64_t columns, float *floats) {
    int64_t keys = up_to(call->size, LANES), steps = (call->tokens + STEP - 1) / STEP, used = 0;
    *of = (wkv6_room){.keys = keys, .columns = up_to(columns, COLUMNS), .steps = steps};
    const struct {
        float **place;
        int64_t size;
    } parts[] = {
        {&of->decay, steps * STEP * keys}, {&of->whole, steps * keys}, {&of->rest, steps * keys},
        {&of->r, STEP * keys}, {&of->k, STEP * keys},
        {&of->read, STEP * keys}, {&of->written, STEP * keys},
        {&of->v, STEP * of->columns}, {&of->y, STEP * of->columns},
        {&of->state, keys * of->columns},
    };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].place = floats ? floats + used : NULL;
        used += up_to(parts[i].size, 16);
    }
    return used;
}

static int64_t wkv6_scratch(const wkv6_call *call, int64_t columns) {
    wkv6_room of;
    return wkv6_lay_out(&of, call, columns, NULL);
}

INLINE int64_t tokens_of(const wkv6_call *call, int64_t step) {
    int64_t left = call->tokens - step * STEP;
    return left < STEP ? left : STEP;
}

INLINE float *row_of(const rows *x, const wkv6_call *call, const wkv6_task *task, int64_t token) {
    return (float *)x->data + task->item * x->batch + token * x->token + task->head * call->size;
}

/* Take `count` channels of a step's tokens from `first` on into rows of `width`, the rest zeros.
   Asks for those `ahead` steps further, too: the rows of other heads lie in between, which hides
   them from the processor's own prefetching. */
INLINE void take_rows(float *into, const rows *x, const wkv6_call *call, const wkv6_task *task,
                      int64_t step, int64_t ahead, int64_t first, int64_t count, int64_t width) {
    int64_t tokens = tokens_of(call, step);
    for (int64_t i = 0; i < STEP; i++) {
        int64_t there = i < tokens ? count : 0, later = (step + ahead) * STEP + i;
        float *row = into + i * width;
        if (there) {
            const float *from = row_of(x, call, task, step * STEP + i) + first;
            memcpy(row, from, (size_t)there * sizeof *row);
        }
        memset(row + there, 0, (size_t)(width - there) * sizeof *row);
        if (later >= 0 && later < call->tokens) {
            const float *from = row_of(x, call, task, later) + first;
            for (int64_t c = 0; c < count; c += 16) __builtin_prefetch(from + c, 0, 2);
        }
    }
}

/* w waits where r will be read. */
INLINE void take_decays(const wkv6_room *of, const wkv6_call *call, const wkv6_task *task) {
    int64_t keys = of->keys;
    for (int64_t step = 0; step < of->steps; step++) {
        int64_t tokens = tokens_of(call, step);
        take_rows(of->read, &call->w, call, task, step, AHEAD, 0, call->size, keys);
        for (int64_t c = 0; c < keys; c += LANES) {
            vf sum = all(0);
            for (int64_t i = 0; i < STEP; i++) {
                vf fade = i < tokens ? -exponential(load_float(of->read + i * keys + c)) : all(0);
                store_float(of->decay + (step * STEP + i) * keys + c, exponential(fade));
                sum += fade;
            }
            vi n;
            vf above = split_exp_above(sum, &n), m = above + 1.0f, power = power_of_two(n);
            store_float(of->whole + step * keys + c, m * power);
            store_float(of->rest + step * keys + c, (above - (m - 1.0f)) * power);
        }
    }
}

/* r times the decays since the edge of the step that the state comes from, k times those up to the
   other edge. */
INLINE void face_edges(const wkv6_room *of, int64_t step, int backward) {
    int64_t keys = of->keys;
    for (int64_t c = 0; c < keys; c += LANES) {
        vf since = all(1), until = all(1);
        for (int64_t i = 0; i < STEP; i++) {
            int64_t first = (backward ? STEP - 1 - i : i) * keys + c;
            int64_t last = (backward ? i : STEP - 1 - i) * keys + c;
            const float *decay = of->decay + step * STEP * keys;
            store_float(of->read + first, load_float(of->r + first) * since);
            store_float(of->written + last, load_float(of->k + last) * until);
            since *= load_float(decay + first);
            until *= load_float(decay + last);
        }
    }
}

INLINE float sum_of(vf x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* y = what the tokens of a step read of each other, in both directions, and of themselves. */
INLINE void meet(const wkv6_room *of, const float *u, int64_t size, int64_t step) {
    int64_t keys = of->keys;
    vf scores[STEP][STEP];
    for (int t = 0; t < STEP; t++)
        for (int i = 0; i < STEP; i++) scores[t][i] = all(0);
    for (int64_t c = 0; c < keys; c += LANES) {
        vf r[STEP], k[STEP], decay[STEP], bonus = all(0);
        int64_t there = size - c < LANES ? size - c : LANES;
        memcpy(&bonus, u + c, (size_t)there * sizeof *u);
        for (int i = 0; i < STEP; i++) {
            r[i] = load_float(of->r + i * keys + c);
            k[i] = load_float(of->k + i * keys + c);
            decay[i] = load_float(of->decay + (step * STEP + i) * keys + c);
        }
        for (int i = 0; i < STEP; i++) {
            vf between = all(1);
            scores[i][i] += r[i] * k[i] * bonus;
            for (int t = i + 1; t < STEP; t++) {
                scores[t][i] += r[t] * (k[i] * between);
                scores[i][t] += r[i] * (k[t] * between);
                between *= decay[t];
            }
        }
    }
    for (int t = 0; t < STEP; t++) {
        vf score[STEP];
        for (int i = 0; i < STEP; i++) score[i] = all(sum_of(scores[t][i]));
        for (int64_t c = 0; c < of->columns; c += LANES) {
            vf y = all(0);
            for (int i = 0; i < STEP; i++) y += score[i] * load_float(of->v + i * of->columns + c);
            store_float(of->y + t * of->columns + c, y);
        }
    }
}

/* Read COLUMNS of the state for the tokens of a step, then add the step to it. */
INLINE void pass_state(const wkv6_room *of, int64_t step, int64_t column) {
    /* Copies, which stores to other memory cannot make a compiler reload. */
    const int64_t keys = of->keys, columns = of->columns;
    const float *whole = of->whole + step * keys, *rest = of->rest + step * keys;
    const float *read = of->read, *written = of->written, *v = of->v + column;
    float *y = of->y + column, *state = of->state + column * keys;
    vf sums[STEP][2];
    for (int i = 0; i < STEP; i++)
        for (int half = 0; half < 2; half++)
            sums[i][half] = load_float(y + i * columns + half * LANES);
    for (int64_t n = 0; n < keys; n++, state += COLUMNS) {
        vf held[2] = {load_float(state), load_float(state + LANES)};
        vf next[2] = {all(rest[n]) * held[0], all(rest[n]) * held[1]};
        for (int i = 0; i < STEP; i++) {
            vf r = all(read[i * keys + n]), k = all(written[i * keys + n]);
            for (int half = 0; half < 2; half++) {
                sums[i][half] += r * held[half];
                next[half] += k * load_float(v + i * columns + half * LANES);
            }
        }
        for (int half = 0; half < 2; half++)
            store_float(state + half * LANES, next[half] + all(whole[n]) * held[half]);
    }
    for (int i = 0; i < STEP; i++)
        for (int half = 0; half < 2; half++)
            store_float(y + i * columns + half * LANES, sums[i][half]);
}

INLINE void one_direction(const wkv6_room *of, const wkv6_call *call, const wkv6_task *task,
                          int backward) {
    int64_t count = task->end_column - task->first_column;
    memset(of->state, 0, (size_t)(of->keys * of->columns) * sizeof *of->state);
    for (int64_t s = 0; s < of->steps; s++) {
        int64_t step = backward ? of->steps - 1 - s : s;
        int64_t ahead = backward ? -AHEAD : AHEAD, first = task->first_column;
        take_rows(of->r, &call->r, call, task, step, ahead, 0, call->size, of->keys);
        take_rows(of->k, &call->k, call, task, step, ahead, 0, call->size, of->keys);
        take_rows(of->v, &call->v, call, task, step, ahead, first, count, of->columns);
        if (backward)
            take_rows(of->y, &call->y, call, task, step, ahead, first, count, of->columns);
        else
            meet(of, call->u + task->head * call->size, call->size, step);
        face_edges(of, step, backward);
        for (int64_t column = 0; column < of->columns; column += COLUMNS)
            pass_state(of, step, column);
        for (int64_t i = 0; i < tokens_of(call, step); i++) {
            float *row = row_of(&call->y, call, task, step * STEP + i) + task->first_column;
            memcpy(row, of->y + i * of->columns, (size_t)count * sizeof *row);
        }
    }
}

static void wkv6(const wkv6_call *call, const wkv6_task *task) {
    wkv6_room of;
    wkv6_lay_out(&of, call, task->end_column - task->first_column, task->scratch);
    take_decays(&of, call, task);
    one_direction(&of, call, task, 0);
    one_direction(&of, call, task, 1);
}

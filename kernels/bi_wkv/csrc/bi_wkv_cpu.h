/* Bi-WKV for LANES channels at a time; included once per instruction set.

   The sums over the other tokens are two recurrences, P[t+1] = d P[t] + x[t] and
   S[t-1] = d S[t] + x[t] with d = e^{-w}, x = e^k (v, 1). The tokens are cut into segments:
     summaries  each segment alone: its sums as its right and as its left neighbour see them
     carry      over the segments: what enters each one from either side
     outputs    each segment with what enters it
   The backward pass does the same with g = (gy, -gy y) / denominator in x's place, from what enters
   each segment, which the forward pass may have kept.

   Block floating point keeps every w, u and k in range: e^k is m 2^n with an integer n, and the
   sums of a segment are floats times 2^E with an integer E of its own per channel. No logarithm is
   taken and no large exponent is ever rounded. Inside a segment nothing is rescaled, so |w| times
   its length is bounded by the caller. */

/* Sums entering a segment, or of a segment alone: 2^exponent (numerator, denominator). */
typedef struct {
    vi exponent;
    vf numerator, denominator;
} sums;

typedef struct {
    sums left, right;
} both_sides;

typedef struct {
    both_sides of;
    vi exponent; /* the largest n of e^k = m 2^n in the segment */
} segment_state;

#define NOTHING (-(1 << 28))

INLINE int64_t place_of(const bi_wkv_task *task, int64_t segment, int64_t block) {
    int64_t blocks = (task->end_channel - task->first_channel + LANES - 1) / LANES;
    return segment * blocks + block;
}

INLINE segment_state *state_of(const bi_wkv_task *task, int64_t segment, int64_t block) {
    return (segment_state *)task->state + place_of(task, segment, block);
}

INLINE both_sides *grads_of(const bi_wkv_task *task, int64_t segment, int64_t block) {
    return (both_sides *)task->grads + place_of(task, segment, block);
}

/* The last block overlaps the one before it where the channels are no multiple of LANES. */
INLINE int64_t channel_of(const bi_wkv_task *task, int64_t block) {
    int64_t channel = task->first_channel + block * LANES, last = task->end_channel - LANES;
    return channel < last ? channel : last;
}

#define FOR_BLOCKS(task, block, channel)                                                    \
    for (int64_t block = 0, channel;                                                        \
         block * LANES < task->end_channel - task->first_channel &&                         \
         (channel = channel_of(task, block), 1);                                            \
         block++)

/* LANES channels of a segment: where its first token is, bytes to the next token, and to the same
   token of the next segment. A copy, which stores to other memory cannot make a compiler reload. */
typedef struct {
    char *first;
    int64_t step, next;
} column;

INLINE column column_of(const rows *x, const bi_wkv_task *task, int64_t c, int64_t begin,
                        int dtype) {
    int64_t place = task->item * x->batch + begin * x->token + c, width = width_of(dtype);
    return (column){(char *)x->data + place * width, x->token * width,
                    x->token * width * task->length};
}

INLINE vf take(column of, int64_t i, int dtype) { return load(of.first + i * of.step, 0, dtype); }

INLINE void put(column of, int64_t i, vf x, int dtype) {
    store(of.first + i * of.step, 0, x, dtype);
}

/* As `take`, at the first touch of a segment: asks for the next one too, which the strided walk
   over the tokens hides from the processor's own prefetching. */
INLINE vf take_ahead(column of, int64_t i, int dtype) {
    __builtin_prefetch(of.first + i * of.step + of.next, 0, 2);
    return take(of, i, dtype);
}

/* e^k 2^-largest; `largest` is at least the exponent of every k it is called with. */
INLINE vf weight(vf k, vi largest) {
    vi n;
    vf m = split_exp(k, &n);
    return m * (vf)(larger_int(n - largest + 127, all_int(0)) << 23);
}

/* e^k waits where the results will be, so that it is computed once; in float32 only. Whether it
   does is a constant of the loops over the tokens, as the dtype is. */
#define FOR_PARKS(dtype, function, call, ...)                                      \
    do {                                                                           \
        if ((dtype) == FLOAT32 && (call)->parked.data) function(dtype, 1, call, __VA_ARGS__); \
        else function(dtype, 0, call, __VA_ARGS__);                                \
    } while (0)

/* e^k of a token on its segment's scale, after `summarise` has seen it. */
INLINE vf weight_again(column parked, column k, int64_t i, vi largest, int parks, int dtype) {
    return parks ? take_ahead(parked, i, dtype) : weight(take_ahead(k, i, dtype), largest);
}

/* --- forward ------------------------------------------------------------------------------- */

/* The sums of a segment so far, `power` being e^{-w} to the number of its tokens so far. */
typedef struct {
    sums left, right;
    vf power;
} summary;

INLINE summary no_summary(vi exponent) {
    sums none = {exponent, all(0), all(0)};
    return (summary){none, none, all(1)};
}

INLINE void add_token(summary *of, vf numerator, vf denominator, vf decay) {
    of->left.numerator = of->left.numerator * decay + numerator;
    of->left.denominator = of->left.denominator * decay + denominator;
    of->right.numerator += numerator * of->power;
    of->right.denominator += denominator * of->power;
    of->power *= decay;
}

INLINE void summarise(int dtype, int parks, const bi_wkv_call *call, const bi_wkv_task *task,
                      int64_t c, int64_t begin, int64_t end, segment_state *state) {
    column parked = column_of(&call->parked, task, c, begin, dtype);
    column k = column_of(&call->k, task, c, begin, dtype);
    column v = column_of(&call->v, task, c, begin, dtype);
    int64_t count = end - begin;
    vf top = take_ahead(k, 0, dtype);
    for (int64_t i = 1; i < count; i++) top = larger(top, take_ahead(k, i, dtype));
    vi largest;
    split_exp(top, &largest);

    vf decay = load_float(call->of.decay + c);
    summary sum = no_summary(largest);
    for (int64_t i = 0; i < count; i++) {
        vf e = weight(take(k, i, dtype), largest);
        if (parks) put(parked, i, e, dtype);
        add_token(&sum, e * take_ahead(v, i, dtype), e, decay);
    }
    *state = (segment_state){{sum.left, sum.right}, largest};
}

INLINE void all_summaries(int dtype, int parks, const bi_wkv_call *call,
                             const bi_wkv_task *task) {
    for (int64_t s = task->first_segment; s < task->end_segment; s++) {
        int64_t begin = s * task->length, end = begin + task->length;
        if (end > call->tokens) end = call->tokens;
        FOR_BLOCKS(task, block, c)
            summarise(dtype, parks, call, task, c, begin, end, state_of(task, s, block));
    }
}

INLINE void summaries_of(int dtype, const bi_wkv_call *call, const bi_wkv_task *task) {
    FOR_PARKS(dtype, all_summaries, call, task);
}

static void bi_wkv_summaries(const bi_wkv_call *call, const bi_wkv_task *task) {
    FOR_DTYPE(call->dtype, summaries_of, call, task);
}

/* Exchange a segment's own sums for what enters it, and carry both on to the next one. */
INLINE void enter(sums *carry, sums *own, vf m, vf low, vi n) {
    sums next = {larger_int(carry->exponent + n, own->exponent), all(0), all(0)};
    vf keep = power_of_two(carry->exponent + n - next.exponent);
    vf add = power_of_two(own->exponent - next.exponent);
    vf a = carry->numerator * keep, b = carry->denominator * keep;
    next.numerator = (a * low + a * m) + own->numerator * add;
    next.denominator = (b * low + b * m) + own->denominator * add;
    /* The larger of the two has the magnitude 1 to 2 from now on. */
    vi size = larger_int((vi)next.numerator & 0x7fffffff, (vi)next.denominator & 0x7fffffff);
    vi shift = (size >> 23) - 127;
    vf scale = power_of_two(-shift);
    next.numerator *= scale;
    next.denominator *= scale;
    next.exponent += shift;
    *own = *carry;
    *carry = next;
}

/* From the sums of every segment to what enters it: `first` are those of the first one and of the
   first LANES channels, `size` bytes before the next ones. */
INLINE void carry_on(const bi_wkv_call *call, const bi_wkv_task *task, void *first,
                     int64_t size) {
    FOR_BLOCKS(task, block, c) {
        vf m = load_float(call->of.stride_m + c), low = load_float(call->of.stride_low + c);
        vi n = load_int(call->of.stride_n + c);
        char *start = (char *)first + block * size;
        int64_t step = place_of(task, 1, 0) * size;
        sums carry = {all_int(NOTHING), all(0), all(0)};
        for (int64_t s = 0; s < task->segments; s++)
            enter(&carry, &((both_sides *)(start + s * step))->left, m, low, n);
        carry = (sums){all_int(NOTHING), all(0), all(0)};
        for (int64_t s = task->segments - 1; s >= 0; s--)
            enter(&carry, &((both_sides *)(start + s * step))->right, m, low, n);
    }
}

static void bi_wkv_carry(const bi_wkv_call *call, const bi_wkv_task *task) {
    carry_on(call, task, &state_of(task, 0, 0)->of, sizeof(segment_state));
}

/* What enters a segment, made ready for its tokens, which are times 2^own. The sums from the left
   and from the right keep a scale each: with w < 0 one of them can be e^100 times the other, and
   yet the smaller one meets gradients that are as much larger. */
typedef struct {
    vi left_exponent, right_exponent, exponent; /* the last one is that of a token's total */
    vf left_numerator, left_denominator, right_numerator, right_denominator;
    vf token_left, token_right;                 /* brings a token to the scale of either side */
    vf from_left, from_right, bonus;            /* bring both sides and a token to the total's */
} entry;

INLINE entry enter_segment(const bi_wkv_call *call, int64_t c, vi own, const both_sides *of) {
    const sums *left = &of->left, *right = &of->right;
    vi bonus = load_int(call->of.bonus_n + c);
    entry in;
    in.left_exponent = larger_int(left->exponent, own);
    in.right_exponent = larger_int(right->exponent, own);
    in.exponent = larger_int(larger_int(in.left_exponent, in.right_exponent),
                             own + larger_int(bonus, all_int(0)));
    vf scale = power_of_two(left->exponent - in.left_exponent);
    in.left_numerator = left->numerator * scale;
    in.left_denominator = left->denominator * scale;
    scale = power_of_two(right->exponent - in.right_exponent);
    in.right_numerator = right->numerator * scale;
    in.right_denominator = right->denominator * scale;
    in.token_left = power_of_two(own - in.left_exponent);
    in.token_right = power_of_two(own - in.right_exponent);
    in.from_left = power_of_two(in.left_exponent - in.exponent);
    in.from_right = power_of_two(in.right_exponent - in.exponent);
    in.bonus = load_float(call->of.bonus_m + c) * power_of_two(own + bonus - in.exponent);
    return in;
}

INLINE void output_segment(int dtype, int parks, const bi_wkv_call *call,
                           const bi_wkv_task *task, int64_t c, int64_t begin, int64_t end,
                           const segment_state *state) {
    vf e[MOST_TOKENS], ev[MOST_TOKENS], after_numerator[MOST_TOKENS],
        after_denominator[MOST_TOKENS];
    column k = column_of(&call->k, task, c, begin, dtype);
    column v = column_of(&call->v, task, c, begin, dtype);
    column y = column_of(&call->y, task, c, begin, dtype);
    int64_t count = end - begin;
    vf decay = load_float(call->of.decay + c);
    entry in = enter_segment(call, c, state->exponent, &state->of);
    /* A segment of one token, which is where u may be large, meets no other token inside: it is
       weighed on its own scale, others on that of all that enters. */
    int alone = task->length == 1;
    vf token = alone ? all(1) : power_of_two(state->exponent - in.exponent);
    vf bonus = alone ? in.bonus
                     : load_float(call->of.bonus_m + c) *
                           power_of_two(load_int(call->of.bonus_n + c));
    vf numerator = in.right_numerator * in.from_right;
    vf denominator = in.right_denominator * in.from_right;
    for (int64_t i = count - 1; i >= 0; i--) {
        vf own = weight_again(y, k, i, state->exponent, parks, dtype) * token;
        e[i] = own;
        vf x = ev[i] = own * take_ahead(v, i, dtype);
        after_numerator[i] = numerator + x * bonus;
        after_denominator[i] = denominator + own * bonus;
        numerator = numerator * decay + x;
        denominator = denominator * decay + own;
    }
    numerator = in.left_numerator * in.from_left;
    denominator = in.left_denominator * in.from_left;
    for (int64_t i = 0; i < count; i++) {
        put(y, i, (numerator + after_numerator[i]) / (denominator + after_denominator[i]), dtype);
        numerator = numerator * decay + ev[i];
        denominator = denominator * decay + e[i];
    }
}

INLINE void all_outputs(int dtype, int parks, const bi_wkv_call *call,
                           const bi_wkv_task *task) {
    for (int64_t s = task->first_segment; s < task->end_segment; s++) {
        int64_t begin = s * task->length, end = begin + task->length;
        if (end > call->tokens) end = call->tokens;
        FOR_BLOCKS(task, block, c)
            output_segment(dtype, parks, call, task, c, begin, end, state_of(task, s, block));
    }
}

INLINE void outputs_of(int dtype, const bi_wkv_call *call, const bi_wkv_task *task) {
    FOR_PARKS(dtype, all_outputs, call, task);
}

static void bi_wkv_outputs(const bi_wkv_call *call, const bi_wkv_task *task) {
    FOR_DTYPE(call->dtype, outputs_of, call, task);
}

/* --- backward ------------------------------------------------------------------------------ */

/* What the backward pass needs of every token of a segment: e^k, v, the sums over the tokens after
   it, gradients of numerator and denominator times 2^-entry.exponent. */
typedef struct {
    vf e[MOST_TOKENS], v[MOST_TOKENS];
    vf after_numerator[MOST_TOKENS], after_denominator[MOST_TOKENS];
    vf grad_numerator[MOST_TOKENS], grad_denominator[MOST_TOKENS];
} segment_tokens;

/* Fill in everything from k, v and gy. */
INLINE entry recompute(int dtype, const bi_wkv_call *call, const bi_wkv_task *task, int64_t c,
                       int64_t begin, int64_t end, const segment_state *state,
                       segment_tokens *of) {
    column k = column_of(&call->k, task, c, begin, dtype);
    column v = column_of(&call->v, task, c, begin, dtype);
    column gy = column_of(&call->gy, task, c, begin, dtype);
    int64_t count = end - begin;
    vf decay = load_float(call->of.decay + c);
    entry in = enter_segment(call, c, state->exponent, &state->of);
    vf numerator = in.right_numerator, denominator = in.right_denominator;
    for (int64_t i = count - 1; i >= 0; i--) {
        vf e = weight(take_ahead(k, i, dtype), state->exponent);
        vf ev = e * (of->v[i] = take_ahead(v, i, dtype));
        of->e[i] = e;
        of->after_numerator[i] = numerator;
        of->after_denominator[i] = denominator;
        numerator = numerator * decay + ev * in.token_right;
        denominator = denominator * decay + e * in.token_right;
    }
    numerator = in.left_numerator, denominator = in.left_denominator;
    for (int64_t i = 0; i < count; i++) {
        vf e = of->e[i], ev = e * of->v[i];
        vf inverse = 1 / (denominator * in.from_left + of->after_denominator[i] * in.from_right +
                          e * in.bonus);
        vf y = (numerator * in.from_left + of->after_numerator[i] * in.from_right +
                ev * in.bonus) * inverse;
        vf g = take_ahead(gy, i, dtype) * inverse;
        of->grad_numerator[i] = g;
        of->grad_denominator[i] = -g * y;
        numerator = numerator * decay + ev * in.token_left;
        denominator = denominator * decay + e * in.token_left;
    }
    return in;
}

/* The sums of the gradients of numerator and denominator; the former are parked in gv, and e^k
   where gk will be. */
INLINE summary park_grads(int dtype, const bi_wkv_call *call, const bi_wkv_task *task, int64_t c,
                          int64_t begin, int64_t end, const segment_state *state) {
    column k = column_of(&call->k, task, c, begin, dtype);
    column parked = column_of(&call->parked, task, c, begin, dtype);
    column y = column_of(&call->y, task, c, begin, dtype);
    column gy = column_of(&call->gy, task, c, begin, dtype);
    column gv = column_of(&call->gv, task, c, begin, dtype);
    int64_t count = end - begin;
    vf decay = load_float(call->of.decay + c);
    entry in = enter_segment(call, c, state->exponent, &state->of);
    vf e[MOST_TOKENS], after[MOST_TOKENS];
    vf token = power_of_two(state->exponent - in.exponent);
    vf denominator = in.right_denominator * in.from_right;
    for (int64_t i = count - 1; i >= 0; i--) {
        e[i] = weight(take_ahead(k, i, dtype), state->exponent);
        put(parked, i, e[i], dtype);
        after[i] = denominator + e[i] * in.bonus;
        denominator = denominator * decay + e[i] * token;
    }
    denominator = in.left_denominator * in.from_left;
    summary sum = no_summary(-in.exponent);
    for (int64_t i = 0; i < count; i++) {
        vf g = take_ahead(gy, i, dtype) / (denominator + after[i]);
        put(gv, i, g, dtype);
        add_token(&sum, g, -g * take_ahead(y, i, dtype), decay);
        denominator = denominator * decay + e[i] * token;
    }
    return sum;
}

/* The same where nothing is parked. */
INLINE summary summarise_recomputed(int dtype, const bi_wkv_call *call, const bi_wkv_task *task,
                                    int64_t c, int64_t begin, int64_t end,
                                    const segment_state *state) {
    segment_tokens of;
    entry in = recompute(dtype, call, task, c, begin, end, state, &of);
    vf decay = load_float(call->of.decay + c);
    summary sum = no_summary(-in.exponent);
    for (int64_t i = 0; i < end - begin; i++)
        add_token(&sum, of.grad_numerator[i], of.grad_denominator[i], decay);
    return sum;
}

INLINE void summarise_grads(int dtype, int parks, const bi_wkv_call *call,
                            const bi_wkv_task *task, int64_t c, int64_t begin, int64_t end,
                            const segment_state *state, both_sides *grads) {
    summary sum = parks
                      ? park_grads(dtype, call, task, c, begin, end, state)
                      : summarise_recomputed(dtype, call, task, c, begin, end, state);
    *grads = (both_sides){sum.left, sum.right};
}

INLINE void all_grad_summaries(int dtype, int parks, const bi_wkv_call *call,
                                  const bi_wkv_task *task) {
    for (int64_t s = task->first_segment; s < task->end_segment; s++) {
        int64_t begin = s * task->length, end = begin + task->length;
        if (end > call->tokens) end = call->tokens;
        FOR_BLOCKS(task, block, c)
            summarise_grads(dtype, parks, call, task, c, begin, end, state_of(task, s, block),
                            grads_of(task, s, block));
    }
}

INLINE void grad_summaries_of(int dtype, const bi_wkv_call *call, const bi_wkv_task *task) {
    FOR_PARKS(dtype, all_grad_summaries, call, task);
}

static void bi_wkv_grad_summaries(const bi_wkv_call *call, const bi_wkv_task *task) {
    FOR_DTYPE(call->dtype, grad_summaries_of, call, task);
}

static void bi_wkv_grad_carry(const bi_wkv_call *call, const bi_wkv_task *task) {
    carry_on(call, task, grads_of(task, 0, 0), sizeof(both_sides));
}

/* Add factor 2^n sum to LANES doubles. */
INLINE void accumulate(double *total, vf sum, vf factor, vi n) {
    for (int lane = 0; lane < LANES; lane++) {
        int64_t power = n[lane] < -1022 ? -1023 : n[lane] > 1023 ? 1023 : n[lane];
        union { int64_t bits; double value; } scale = {(power + 1023) << 52};
        total[lane] += (double)sum[lane] * factor[lane] * scale.value;
    }
}

/* What the second half of the backward pass needs of a token. */
typedef struct {
    vf e, v, grad_numerator, grad_denominator;
} token_grads;

INLINE token_grads token_of(const segment_tokens *of, int64_t i) {
    return (token_grads){of->e[i], of->v[i], of->grad_numerator[i], of->grad_denominator[i]};
}

/* `gv` holds what `park_grads` left there. `ahead`: the first touch of the segment. */
INLINE token_grads parked_token(column parked, column v, column gv, column y, int64_t i, int dtype,
                                int ahead) {
    token_grads t;
    t.e = ahead ? take_ahead(parked, i, dtype) : take(parked, i, dtype);
    t.v = ahead ? take_ahead(v, i, dtype) : take(v, i, dtype);
    t.grad_numerator = ahead ? take_ahead(gv, i, dtype) : take(gv, i, dtype);
    t.grad_denominator =
        -t.grad_numerator * (ahead ? take_ahead(y, i, dtype) : take(y, i, dtype));
    return t;
}

INLINE void grad_segment(int dtype, int parks, const bi_wkv_call *call, const bi_wkv_task *task,
                         int64_t c, int64_t begin, int64_t end, const segment_state *state,
                         const both_sides *entering, double *gw, double *gu) {
    segment_tokens of;
    column parked = column_of(&call->parked, task, c, begin, dtype);
    column v = column_of(&call->v, task, c, begin, dtype);
    column y = column_of(&call->y, task, c, begin, dtype);
    column gk = column_of(&call->gk, task, c, begin, dtype);
    column gv = column_of(&call->gv, task, c, begin, dtype);
    int64_t count = end - begin;
    vf decay = load_float(call->of.decay + c);
    entry in = parks ? enter_segment(call, c, state->exponent, &state->of)
                     : recompute(dtype, call, task, c, begin, end, state, &of);
    entry grad = enter_segment(call, c, -in.exponent, entering);

    vf after_n[MOST_TOKENS], after_d[MOST_TOKENS];
    vf grad_after_n[MOST_TOKENS], grad_after_d[MOST_TOKENS];
    vf n = in.right_numerator, d = in.right_denominator;
    vf grad_n = grad.right_numerator, grad_d = grad.right_denominator;
    for (int64_t i = count - 1; i >= 0; i--) {
        token_grads t = parks ? parked_token(parked, v, gv, y, i, dtype, 1) : token_of(&of, i);
        after_n[i] = n;
        after_d[i] = d;
        grad_after_n[i] = grad_n;
        grad_after_d[i] = grad_d;
        vf x = t.e * in.token_right;
        n = n * decay + x * t.v;
        d = d * decay + x;
        grad_n = grad_n * decay + t.grad_numerator * grad.token_right;
        grad_d = grad_d * decay + t.grad_denominator * grad.token_right;
    }

    /* e^k = e 2^exponent of the segment. */
    vf scale = power_of_two(state->exponent + grad.exponent);
    vf bonuses = all(0), left_decays = all(0), right_decays = all(0);
    n = in.left_numerator, d = in.left_denominator;
    grad_n = grad.left_numerator, grad_d = grad.left_denominator;
    for (int64_t i = 0; i < count; i++) {
        /* Read again: a copy of the segment would not fit into the nearest cache. */
        token_grads t = parks ? parked_token(parked, v, gv, y, i, dtype, 0) : token_of(&of, i);
        vf gn = t.grad_numerator, gd = t.grad_denominator, e = t.e;
        vf total_n = grad_n * grad.from_left + grad_after_n[i] * grad.from_right + gn * grad.bonus;
        vf total_d = grad_d * grad.from_left + grad_after_d[i] * grad.from_right + gd * grad.bonus;
        vf weight = e * scale;
        put(gv, i, total_n * weight, dtype);
        put(gk, i, (total_d + total_n * t.v) * weight, dtype);
        left_decays += n * grad_after_n[i] + d * grad_after_d[i];
        right_decays += after_n[i] * grad_n + after_d[i] * grad_d;
        bonuses += e * (t.v * gn + gd);
        vf x = e * in.token_left;
        n = n * decay + x * t.v;
        d = d * decay + x;
        grad_n = grad_n * decay + gn * grad.token_left;
        grad_d = grad_d * decay + gd * grad.token_left;
    }
    vf step = -load_float(call->of.step_m + c);
    vi step_n = load_int(call->of.step_n + c);
    accumulate(gw, left_decays, step, in.left_exponent + grad.right_exponent + step_n);
    accumulate(gw, right_decays, step, in.right_exponent + grad.left_exponent + step_n);
    accumulate(gu, bonuses, in.bonus, all_int(0));
}

INLINE void all_grads(int dtype, int parks, const bi_wkv_call *call,
                         const bi_wkv_task *task) {
    int64_t place = (task->part * call->batch + task->item) * call->channels;
    double gw[2 * TASK_CHANNELS] = {0}, gu[2 * TASK_CHANNELS] = {0};
    for (int64_t s = task->first_segment; s < task->end_segment; s++) {
        int64_t begin = s * task->length, end = begin + task->length;
        if (end > call->tokens) end = call->tokens;
        FOR_BLOCKS(task, block, c)
            grad_segment(dtype, parks, call, task, c, begin, end, state_of(task, s, block),
                         grads_of(task, s, block), gw + block * LANES, gu + block * LANES);
    }
    FOR_BLOCKS(task, block, c) {
        memcpy(call->gw + place + c, gw + block * LANES, LANES * sizeof(double));
        memcpy(call->gu + place + c, gu + block * LANES, LANES * sizeof(double));
    }
}

INLINE void grads_by(int dtype, const bi_wkv_call *call, const bi_wkv_task *task) {
    FOR_PARKS(dtype, all_grads, call, task);
}

static void bi_wkv_grads(const bi_wkv_call *call, const bi_wkv_task *task) {
    FOR_DTYPE(call->dtype, grads_by, call, task);
}

/* A segment: the tokens of one channel that one thread holds in registers, and its sweeps.

   A sweep is written once for two forms. `Plain` gives all sums of the segment one exponent, so a
   step is two multiply-adds; |w| times the length, and |u|, must be moderate. `Scaled` gives every
   sum its own exponent and serves all other w and u. */
#ifndef VISION_BI_WKV_SEGMENT_H
#define VISION_BI_WKV_SEGMENT_H

#include "sums.h"

constexpr int LENGTH = 8;
/* |w| times the length, and |u|, up to which Plain stays far from the ends of a float. */
constexpr float MOST_PLAIN = 20.0f;
/* Decays beyond it differ from it only where keys lie further apart than it. */
constexpr float MOST_DECAY = 2000.0f;

struct Tokens {
    float w, u;
    bool plain;
    int exponent;                     /* plain: the largest of the keys' */
    float key[LENGTH], value[LENGTH]; /* plain: e^k 2^-exponent; else k. A missing token: 0 or -inf */
};

DEVICE void weigh_keys(Tokens &x) {
    float largest = x.key[0];
    for (int i = 1; i < LENGTH; i++) largest = fmaxf(largest, x.key[i]);
    bool any = largest > -INFINITY;
    float whole = any ? whole_exponent(largest) : (float)NOTHING;
    x.exponent = any ? __float2int_rn(whole) : NOTHING;
    for (int i = 0; i < LENGTH; i++) x.key[i] = exp2_fast(binary_exponent(x.key[i], whole));
}

/* Compute the tokens anew from here on: kept from one sweep to the next they fill the registers. */
DEVICE void forget(Tokens &x) {
#pragma unroll
    for (int i = 0; i < LENGTH; i++) {
        opaque(x.key[i]);
        opaque(x.value[i]);
    }
}

struct Plain {
    using Total = Pair;
    float decay, bonus;
    int exponent; /* of the sums */
    float token;  /* takes a token to their exponent */

    DEVICE Plain(const Tokens &x, int exponent)
        : decay(expf(-x.w)), bonus(expf(x.u)), exponent(exponent),
          token(power_of_two(x.exponent - exponent)) {}

    DEVICE static Pair nothing() { return {0, 0}; }
    DEVICE Pair at(const Tokens &x, int i) const {
        float e = x.key[i] * token;
        return {e * x.value[i], e};
    }
    DEVICE Pair enter(Sum s) const { return Pair{s.a, s.b} * power_of_two(s.n - exponent); }
    DEVICE Sum leave(Pair p) const { return {p.a, p.b, exponent}; }
};

struct Scaled {
    using Total = Sum;
    Factor decay, bonus;

    DEVICE explicit Scaled(const Tokens &x)
        : decay(exact_exp(-(double)x.w)), bonus(exact_exp(clamp(x.u, MOST_KEY))) {}

    DEVICE static Sum nothing() { return {0, 0, NOTHING}; }
    DEVICE Sum at(const Tokens &x, int i) const {
        float k = x.key[i], whole = whole_exponent(k);
        if (k == -INFINITY) return nothing();
        float m = exp2_fast(binary_exponent(k, whole));
        return {m * x.value[i], m, __float2int_rn(whole)};
    }
    DEVICE Sum enter(Sum s) const { return s; }
    DEVICE Sum leave(Sum s) const { return s; }
};

/* The sums of a segment alone, as its right and as its left neighbour see them. */
template <class Form>
DEVICE void summarise(const Form &form, Tokens &x, Sum &left, Sum &right) {
    typename Form::Total before = form.nothing(), after = before;
#pragma unroll
    for (int i = 0; i < LENGTH; i++) before = before * form.decay + form.at(x, i);
    forget(x);
#pragma unroll
    for (int i = LENGTH - 1; i >= 0; i--) after = after * form.decay + form.at(x, i);
    forget(x);
    left = normalised(form.leave(before));
    right = normalised(form.leave(after));
}

DEVICE void summarise(Tokens &x, Sum &left, Sum &right) {
    if (x.plain)
        summarise(Plain(x, x.exponent), x, left, right);
    else
        summarise(Scaled(x), x, left, right);
}

template <class Form>
DEVICE void outputs(const Form &form, Tokens &x, Sum left, Sum right, float (&y)[LENGTH]) {
    typename Form::Total rest[LENGTH], before = form.enter(left), after = form.enter(right);
#pragma unroll
    for (int i = LENGTH - 1; i >= 0; i--) {
        rest[i] = after + form.at(x, i) * form.bonus;
        after = after * form.decay + form.at(x, i);
    }
    forget(x);
#pragma unroll
    for (int i = 0; i < LENGTH; i++) {
        auto total = before + rest[i];
        y[i] = total.a * reciprocal(total.b);
        before = before * form.decay + form.at(x, i);
    }
}

/* y from the sums that enter on either side. */
DEVICE void outputs(Tokens &x, Sum left, Sum right, float (&y)[LENGTH]) {
    if (x.plain)
        outputs(Plain(x, max(max(left.n, right.n), x.exponent)), x, left, right, y);
    else
        outputs(Scaled(x), x, left, right, y);
}

/* --- backward ------------------------------------------------------------------------------ */

/* What the second half of a segment's backward pass needs of the first. With P, S the sums before
   and after a token, L, R those of the gradients g, the gradient of w is -d Σ (P R + S L). The
   part of P that meets gradients of the same segment is summed up at once, as Σ g lag with
   lag[t+1] = d (lag[t] + P[t]); what meets R entering from the right is the last lag. */
struct Gradients {
    Pair g[LENGTH];  /* before: the sums after each token */
    int exponent;    /* plain: of 1 / g */
    int *exponents;  /* else: of every g, `stride` apart; no register is left for them */
    int stride;
    Sum lag_left, lag_right;
    float gw, gu;
};

/* Brings sums of two forms to the exponent of their total. */
struct PlainMeeting {
    int exponent;
    float of_left, of_right;
    DEVICE PlainMeeting(const Plain &left, const Plain &right)
        : exponent(max(left.exponent, right.exponent)),
          of_left(power_of_two(left.exponent - exponent)),
          of_right(power_of_two(right.exponent - exponent)) {}
    DEVICE Pair left(Pair p) const { return p * of_left; }
    DEVICE Pair right(Pair p) const { return p * of_right; }
    DEVICE void keep(Gradients &of, int i, Pair g) const { of.g[i] = g; }
    DEVICE Pair kept(const Gradients &of, int i) const { return of.g[i]; }
    DEVICE Sum leave(Pair g) const { return {g.a, g.b, -exponent}; }
};

struct ScaledMeeting {
    static constexpr int exponent = 0;
    static constexpr float of_left = 1, of_right = 1;
    DEVICE Sum left(Sum s) const { return s; }
    DEVICE Sum right(Sum s) const { return s; }
    DEVICE void keep(Gradients &of, int i, Sum g) const {
        of.g[i] = {g.a, g.b};
        of.exponents[i * of.stride] = g.n;
    }
    DEVICE Sum kept(const Gradients &of, int i) const {
        return {of.g[i].a, of.g[i].b, of.exponents[i * of.stride]};
    }
    DEVICE Sum leave(Sum g) const { return g; }
};

/* P and S keep exponents of their own: what is nothing beside the other one here may be all that
   a token far away sees. */
template <class Form, class Meeting>
DEVICE void differentiate(const Form &on_left, const Form &on_right, const Meeting &meeting,
                          Tokens &x, Sum &left, Sum &right, const float (&gy)[LENGTH],
                          Gradients &of) {
    using Total = typename Form::Total;
    Total after = on_right.enter(right);
#pragma unroll
    for (int i = LENGTH - 1; i >= 0; i--) {
        meeting.keep(of, i, meeting.right(after));
        after = after * on_right.decay + on_right.at(x, i);
    }
    forget(x);
    Total before = on_left.enter(left), lag = on_left.nothing(), sum = on_left.nothing();
    float gw = 0, gu = 0;
#pragma unroll
    for (int i = 0; i < LENGTH; i++) {
        Total token = on_left.at(x, i), self = token * on_left.bonus;
        Total g = gradient(meeting.left(before + self) + meeting.kept(of, i), gy[i]);
        meeting.keep(of, i, g);
        gu += dot(self, g);
        gw -= dot(lag, g);
        before = before * on_left.decay;
        lag = lag * on_left.decay + before;
        before = before + token;
        sum = sum * on_left.decay + g;
    }
    of.lag_left = on_left.leave(lag);
    left = normalised(meeting.leave(sum));
    of.gu = gu * meeting.of_left;
    of.gw = gw * meeting.of_left;
    forget(x);

    after = on_right.enter(right), lag = on_right.nothing(), sum = on_right.nothing(), gw = 0;
#pragma unroll
    for (int i = LENGTH - 1; i >= 0; i--) {
        Total g = meeting.kept(of, i);
        gw -= dot(lag, g);
        after = after * on_right.decay;
        lag = lag * on_right.decay + after;
        after = after + on_right.at(x, i);
        sum = sum * on_right.decay + g;
    }
    of.lag_right = on_right.leave(lag);
    right = normalised(meeting.leave(sum));
    of.gw += gw * meeting.of_right;
    forget(x);
    of.exponent = meeting.exponent;
}

/* Exchange the sums that enter on either side for those of this segment's g alone. */
DEVICE void differentiate(Tokens &x, Sum &left, Sum &right, const float (&gy)[LENGTH],
                          Gradients &of) {
    if (x.plain) {
        Plain on_left(x, max(left.n, x.exponent)), on_right(x, max(right.n, x.exponent));
        PlainMeeting meeting(on_left, on_right);
        differentiate(on_left, on_right, meeting, x, left, right, gy, of);
    } else {
        Scaled form(x);
        differentiate(form, form, ScaledMeeting(), x, left, right, gy, of);
    }
}

/* Sums of gradients on one exponent, and what makes gradients of keys and values of them. */
struct PlainGradients : Plain {
    float of_g, of_token;
    DEVICE PlainGradients(const Tokens &x, const Gradients &of, int exponent)
        : Plain(x, exponent), of_g(power_of_two(-of.exponent - exponent)),
          of_token(power_of_two(x.exponent + exponent)) {}
    DEVICE Pair g(const Gradients &of, int i) const { return of.g[i] * of_g; }
    DEVICE Pair part(const Tokens &, int, Pair total) const { return total; }
    DEVICE Pair whole(const Tokens &x, int i, Pair part, Pair rest) const {
        Pair total = part + rest;
        float e = x.key[i] * of_token, gv = e * total.a;
        return {fmaf(x.value[i], gv, e * total.b), gv};
    }
};

struct ScaledGradients : Scaled {
    DEVICE explicit ScaledGradients(const Tokens &x) : Scaled(x) {}
    DEVICE Sum g(const Gradients &of, int i) const { return ScaledMeeting().kept(of, i); }
    DEVICE Pair part(const Tokens &x, int i, Sum total) const {
        Sum token = at(x, i);
        float scale = token.b * power_of_two(token.n + total.n), gv = total.a * scale;
        return {fmaf(x.value[i], gv, total.b * scale), gv};
    }
    DEVICE Pair whole(const Tokens &x, int i, Pair part, Sum rest) const {
        return part + this->part(x, i, rest);
    }
};

template <class Form>
DEVICE void input_gradients(const Form &form, Tokens &x, Sum left, Sum right,
                            const Gradients &of, float (&gk)[LENGTH], float (&gv)[LENGTH]) {
    typename Form::Total before = form.enter(left), after = form.enter(right);
    Pair part[LENGTH];
#pragma unroll
    for (int i = 0; i < LENGTH; i++) {
        auto g = form.g(of, i);
        part[i] = form.part(x, i, before + g * form.bonus);
        before = before * form.decay + g;
    }
    forget(x);
#pragma unroll
    for (int i = LENGTH - 1; i >= 0; i--) {
        Pair grad = form.whole(x, i, part[i], after);
        gk[i] = grad.a;
        gv[i] = grad.b;
        after = after * form.decay + form.g(of, i);
    }
}

/* Gradients of keys and values from the sums of g that enter on either side; the rest of gw. */
DEVICE void input_gradients(Tokens &x, Sum left, Sum right, Gradients &of, float (&gk)[LENGTH],
                            float (&gv)[LENGTH]) {
    of.gw -= dot(of.lag_left, right) + dot(of.lag_right, left);
    if (x.plain) {
        PlainGradients form(x, of, max(max(left.n, right.n), -of.exponent));
        input_gradients(form, x, left, right, of, gk, gv);
    } else {
        input_gradients(ScaledGradients(x), x, left, right, of, gk, gv);
    }
}

#endif

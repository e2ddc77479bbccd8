/* Sums of a Bi-WKV channel: (numerator, denominator) pairs whose exponents never overflow.

   Two kinds of numbers share their operators, so that every sweep over tokens is written once:
     Pair  two floats; the exponent they are to be read with is common to a segment
     Sum   two floats times 2^n with an integer n of its own */
#ifndef VISION_BI_WKV_SUMS_H
#define VISION_BI_WKV_SUMS_H

#define DEVICE __device__ __forceinline__

/* Exponent of an empty sum. */
constexpr int NOTHING = -(1 << 30);
/* Beyond it neighbouring floats lie further apart than 1, and exponents would not be exact. */
constexpr float MOST_KEY = 1e7f;

struct Pair {
    float a, b;
};

struct Sum {
    float a, b;
    int n;
};

/* e^x = (m + low) 2^n. */
struct Factor {
    float m, low;
    int n;
};

/* A NaN stays. */
DEVICE float clamp(float x, float most) { return x < -most ? -most : x > most ? most : x; }

/* 2^n, 0 below the smallest normal number, 2^127 above the largest. */
DEVICE float power_of_two(int n) {
    int biased = n + 127;
    return __int_as_float((biased < 0 ? 0 : biased > 254 ? 254 : biased) << 23);
}

/* k log2(e) - whole, to the last bit of the difference. */
DEVICE float binary_exponent(float k, float whole) {
    return fmaf(k, 1.92596303e-8f, fmaf(k, 1.44269502f, -whole));
}

/* The integer nearest to k log2(e). */
DEVICE float whole_exponent(float k) { return rintf(clamp(k, MOST_KEY) * 1.44269502f); }

/* e^x to 2^-40 for any |x| up to 10^9. */
DEVICE Factor exact_exp(double x) {
    double whole = rint(x * 1.4426950408889634), r = fma(whole, -0.69314718055994531, x);
    double p = 1.0 / 3628800;
    p = fma(p, r, 1.0 / 362880);
    p = fma(p, r, 1.0 / 40320);
    p = fma(p, r, 1.0 / 5040);
    p = fma(p, r, 1.0 / 720);
    p = fma(p, r, 1.0 / 120);
    p = fma(p, r, 1.0 / 24);
    p = fma(p, r, 1.0 / 6);
    p = fma(p, r, 0.5);
    p = fma(p, r, 1.0);
    p = fma(p, r, 1.0);
    float m = (float)p;
    return {m, (float)(p - m), __double2int_rn(whole)};
}

DEVICE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
DEVICE Pair operator*(Pair x, float factor) { return {x.a * factor, x.b * factor}; }
DEVICE float dot(Pair x, Pair y) { return fmaf(x.a, y.a, x.b * y.b); }

DEVICE Sum operator+(Sum x, Sum y) {
    int n = max(x.n, y.n);
    float of_x = power_of_two(x.n - n), of_y = power_of_two(y.n - n);
    return {fmaf(x.a, of_x, y.a * of_y), fmaf(x.b, of_x, y.b * of_y), n};
}

DEVICE Sum operator*(Sum x, Factor f) {
    return {fmaf(x.a, f.m, x.a * f.low), fmaf(x.b, f.m, x.b * f.low), x.n + f.n};
}

DEVICE float dot(Sum x, Sum y) {
    return fmaf(x.a, y.a, x.b * y.b) * power_of_two(x.n + y.n);
}

/* (gy, -gy y) / denominator for the total (numerator, denominator) of a token. */
DEVICE Pair gradient(Pair total, float gy) {
    float inverse = reciprocal(total.b), g = gy * inverse;
    return {g, -g * (total.a * inverse)};
}

DEVICE Sum gradient(Sum total, float gy) {
    Pair g = gradient(Pair{total.a, total.b}, gy);
    return {g.a, g.b, -total.n};
}

/* The same sum with the larger of its two floats between 1 and 2. */
DEVICE Sum normalised(Sum x) {
    int shift = (__float_as_int(fmaxf(fabsf(x.a), fabsf(x.b))) >> 23) - 127;
    float scale = power_of_two(-shift);
    return {x.a * scale, x.b * scale, x.n + shift};
}

#endif

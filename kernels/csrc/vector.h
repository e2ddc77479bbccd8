/* Vectors of LANES floats for the instruction set of the including file (GNU C vector types).

   The includer defines LANES and, for x86 intrinsics where they beat what a compiler makes of
   plain operators, AVX2 or AVX512. */
#include <stdint.h>
#include <string.h>
#if defined(AVX2) || defined(AVX512)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef float vf_loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi_loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh_loose __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* Not 0 + x, which is no copy of -0 and so would be computed. */
INLINE vf all(float x) { return x - (vf){0}; }
INLINE vi all_int(int32_t x) { return (vi){0} + x; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE vi pick_int(vi mask, vi yes, vi no) { return (yes & mask) | (no & ~mask); }

/* A NaN in b stays. */
INLINE vf larger(vf a, vf b) {
#if defined(AVX512)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(AVX2)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

INLINE vf smaller(vf a, vf b) {
#if defined(AVX512)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(AVX2)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return pick(a < b, a, b);
#endif
}

INLINE vi larger_int(vi a, vi b) {
#if defined(AVX512)
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(AVX2)
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return pick_int(a > b, a, b);
#endif
}

INLINE vf load_float(const float *p) { return *(const vf_loose *)p; }
INLINE void store_float(float *p, vf x) { *(vf_loose *)p = x; }
INLINE vi load_int(const int32_t *p) { return *(const vi_loose *)p; }
INLINE void store_int(int32_t *p, vi x) { *(vi_loose *)p = x; }

INLINE vi widen(const uint16_t *p) { return __builtin_convertvector(*(const vh_loose *)p, vi); }
INLINE void narrow(uint16_t *p, vi x) { *(vh_loose *)p = __builtin_convertvector(x, vh); }

INLINE vf load_bfloat16(const uint16_t *p) { return (vf)(widen(p) << 16); }

INLINE void store_bfloat16(uint16_t *p, vf x) {
    vi bits = (vi)x;
    vi rounded = bits + 0x7fff + ((bits >> 16) & 1); /* to nearest, ties to even */
    rounded = pick_int(x == x, rounded, all_int(0x7fc00000));
    narrow(p, (rounded >> 16) & 0xffff);
}

INLINE vf load_float16(const uint16_t *p) {
#if defined(AVX512)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(AVX2)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    /* The exponent's bias differs by 112; a multiplication also makes subnormal numbers whole. */
    vi bits = widen(p);
    vi magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    vi finite = (vi)((vf)magnitude * 0x1p112f);
    return (vf)(sign | pick_int(magnitude >= 0x0f800000, magnitude | 0x7f800000, finite));
#endif
}

INLINE void store_float16(uint16_t *p, vf x) {
#if defined(AVX512)
    _mm256_storeu_si256((__m256i *)p,
                        _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(AVX2)
    _mm_storeu_si128((__m128i *)p,
                     _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    vi sign = ((vi)x >> 16) & 0x8000, magnitude = (vi)x & 0x7fffffff;
    vi normal = magnitude - (112 << 23);
    normal = (normal + 0xfff + ((normal >> 13) & 1)) >> 13;
    /* Adding 1/2 leaves the multiples of 2^-24 in the low bits, rounded. */
    vi tiny = (vi)((vf)magnitude + 0.5f) - 0x3f000000;
    vi half = pick_int(magnitude < 0x38800000, tiny, normal);
    half = pick_int(magnitude >= 0x477ff000, all_int(0x7c00), half);
    half = pick_int(magnitude > 0x7f800000, all_int(0x7e00), half);
    narrow(p, sign | half);
#endif
}

INLINE int64_t width_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE const void *at(const void *p, int64_t i, int dtype) {
    return (const char *)p + i * width_of(dtype);
}

/* `dtype` is a constant wherever this is inlined. */
INLINE vf load(const void *p, int64_t i, int dtype) {
    if (dtype == BFLOAT16) return load_bfloat16((const uint16_t *)p + i);
    if (dtype == FLOAT16) return load_float16((const uint16_t *)p + i);
    return load_float((const float *)p + i);
}

INLINE void store(void *p, int64_t i, vf x, int dtype) {
    if (dtype == BFLOAT16) store_bfloat16((uint16_t *)p + i, x);
    else if (dtype == FLOAT16) store_float16((uint16_t *)p + i, x);
    else store_float((float *)p + i, x);
}

/* 2^n, 0 below the smallest normal number, 2^127 above the largest. */
INLINE vf power_of_two(vi n) {
    vi biased = larger_int(n + 127, all_int(0));
    return (vf)(-larger_int(-biased, all_int(-254)) << 23);
}

/* The integer n for which e^x = m 2^n with m in [0.7, 1.42], and m - 1. |x| is held below 22000,
   which keeps n * 0.693359375 exact; a NaN gives m = NaN. */
INLINE vf split_exp_above(vf x, vi *n) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: the sum's last bit is worth 1 */
    x = smaller(all(22000.0f), larger(all(-22000.0f), x));
    vf sum = x * 1.44269504f + magic;
    *n = (vi)sum - (vi)all(magic);
    vf whole = sum - magic;
    vf r = x - whole * 0.693359375f;
    r = r + whole * 2.12194440e-4f;
    /* Minimax on |r| <= ln(2)/2. */
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r;
}

/* That integer n, and m. */
INLINE vf split_exp(vf x, vi *n) { return split_exp_above(x, n) + 1.0f; }

/* e^x for x whose power is in the range of a float. */
INLINE vf exponential(vf x) {
    vi n;
    vf m = split_exp(x, &n);
    return m * power_of_two(n);
}

#define FOR_DTYPE(dtype, function, ...)                         \
    do {                                                        \
        if ((dtype) == FLOAT32) function(FLOAT32, __VA_ARGS__); \
        else if ((dtype) == BFLOAT16) function(BFLOAT16, __VA_ARGS__); \
        else function(FLOAT16, __VA_ARGS__);                    \
    } while (0)

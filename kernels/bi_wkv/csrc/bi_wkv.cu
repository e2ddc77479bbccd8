/* Bi-WKV on NVIDIA GPUs. No torch headers; every function is asynchronous on the caller's stream.

   The sums over the other tokens are two recurrences, P[t+1] = d P[t] + x[t] and
   S[t-1] = d S[t] + x[t] with d = e^{-w}, x = e^k (v, 1). A thread holds a segment of 8 tokens of
   one channel in registers; the threads of a block hold a chunk, neighbouring channels side by
   side:
     summarise  each segment alone: its sums as its right and as its left neighbour see them
     exchange   over the segments of the chunk: what enters each one from either side
     outputs    each segment with what enters it
   The backward pass does the same once more with g = (gy, -gy y) / denominator in x's place.
   Where one chunk holds all tokens that is one launch, which reads and writes everything once.
   Else a launch yields the sums of every chunk, another one what enters each, a third the outputs.

   No atomics: partial sums have a fixed order, so results repeat bit by bit. */
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

static __device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

static __device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The compiler knows nothing of its value. */
static __device__ __forceinline__ void opaque(float &x) { asm volatile("" : "+f"(x)); }

#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#else
#include "emulate.h"
#endif

#include "bi_wkv_cuda.h"
#include "segment.h"

/* Of a block. They also bound the registers of a thread, to 72 and 96. */
constexpr int FORWARD_THREADS = 896, GRADIENT_THREADS = 640;
/* Channels of a block of `carry_kernel`, and threads per channel that share the chunks. */
constexpr int CARRY_WIDTH = 16, CARRY_GROUPS = 16;

using Call = bi_wkv_cuda_call;

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DEVICE float to_float(__half x) { return __half2float(x); }
DEVICE void from_float(float x, float &out) { out = x; }
DEVICE void from_float(float x, __nv_bfloat16 &out) { out = __float2bfloat16_rn(x); }
DEVICE void from_float(float x, __half &out) { out = __float2half_rn(x); }

/* What a thread works on. */
struct Place {
    int item, chunk, channel;
    int first; /* token */
    int count; /* of its tokens that exist, 0 beyond the last channel */

    DEVICE explicit Place(const Call &call, int chunks) {
        int blocks = ((int)call.channels + blockDim.x - 1) / blockDim.x, rest = blockIdx.x / blocks;
        channel = blockIdx.x % blocks * blockDim.x + threadIdx.x;
        item = rest / chunks;
        chunk = rest % chunks;
        first = (chunk * blockDim.y + threadIdx.y) * LENGTH;
        int left = channel < call.channels ? (int)call.tokens - first : 0;
        count = left < 0 ? 0 : left > LENGTH ? LENGTH : left;
    }
    DEVICE explicit Place(const Call &call) : Place(call, call.chunks) {}

    /* Of a sum per (direction, item, chunk, channel). */
    DEVICE int64_t index(const Call &call, int64_t direction) const {
        return ((direction * call.batch + item) * call.chunks + chunk) * call.channels + channel;
    }
};

template <class T>
DEVICE void load(const bi_wkv_rows &x, const Place &at, float missing, float (&out)[LENGTH]) {
    const T *from = (const T *)x.data + at.item * x.batch + at.first * x.token + at.channel;
#pragma unroll
    for (int i = 0; i < LENGTH; i++, from += x.token)
        out[i] = i < at.count ? to_float(*from) : missing;
}

template <class T>
DEVICE void store(const bi_wkv_rows &x, const Place &at, const float (&values)[LENGTH]) {
    T *to = (T *)x.data + at.item * x.batch + at.first * x.token + at.channel;
#pragma unroll
    for (int i = 0; i < LENGTH; i++, to += x.token)
        if (i < at.count) from_float(values[i], *to);
}

DEVICE float decay_of(const Call &call, int64_t channel) {
    return channel < call.channels ? clamp(call.w[channel], MOST_DECAY) : 0.0f;
}

template <class T>
DEVICE void load_tokens(const Call &call, const Place &at, Tokens &x) {
    load<T>(call.k, at, -INFINITY, x.key);
    load<T>(call.v, at, 0.0f, x.value);
    x.w = decay_of(call, at.channel);
    x.u = at.channel < call.channels ? call.u[at.channel] : 0.0f;
    x.plain = fabsf(x.w) * LENGTH <= MOST_PLAIN && fabsf(x.u) <= MOST_PLAIN;
    if (x.plain) weigh_keys(x);
}

/* The sums of all segments of a block: (direction, segment, channel). */
struct Slots {
    Sum *all;

    DEVICE Sum &of(int direction, int segment) const {
        return all[(direction * (int)blockDim.y + segment) * (int)blockDim.x + (int)threadIdx.x];
    }
    DEVICE Sum &left() const { return of(0, threadIdx.y); }
    DEVICE Sum &right() const { return of(1, threadIdx.y); }
};

/* Exchange every segment's own sums for what enters it. The first threads do it, one for each
   channel and direction: threadIdx.y is the direction. They return the sum over all segments and
   what entered the first one.

   distance: tokens from a segment to the next. */
DEVICE Sum exchange(const Slots &slots, float w, double distance, Sum entering) {
    __syncthreads();
    Sum carry = entering;
    if (threadIdx.y < 2) {
        Factor stride = exact_exp(-(double)w * distance);
        int direction = threadIdx.y, segments = blockDim.y;
        int step = direction ? -1 : 1, segment = direction ? segments - 1 : 0;
        Sum own = slots.of(direction, segment);
        for (int i = 0; i < segments; i++, segment += step) {
            Sum now = own;
            if (i + 1 < segments) own = slots.of(direction, segment + step);
            slots.of(direction, segment) = carry;
            carry = carry * stride + now;
        }
    }
    __syncthreads();
    return carry;
}

/* What enters this chunk from the direction threadIdx.y. */
DEVICE Sum entering_sum(const Call &call, const Place &at, const void *sums) {
    if (call.chunks == 1 || threadIdx.y >= 2 || at.channel >= call.channels)
        return Scaled::nothing();
    return ((const Sum *)sums)[at.index(call, threadIdx.y)];
}

DEVICE void keep_total(const Call &call, const Place &at, Sum total, void *sums) {
    if (threadIdx.y < 2 && at.channel < call.channels)
        ((Sum *)sums)[at.index(call, threadIdx.y)] = normalised(total);
}

/* --- kernels ------------------------------------------------------------------------------- */

template <class T>
__global__ void __launch_bounds__(FORWARD_THREADS) summary_kernel(const Call call) {
    DYNAMIC_SHARED(Sum, shared);
    Slots slots{shared};
    Place at(call);
    Tokens x;
    load_tokens<T>(call, at, x);
    summarise(x, slots.left(), slots.right());
    keep_total(call, at, exchange(slots, x.w, LENGTH, Scaled::nothing()), call.sums);
}

/* Exchange every chunk's own sums for what enters it, like `exchange` with whole chunks. */
__global__ void __launch_bounds__(CARRY_WIDTH *CARRY_GROUPS)
    carry_kernel(const Call call, void *sums) {
    DYNAMIC_SHARED(Sum, shared);
    Slots slots{shared};
    Place at(call, 1);
    float w = decay_of(call, at.channel);
    double distance = (double)call.segments * LENGTH;
    Factor stride = exact_exp(-(double)w * distance);
    int64_t size = (call.chunks + blockDim.y - 1) / blockDim.y, begin = size * threadIdx.y;
    int64_t end = begin + size < call.chunks ? begin + size : call.chunks;
    if (at.channel >= call.channels) end = begin;

    Sum *before = (Sum *)sums + at.index(call, 0), *after = (Sum *)sums + at.index(call, 1);
    Sum left = Scaled::nothing(), right = left;
    for (int64_t i = begin; i < end; i++)
        left = normalised(left * stride + before[i * call.channels]);
    for (int64_t i = end - 1; i >= begin; i--)
        right = normalised(right * stride + after[i * call.channels]);
    slots.left() = left;
    slots.right() = right;
    exchange(slots, w, distance * (double)size, Scaled::nothing());
    left = slots.left();
    right = slots.right();
    for (int64_t i = begin; i < end; i++) {
        Sum own = before[i * call.channels];
        before[i * call.channels] = left;
        left = normalised(left * stride + own);
    }
    for (int64_t i = end - 1; i >= begin; i--) {
        Sum own = after[i * call.channels];
        after[i * call.channels] = right;
        right = normalised(right * stride + own);
    }
}

template <class T>
__global__ void __launch_bounds__(FORWARD_THREADS) output_kernel(const Call call) {
    DYNAMIC_SHARED(Sum, shared);
    Slots slots{shared};
    Place at(call);
    Sum entering = entering_sum(call, at, call.sums);
    Tokens x;
    load_tokens<T>(call, at, x);
    summarise(x, slots.left(), slots.right());
    exchange(slots, x.w, LENGTH, entering);
    float y[LENGTH];
    outputs(x, slots.left(), slots.right(), y);
    store<T>(call.y, at, y);
}

/* Everything up to the sums of g in the slots. */
template <class T>
DEVICE void differentiate(const Call &call, const Place &at, const Slots &slots, Tokens &x,
                          Gradients &of) {
    Sum entering = entering_sum(call, at, call.sums);
    float gy[LENGTH];
    load_tokens<T>(call, at, x);
    load<T>(call.gy, at, 0.0f, gy);
    summarise(x, slots.left(), slots.right());
    exchange(slots, x.w, LENGTH, entering);
    of.stride = blockDim.x * blockDim.y;
    of.exponents = (int *)(slots.all + 2 * of.stride) + threadIdx.y * blockDim.x + threadIdx.x;
    differentiate(x, slots.left(), slots.right(), gy, of);
}

template <class T>
__global__ void __launch_bounds__(GRADIENT_THREADS) gradient_summary_kernel(const Call call) {
    DYNAMIC_SHARED(Sum, shared);
    Slots slots{shared};
    Place at(call);
    Tokens x;
    Gradients of;
    differentiate<T>(call, at, slots, x, of);
    keep_total(call, at, exchange(slots, x.w, LENGTH, Scaled::nothing()), call.grad_sums);
}

template <class T>
__global__ void __launch_bounds__(GRADIENT_THREADS) gradient_kernel(const Call call) {
    DYNAMIC_SHARED(Sum, shared);
    Slots slots{shared};
    Place at(call);
    Tokens x;
    Gradients of;
    differentiate<T>(call, at, slots, x, of);
    exchange(slots, x.w, LENGTH, entering_sum(call, at, call.grad_sums));
    float gk[LENGTH], gv[LENGTH];
    input_gradients(x, slots.left(), slots.right(), of, gk, gv);
    store<T>(call.gk, at, gk);
    store<T>(call.gv, at, gv);

    slots.left().a = of.gw;
    slots.right().a = of.gu;
    __syncthreads();
    if (threadIdx.y < 2 && at.channel < call.channels) {
        float sum = 0;
        for (int segment = 0; segment < (int)blockDim.y; segment++)
            sum += slots.of(threadIdx.y, segment).a;
        call.parts[at.index(call, threadIdx.y)] = sum;
    }
}

/* --- launchers ----------------------------------------------------------------------------- */

/* Shared memory of a thread, in bytes. */
constexpr size_t SLOTS = 2 * sizeof(Sum), EXPONENTS = LENGTH * sizeof(int);

/* Most blocks, tokens and channels that 32 bits can count, whole chunks included. */
constexpr int64_t MOST_COUNT = 0x7fff0000;

struct Launcher {
    const Call &call;
    cudaStream_t stream;
    cudaError_t status;

    Launcher(const Call &call, void *stream) : call(call), stream((cudaStream_t)stream) {
        /* The caller's CUDA runtime has chosen the device; this one, linked in here, has not. */
        status = cudaSetDevice(call.device);
        if (max(call.tokens, call.channels) > MOST_COUNT) status = cudaErrorInvalidConfiguration;
    }

    template <class... Parameters, class... Arguments>
    void launch(void (*kernel)(Parameters...), int64_t blocks, int width, int height,
                size_t bytes_per_thread, Arguments... arguments) {
        if (status != cudaSuccess) return;
        if (blocks > MOST_COUNT) {
            status = cudaErrorInvalidConfiguration;
            return;
        }
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3((unsigned)blocks);
        config.blockDim = dim3(width, height);
        config.dynamicSmemBytes = bytes_per_thread * width * height;
        config.stream = stream;
        status = cudaLaunchKernelEx(&config, kernel, arguments...);
    }

    void on_chunks(void (*kernel)(Call), size_t bytes_per_thread = SLOTS) {
        int64_t blocks = (call.channels + call.width - 1) / call.width;
        launch(kernel, blocks * call.chunks * call.batch, call.width, call.segments,
               bytes_per_thread, call);
    }

    void carry(void *sums) {
        int64_t blocks = (call.channels + CARRY_WIDTH - 1) / CARRY_WIDTH;
        launch(carry_kernel, blocks * call.batch, CARRY_WIDTH, CARRY_GROUPS, SLOTS, call,
               sums);
    }

    template <class T>
    void forward() {
        if (call.chunks > 1) {
            on_chunks(summary_kernel<T>);
            carry(call.sums);
        }
        on_chunks(output_kernel<T>);
    }

    template <class T>
    void backward() {
        if (call.chunks > 1) {
            on_chunks(summary_kernel<T>);
            carry(call.sums);
            on_chunks(gradient_summary_kernel<T>, SLOTS + EXPONENTS);
            carry(call.grad_sums);
        }
        on_chunks(gradient_kernel<T>, SLOTS + EXPONENTS);
    }
};

#define FOR_DTYPE(call, launcher, pass)                                     \
    do {                                                                    \
        if ((call)->dtype == FLOAT32) launcher.pass<float>();               \
        else if ((call)->dtype == BFLOAT16) launcher.pass<__nv_bfloat16>(); \
        else launcher.pass<__half>();                                       \
    } while (0)

/* y from k and v. Returns 0, or a number for `vision_cuda_error`. */
extern "C" int vision_bi_wkv(const bi_wkv_cuda_call *call, void *stream) {
    Launcher launcher(*call, stream);
    FOR_DTYPE(call, launcher, forward);
    return launcher.status;
}

/* gk, gv and partial sums of gw and gu from k, v and gy. */
extern "C" int vision_bi_wkv_grads(const bi_wkv_cuda_call *call, void *stream) {
    Launcher launcher(*call, stream);
    FOR_DTYPE(call, launcher, backward);
    return launcher.status;
}

/* Whether a device can run this code: 0 or a number as above. */
extern "C" int vision_bi_wkv_probe(int device) {
    cudaFuncAttributes attributes;
    cudaError_t status = cudaSetDevice(device);
    if (status != cudaSuccess) return status;
    return cudaFuncGetAttributes(&attributes, (const void *)carry_kernel);
}

extern "C" const char *vision_cuda_error(int status) {
    return cudaGetErrorString((cudaError_t)status);
}

/* Enough of CUDA's language to run a .cu file on the CPU, for tests: `g++ -x c++ kernel.cu`.

   Every thread of a block is a coroutine; __syncthreads passes on to the next one. A block whose
   threads do not all come to the same number of barriers aborts. */
#ifndef VISION_EMULATE_H
#define VISION_EMULATE_H

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type *name = (type *)emulate::shared

using std::max;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static dim3 threadIdx, blockIdx, blockDim;

using cudaStream_t = void *;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration = 9 };
struct cudaFuncAttributes {};
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, const void *) { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t status) {
    return status == cudaSuccess ? "no error" : "invalid configuration argument";
}
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

namespace emulate {

constexpr size_t STACK = 1 << 16;
static char *shared;
static ucontext_t scheduler;
static std::vector<ucontext_t> *threads;
static const std::function<void()> *body;
static bool finished; /* the thread that ran last */
/* Whether threads run in reverse order, which shows a missing barrier. */
static bool reversed;

static void run_thread() {
    (*body)();
    finished = true;
}

/* Let every thread run to its next barrier; returns how many have finished. */
static size_t run_phase() {
    size_t done = 0, count = threads->size();
    for (size_t i = 0; i < count; i++) {
        size_t thread = reversed ? count - 1 - i : i;
        threadIdx = dim3(thread % blockDim.x, thread / blockDim.x);
        finished = false;
        swapcontext(&scheduler, &(*threads)[thread]);
        done += finished;
    }
    return done;
}

static void run_block(std::vector<char> &stacks) {
    for (size_t i = 0; i < threads->size(); i++) {
        ucontext_t &thread = (*threads)[i];
        getcontext(&thread);
        thread.uc_stack.ss_sp = &stacks[i * STACK];
        thread.uc_stack.ss_size = STACK;
        thread.uc_link = &scheduler;
        makecontext(&thread, run_thread, 0);
    }
    for (size_t done = 0; done < threads->size();) {
        done = run_phase();
        if (done && done < threads->size()) {
            fprintf(stderr, "%zu threads wait at a barrier, %zu have ended\n",
                    threads->size() - done, done);
            abort();
        }
    }
}

} // namespace emulate

static void __syncthreads() {
    swapcontext(&(*emulate::threads)[threadIdx.y * blockDim.x + threadIdx.x], &emulate::scheduler);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
    blockDim = config->blockDim;
    size_t count = (size_t)blockDim.x * blockDim.y;
    std::vector<ucontext_t> threads(count);
    std::vector<char> stacks(count * emulate::STACK);
    /* On the heap, byte by byte, for an address sanitizer to watch. */
    std::unique_ptr<char[]> shared(new char[config->dynamicSmemBytes]);
    emulate::shared = shared.get();
    emulate::threads = &threads;
    std::function<void()> body = [&] { kernel(arguments...); };
    emulate::body = &body;
    for (unsigned block = 0; block < config->gridDim.x; block++) {
        blockIdx = dim3(block);
        memset(emulate::shared, 0xff, config->dynamicSmemBytes); /* NaN */
        emulate::run_block(stacks);
    }
    return cudaSuccess;
}

extern "C" void vision_emulate_reversed(int reversed) { emulate::reversed = reversed; }

static inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
static inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
static inline int __float2int_rn(float x) { return x == x ? (int)rintf(x) : 0; }
static inline int __double2int_rn(double x) { return x == x ? (int)rint(x) : 0; }
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float reciprocal(float x) { return 1 / x; }
static inline void opaque(float &) {}

struct __nv_bfloat16 {
    uint16_t bits;
};
static inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>((uint32_t)x.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t u = std::bit_cast<uint32_t>(x);
    if (x != x) return {0x7fff};
    return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

using __half = _Float16;
static inline float __half2float(__half x) { return (float)x; }
static inline __half __float2half_rn(float x) { return (__half)x; }

#endif

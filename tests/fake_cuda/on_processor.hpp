// CUDA C++ on a processor, as much of it as TVM writes: the threads of a block are fibers that take turns at barriers; blocks run one after
// the other. Slow, and exact: what a GPU would compute, but for the order of sums that warps make.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <functional>
#include <memory>
#include <vector>
#include <ucontext.h>

struct Index { unsigned x, y, z; };

namespace on_processor {

struct Fiber {
    Index thread;
    ucontext_t context;
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
    bool started, finished;
};

inline std::vector<Fiber> fibers;
inline size_t current;
inline jmp_buf scheduler;
inline ucontext_t outside;
inline std::function<void()> body;
inline Index block_index, block_size, grid_size;
inline std::vector<unsigned char> exchanged;
constexpr size_t STACK = 64 * 1024;

inline void enter() {
    body();
    fibers[current].finished = true;
    _longjmp(scheduler, 1);
}

inline void run_until_barrier(size_t i) {
    current = i;
    Fiber &fiber = fibers[i];
    if (_setjmp(scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        setcontext(&fiber.context);
    }
}

inline void barrier() {
    if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 1);
}

inline void launch(const unsigned *grid, const unsigned *block, std::function<void()> kernel) {
    body = kernel;
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    size_t count = size_t(block[0]) * block[1] * block[2];
    while (fibers.size() < count) fibers.push_back(Fiber{{}, {}, {}, std::unique_ptr<char[]>(new char[STACK]), false, false});
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                block_index = {x, y, z};
                for (size_t i = 0; i < count; ++i) {
                    fibers[i].thread = {unsigned(i % block[0]), unsigned(i / block[0] % block[1]), unsigned(i / block[0] / block[1])};
                    fibers[i].started = fibers[i].finished = false;
                }
                for (bool any = true; any;) {
                    any = false;
                    for (size_t i = 0; i < count; ++i)
                        if (!fibers[i].finished) run_until_barrier(i), any = any || !fibers[i].finished;
                }
            }
}

template <class T> T of_lane(T value, unsigned lane) {
    size_t count = size_t(block_size.x) * block_size.y * block_size.z, own = current;
    exchanged.resize(count * sizeof(T));
    std::memcpy(exchanged.data() + own * sizeof(T), &value, sizeof(T));
    barrier();
    size_t other = own / 32 * 32 + lane;
    if (lane < 32 && other < count) std::memcpy(&value, exchanged.data() + other * sizeof(T), sizeof(T));
    barrier();
    return value;
}

}  // namespace on_processor

#define threadIdx (on_processor::fibers[on_processor::current].thread)
#define blockIdx (on_processor::block_index)
#define blockDim (on_processor::block_size)
#define gridDim (on_processor::grid_size)
#define __syncthreads() on_processor::barrier()
#define __syncwarp(...) on_processor::barrier()
#define __activemask() 0xffffffffu
#define __global__
#define __device__
#define __forceinline__ inline
#define __host__
#define __align__(n) alignas(n)
#define __shared__ static
#define __launch_bounds__(...)

template <class T> T __shfl_sync(unsigned, T value, int lane, int = 32) { return on_processor::of_lane(value, unsigned(lane) % 32); }
template <class T> T __shfl_down_sync(unsigned, T value, unsigned by, int = 32) { return on_processor::of_lane(value, on_processor::current % 32 + by); }
template <class T> T __shfl_xor_sync(unsigned, T value, int by, int = 32) { return on_processor::of_lane(value, unsigned(on_processor::current % 32) ^ unsigned(by)); }

#define VECTORS(T)                                                                        \
    struct T##2 { T x, y; };                                                              \
    struct T##3 { T x, y, z; };                                                           \
    struct alignas(4 * sizeof(T)) T##4 { T x, y, z, w; };                                 \
    inline T##2 make_##T##2(T x, T y) { return {x, y}; }                                  \
    inline T##3 make_##T##3(T x, T y, T z) { return {x, y, z}; }                          \
    inline T##4 make_##T##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float)
VECTORS(int)
VECTORS(uint)
VECTORS(short)
VECTORS(ushort)
VECTORS(char)

inline float max(float a, float b) { return a > b || b != b ? a : b; }
inline float min(float a, float b) { return a < b || b != b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::int64_t;

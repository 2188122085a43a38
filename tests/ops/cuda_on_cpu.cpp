// Runs the CUDA kernels' source on a CPU, one thread a lane, so that its arithmetic is tested where no GPU is.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx, gridDim;

struct Warp {
  std::barrier<> all{32};
  double slots[32];
};
static thread_local Warp* warp;
static std::mutex memory;

template <typename A>
A __shfl_xor_sync(unsigned, A x, int step) {
  const unsigned lane = threadIdx.x % 32;
  warp->slots[lane] = x;
  warp->all.arrive_and_wait();
  const A other = static_cast<A>(warp->slots[lane ^ step]);
  warp->all.arrive_and_wait();
  return other;
}

template <typename A>
void atomicAdd(A* p, A x) {
  const std::lock_guard<std::mutex> lock(memory);
  *p += x;
}

#define __expf std::exp  // glibc has a function of this name
using std::exp;
using std::floor;

#include "../../mask2former/ops/csrc/cuda/kernel.cuh"

namespace {

using namespace mask2former;

template <typename Kernel, typename P>
void launch(Kernel kernel, const P& p, unsigned blocks) {
  for (unsigned block = 0; block < blocks; ++block)
    for (unsigned first = 0; first < kThreads; first += 32) {
      Warp shared;
      std::vector<std::thread> lanes;
      for (unsigned lane = 0; lane < 32; ++lane)
        lanes.emplace_back([&, lane] {
          threadIdx = {first + lane}, blockIdx = {block}, gridDim = {blocks}, warp = &shared;
          kernel(p);
        });
      for (std::thread& lane : lanes) lane.join();
    }
}

template <typename T, int kVector, int kLevels, int kPoints, bool kFused, int N>
void run(const int64_t* n, const int* levels, void** data, unsigned blocks) {
  Problem<T, N> p{};
  p.rows = n[0] * n[1] * n[2], p.Q = n[1], p.S = n[3];
  p.M = static_cast<int>(n[2]), p.D = static_cast<int>(n[4]), p.L = static_cast<int>(n[5]);
  p.P = static_cast<int>(n[6]), p.group = static_cast<int>(n[7]);
  std::memcpy(p.levels.height, levels, p.L * sizeof(int));
  std::memcpy(p.levels.width, levels + p.L, p.L * sizeof(int));
  std::memcpy(p.levels.start, levels + 2 * p.L, p.L * sizeof(int));
  p.value = static_cast<T*>(data[0]), p.points = static_cast<T*>(data[1]), p.scores = static_cast<T*>(data[2]);
  p.output = static_cast<T*>(data[3]), p.grad_output = static_cast<T*>(data[4]);
  p.grad_value = static_cast<T*>(data[5]), p.grad_points = static_cast<T*>(data[6]);
  p.grad_scores = static_cast<T*>(data[7]);
  launch(forward_kernel<T, kVector, kLevels, kPoints, kFused, N>, p, blocks);
  launch(backward_kernel<T, kVector, kLevels, kPoints, kFused, N>, p, blocks);
}

template <bool kFused>
void choose(const int64_t* n, const int* levels, void** data, unsigned blocks, int vector) {
  if (vector == 1)
    run<double, 1, 0, 0, kFused, kMaxLevels>(n, levels, data, blocks);
  else if (n[5] == 3 && n[6] == 4)
    run<double, 2, 3, 4, kFused, 3>(n, levels, data, blocks);
  else
    run<double, 2, 0, 0, kFused, kMaxLevels>(n, levels, data, blocks);
}

}  // namespace

// n: B, Q, M, S, D, L, P, lanes of a group; levels: heights, widths, starts; data: all float64, in Problem's order.
extern "C" void forward_and_backward(const int64_t* n, const int* levels, void** data, unsigned blocks, int vector,
                                     bool fused) {
  fused ? choose<true>(n, levels, data, blocks, vector) : choose<false>(n, levels, data, blocks, vector);
}

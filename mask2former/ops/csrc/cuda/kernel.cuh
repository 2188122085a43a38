// The CUDA kernels, without PyTorch, so that a test can compile them for a CPU as well.
//
// A group of G lanes, a power of two within one warp, does one row (image, query, head). Each lane owns kVector channels
// side by side, read as 16 bytes, so that a cell is one coalesced read of the group; neighbouring groups are the heads of
// one query. Every lane works out the samples' places itself: the reads are broadcasts, and the arithmetic hides behind
// the gathers. In the backward pass the lanes' shares of a sample's gradients are added up by shuffles; the value's
// gradient goes to memory by atomics, in float32 for half types, four floats at a time where the device can (sm_90).
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

namespace mask2former {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 128;  // the level table travels as a kernel argument, of which there are 4 kB
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <int N>
struct Levels {
  int height[N], width[N], start[N];
};

template <typename T, int N>
struct Problem {
  using A = Sum<T>;
  int64_t rows;  // B * Q * M
  int64_t Q, S;
  int M, D, L, P, group;
  Levels<N> levels;
  const T* __restrict__ value;
  const A* __restrict__ points;
  const A* __restrict__ scores;
  T* __restrict__ output;             // forward
  const T* __restrict__ grad_output;  // backward, and all below
  A* __restrict__ grad_value;
  A* __restrict__ grad_points;
  A* __restrict__ grad_scores;
};

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T items[N];
};

template <typename T, int N>
__device__ __forceinline__ void load(const T* p, Sum<T> (&items)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) items[i] = static_cast<Sum<T>>(pack.items[i]);
}

template <typename A, int N>
__device__ __forceinline__ void add_to_memory(A* p, const A (&items)[N]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && defined(CUDART_VERSION) && CUDART_VERSION >= 12010
  if constexpr (std::is_same_v<A, float> && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      atomicAdd(reinterpret_cast<float4*>(p + i), make_float4(items[i], items[i + 1], items[i + 2], items[i + 3]));
    return;
  }
#endif
#pragma unroll
  for (int i = 0; i < N; ++i) atomicAdd(p + i, items[i]);
}

__device__ __forceinline__ float exp_of(float x) { return __expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

template <typename A>
__device__ __forceinline__ A sum_of_group(A x, int group) {
  for (int step = group / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <typename A>
__device__ __forceinline__ A max_of_group(A x, int group) {
  for (int step = group / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

// What all lanes of a group know about their row.
template <typename T, int N, bool kFused>
struct Row {
  using A = Sum<T>;
  int64_t samples_at;  // of the first sample in scores
  int64_t map_at;      // of the head's first channel in cell 0
  A column, line;      // fused: the query's place on its own level
  A own_width, own_height;
  A top, scale;  // fused: softmax is exp(logit - top) * scale

  // All lanes of the warp must come here together; `row` is a legal one, even in a group that has nothing to do.
  __device__ __forceinline__ Row(const Problem<T, N>& p, int64_t row, int lane) {
    const int64_t m = row % p.M, b = row / p.M / p.Q;
    const int samples = p.L * p.P;
    samples_at = row * samples;
    map_at = (b * p.S * p.M + m) * p.D;
    if constexpr (kFused) {
      const int q = static_cast<int>(row / p.M % p.Q);
      int start = 0, width = p.levels.width[0], height = p.levels.height[0];
#pragma unroll
      for (int level = 1; level < (N == kMaxLevels ? p.L : N); ++level)
        if (q >= p.levels.start[level]) {
          start = p.levels.start[level];
          width = p.levels.width[level];
          height = p.levels.height[level];
        }
      own_width = width;
      own_height = height;
      column = (q - start) % width + A(0.5);
      line = (q - start) / width + A(0.5);
      top = -std::numeric_limits<A>::infinity();
      for (int k = lane; k < samples; k += p.group) {
        const A logit = p.scores[samples_at + k];
        top = logit > top ? logit : top;
      }
      top = max_of_group(top, p.group);
      A sum = 0;
      for (int k = lane; k < samples; k += p.group) sum += exp_of(p.scores[samples_at + k] - top);
      scale = 1 / sum_of_group(sum, p.group);
    }
  }

  __device__ __forceinline__ A weight(const Problem<T, N>& p, int k) const {
    const A score = p.scores[samples_at + k];
    if constexpr (kFused) return exp_of(score - top) * scale;
    return score;
  }
};

// One sample's four cells.
template <typename A>
struct Cells {
  A fx, fy, weight;
  A factor[4];      // bilinear, without the weight: 00, 01 (right), 10 (below), 11
  int64_t cell[4];  // -1: outside

  template <typename T, int N, bool kFused>
  __device__ __forceinline__ Cells(const Problem<T, N>& p, const Row<T, N, kFused>& row, int level, int k) {
    const int w = p.levels.width[level], h = p.levels.height[level];
    A x = p.points[2 * (row.samples_at + k)], y = p.points[2 * (row.samples_at + k) + 1];
    if constexpr (kFused) {
      // times the width before the division: on the query's own level the result is exact
      x += row.column * w / row.own_width - A(0.5);
      y += row.line * h / row.own_height - A(0.5);
    } else {
      x = x * w - A(0.5);
      y = y * h - A(0.5);
    }
    weight = row.weight(p, k);
    x = clamp(x, w);
    y = clamp(y, h);
    const A left = floor(x), above = floor(y);
    fx = x - left;
    fy = y - above;
    factor[0] = (1 - fy) * (1 - fx);
    factor[1] = (1 - fy) * fx;
    factor[2] = fy * (1 - fx);
    factor[3] = fy * fx;
    // a NaN is no place: outside
    const int j = static_cast<int>(left >= A(-2) ? left : A(-2)), i = static_cast<int>(above >= A(-2) ? above : A(-2));
    const bool in_left = j >= 0 && j < w, in_right = j >= -1 && j + 1 < w;
    const bool in_top = i >= 0 && i < h, in_bottom = i >= -1 && i + 1 < h;
    const int64_t at = p.levels.start[level] + static_cast<int64_t>(i) * w + j;
    cell[0] = in_top && in_left ? at : -1;
    cell[1] = in_top && in_right ? at + 1 : -1;
    cell[2] = in_bottom && in_left ? at + w : -1;
    cell[3] = in_bottom && in_right ? at + w + 1 : -1;
  }

  // Keeps NaN. Far outside is as good as just outside, and fits an int.
  static __device__ __forceinline__ A clamp(A x, int size) {
    x = x < A(-2) ? A(-2) : x;
    return x > A(size) + 1 ? A(size) + 1 : x;
  }
};

// kLevels and kPoints are 0 where they are only known at run time.
template <typename T, int kVector, int kLevels, int kPoints, bool kFused, int N>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Problem<T, N> p) {
  using A = Sum<T>;
  const int lane = threadIdx.x % p.group;
  const int64_t rows_per_block = kThreads / p.group;
  const int64_t stride = static_cast<int64_t>(p.M) * p.D;
  const int levels = kLevels > 0 ? kLevels : p.L, points = kPoints > 0 ? kPoints : p.P;
  for (int64_t first = blockIdx.x * rows_per_block; first < p.rows; first += gridDim.x * rows_per_block) {
    const int64_t wanted = first + threadIdx.x / p.group;
    const bool active = wanted < p.rows;
    const int64_t index = active ? wanted : p.rows - 1;
    const Row<T, N, kFused> row(p, index, lane);
    for (int c = lane * kVector; active && c < p.D; c += p.group * kVector) {
      A sums[kVector] = {};
      A unreadable = 0;  // a NaN in a place or weight shows even where no cell is read
      const T* map = p.value + row.map_at + c;
#pragma unroll
      for (int level = 0; level < levels; ++level) {
#pragma unroll
        for (int point = 0; point < points; ++point) {
          const Cells<A> cells(p, row, level, level * points + point);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (cells.cell[corner] >= 0) {
              A channels[kVector];
              load(map + cells.cell[corner] * stride, channels);
              const A factor = cells.factor[corner] * cells.weight;
#pragma unroll
              for (int i = 0; i < kVector; ++i) sums[i] += channels[i] * factor;
            }
          }
          unreadable += (cells.fx + cells.fy) * cells.weight * 0;
        }
      }
      Pack<T, kVector> pack;
#pragma unroll
      for (int i = 0; i < kVector; ++i) pack.items[i] = static_cast<T>(sums[i] + unreadable);
      *reinterpret_cast<Pack<T, kVector>*>(p.output + index * p.D + c) = pack;
    }
  }
}

template <typename T, int kVector, int kLevels, int kPoints, bool kFused, int N>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Problem<T, N> p) {
  using A = Sum<T>;
  const int lane = threadIdx.x % p.group;
  const int64_t rows_per_block = kThreads / p.group;
  const int64_t stride = static_cast<int64_t>(p.M) * p.D;
  const int levels = kLevels > 0 ? kLevels : p.L, points = kPoints > 0 ? kPoints : p.P;
  for (int64_t first = blockIdx.x * rows_per_block; first < p.rows; first += gridDim.x * rows_per_block) {
    const int64_t wanted = first + threadIdx.x / p.group;
    const bool active = wanted < p.rows;
    const int64_t index = active ? wanted : p.rows - 1;
    const Row<T, N, kFused> row(p, index, lane);
    A mean = 0;  // of the weights' gradients, for the softmax
#pragma unroll
    for (int level = 0; level < levels; ++level) {
#pragma unroll 1
      for (int point = 0; point < points; ++point) {
        const int k = level * points + point;
        const Cells<A> cells(p, row, level, k);
        A dots[4] = {};
        for (int c = lane * kVector; active && c < p.D; c += p.group * kVector) {
          A gradient[kVector];
          load(p.grad_output + index * p.D + c, gradient);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            if (cells.cell[corner] >= 0) {
              const int64_t at = row.map_at + cells.cell[corner] * stride + c;
              A channels[kVector], share[kVector];
              load(p.value + at, channels);
              const A factor = cells.factor[corner] * cells.weight;
#pragma unroll
              for (int i = 0; i < kVector; ++i) {
                dots[corner] += channels[i] * gradient[i];
                share[i] = gradient[i] * factor;
              }
              add_to_memory(p.grad_value + at, share);
            }
          }
        }
        const A top = dots[0] + (dots[1] - dots[0]) * cells.fx, bottom = dots[2] + (dots[3] - dots[2]) * cells.fx;
        const A of_x = (dots[1] - dots[0]) * (1 - cells.fy) + (dots[3] - dots[2]) * cells.fy;
        const A of_weight = sum_of_group(top + (bottom - top) * cells.fy, p.group);
        const A along_x = sum_of_group(of_x, p.group), along_y = sum_of_group(bottom - top, p.group);
        mean += cells.weight * of_weight;
        if (active && lane == k % p.group) {
          A* of_point = p.grad_points + 2 * (row.samples_at + k);
          of_point[0] = cells.weight * along_x * (kFused ? A(1) : A(p.levels.width[level]));
          of_point[1] = cells.weight * along_y * (kFused ? A(1) : A(p.levels.height[level]));
          p.grad_scores[row.samples_at + k] = of_weight;
        }
      }
    }
    if constexpr (kFused) {
      // each lane reads back what it wrote itself
      for (int k = lane; active && k < p.L * p.P; k += p.group) {
        A& gradient = p.grad_scores[row.samples_at + k];
        gradient = row.weight(p, k) * (gradient - mean);
      }
    }
  }
}

}  // namespace
}  // namespace mask2former

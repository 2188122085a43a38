// What a CPU kernel works on. Plain data: the kernels are compiled once for each instruction set, and code of the
// standard library compiled for one of them must not be picked by the linker for another (so this header, not kernel.h, includes what they need).
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

namespace mask2former::cpu {

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct SumType {
  using type = T;
};
template <>
struct SumType<BFloat16> {
  using type = float;
};

template <typename T>
struct Problem {
  using A = typename SumType<T>::type;
  int64_t B, S, M, D, Q, L, P;
  const int32_t* heights;  // (L)
  const int32_t* widths;   // (L)
  const int32_t* starts;   // (L) first cell of the level
  bool fused;
  const T* value;          // (B, M, S, D)
  const A* points;
  const A* scores;
  T* output;             // forward
  const T* grad_output;  // backward, and all below
  A* grad_value;         // (B, M, S, D), zeros at the start
  A* grad_points;
  A* grad_scores;  // fused: first of the softmax's results, then of the logits

  static constexpr int64_t kQueryBlock = 32;
  int64_t query_blocks() const { return (Q + kQueryBlock - 1) / kQueryBlock; }
};

// Each function does a range [begin, end) of its tasks; tasks write to different places, so that the result does not
// depend on how they are shared out.
template <typename T>
struct Kernels {
  int64_t (*scratch_bytes)(const Problem<T>&);
  // tasks: the B * query_blocks() * M blocks of output rows
  void (*forward)(const Problem<T>&, int64_t begin, int64_t end, char* scratch);
  // tasks: the B * M * L levels of the heads; all gradients that belong to a level, with queries in order
  void (*backward)(const Problem<T>&, int64_t begin, int64_t end, char* scratch);
  // tasks: the B * Q * M rows; turns grad_scores into the logits' gradient
  void (*softmax_backward)(const Problem<T>&, int64_t begin, int64_t end, char* scratch);
};

template <typename T>
Kernels<T> kernels_default();
#if defined(__x86_64__)
template <typename T>
Kernels<T> kernels_avx2();
template <typename T>
Kernels<T> kernels_avx512();
#endif

}  // namespace mask2former::cpu

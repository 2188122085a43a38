// Tensors in, tensors out; the arithmetic is in kernel.cuh.
#include "../ms_deform_attn.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "kernel.cuh"

namespace mask2former {
namespace {

// ---- launching

// Channels a lane reads at once: 16 bytes if they fit and all addresses allow it, or one.
template <typename T>
bool reads_vectors(int64_t channels, std::initializer_list<const void*> pointers) {
  constexpr int vector = 16 / static_cast<int>(sizeof(T));
  return channels % vector == 0 && std::all_of(pointers.begin(), pointers.end(), [](const void* pointer) {
           return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
         });
}

template <typename T, int N>
Problem<T, N> describe(const Sizes& n, at::IntArrayRef shapes, int vector) {
  Problem<T, N> p{};
  p.rows = n.B * n.Q * n.M;
  p.Q = n.Q, p.S = n.S;
  p.M = static_cast<int>(n.M), p.D = static_cast<int>(n.D), p.L = static_cast<int>(n.L), p.P = static_cast<int>(n.P);
  p.group = 1;
  while (p.group < 32 && p.group * vector < n.D) p.group *= 2;
  int start = 0;
  for (int level = 0; level < p.L; ++level) {
    p.levels.height[level] = static_cast<int>(shapes[2 * level]);
    p.levels.width[level] = static_cast<int>(shapes[2 * level + 1]);
    p.levels.start[level] = start;
    start += p.levels.height[level] * p.levels.width[level];
  }
  return p;
}

template <typename T, int kVector, int kLevels, int kPoints, bool kFused, int N>
void launch(const Problem<T, N>& p, bool backward) {
  const int64_t rows_per_block = kThreads / p.group;
  const int64_t blocks = (p.rows + rows_per_block - 1) / rows_per_block;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (backward)
    backward_kernel<T, kVector, kLevels, kPoints, kFused, N><<<grid, kThreads, 0, stream>>>(p);
  else
    forward_kernel<T, kVector, kLevels, kPoints, kFused, N><<<grid, kThreads, 0, stream>>>(p);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls `work` with a problem that `fill` has given its pointers: three levels and four points, as in Mask2Former, have
// kernels of their own; everything else shares one.
template <typename T, bool kFused, typename Fill>
void run(const Sizes& n, at::IntArrayRef shapes, bool vectors, bool backward, const Fill& fill) {
  constexpr int vector = 16 / static_cast<int>(sizeof(T));
  if (vectors && n.L == 3 && n.P == 4) {
    auto p = describe<T, 3>(n, shapes, vector);
    fill(p);
    launch<T, vector, 3, 4, kFused, 3>(p, backward);
  } else if (vectors) {
    auto p = describe<T, kMaxLevels>(n, shapes, vector);
    fill(p);
    launch<T, vector, 0, 0, kFused, kMaxLevels>(p, backward);
  } else {
    auto p = describe<T, kMaxLevels>(n, shapes, 1);
    fill(p);
    launch<T, 1, 0, 0, kFused, kMaxLevels>(p, backward);
  }
}

template <typename T, typename Fill>
void run(const Sizes& n, at::IntArrayRef shapes, bool fused, bool vectors, bool backward, const Fill& fill) {
  if (fused)
    run<T, true>(n, shapes, vectors, backward, fill);
  else
    run<T, false>(n, shapes, vectors, backward, fill);
}

Sizes check_for_device(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& points,
                       const at::Tensor& scores, bool fused) {
  const Sizes n = check_inputs(value, shapes, points, scores, fused);
  const int64_t most = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(n.L <= kMaxLevels, "spatial_shapes must be at most ", kMaxLevels, " levels, got ", n.L);
  TORCH_CHECK_VALUE(n.M <= most && n.D <= most && 2 * n.L * n.P <= most, "value and points must have fewer than 2^31 ",
                    "heads, channels and samples, got ", value.sizes(), " and ", points.sizes());
  return n;
}

}  // namespace

at::Tensor forward_cuda(const at::Tensor& value_, at::IntArrayRef shapes, const at::Tensor& points_,
                        const at::Tensor& scores_, bool fused) {
  const Sizes n = check_for_device(value_, shapes, points_, scores_, fused);
  const c10::cuda::OptionalCUDAGuard guard(value_.device());
  const at::Tensor value = value_.contiguous(), points = points_.contiguous(), scores = scores_.contiguous();
  at::Tensor output = at::empty({n.B, n.Q, n.M * n.D}, value.options());
  if (output.numel() == 0) return output;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_forward", [&] {
    using A = Sum<scalar_t>;
    const bool vectors = reads_vectors<scalar_t>(n.D, {value.const_data_ptr(), output.const_data_ptr()});
    run<scalar_t>(n, shapes, fused, vectors, false, [&](auto& p) {
      p.value = value.const_data_ptr<scalar_t>();
      p.points = points.const_data_ptr<A>();
      p.scores = scores.const_data_ptr<A>();
      p.output = output.mutable_data_ptr<scalar_t>();
    });
  });
  return output;
}

Gradients backward_cuda(const at::Tensor& grad_output_, const at::Tensor& value_, at::IntArrayRef shapes,
                        const at::Tensor& points_, const at::Tensor& scores_, bool fused) {
  const Sizes n = check_for_device(value_, shapes, points_, scores_, fused);
  TORCH_CHECK_VALUE(grad_output_.scalar_type() == value_.scalar_type() && grad_output_.device() == value_.device() &&
                        grad_output_.sizes() == at::IntArrayRef({n.B, n.Q, n.M * n.D}),
                    "grad_output must be like the output, got ", grad_output_.sizes(), " ",
                    grad_output_.scalar_type());
  at::globalContext().alertNotDeterministic("ms_deform_attn_backward on CUDA");  // the order of atomics is not fixed
  const c10::cuda::OptionalCUDAGuard guard(value_.device());
  const at::Tensor value = value_.contiguous(), points = points_.contiguous(), scores = scores_.contiguous();
  const at::Tensor grad_output = grad_output_.contiguous();
  at::Tensor grad_value = at::zeros(value.sizes(), points.options());
  at::Tensor grad_points = at::empty_like(points), grad_scores = at::empty_like(scores);
  if (grad_output.numel() == 0) return {grad_value.to(value.scalar_type()), grad_points.zero_(), grad_scores.zero_()};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
    using A = Sum<scalar_t>;
    const bool vectors = reads_vectors<scalar_t>(
        n.D, {value.const_data_ptr(), grad_output.const_data_ptr(), grad_value.const_data_ptr()});
    run<scalar_t>(n, shapes, fused, vectors, true, [&](auto& p) {
      p.value = value.const_data_ptr<scalar_t>();
      p.points = points.const_data_ptr<A>();
      p.scores = scores.const_data_ptr<A>();
      p.grad_output = grad_output.const_data_ptr<scalar_t>();
      p.grad_value = grad_value.mutable_data_ptr<A>();
      p.grad_points = grad_points.mutable_data_ptr<A>();
      p.grad_scores = grad_scores.mutable_data_ptr<A>();
    });
  });
  return {grad_value.to(value.scalar_type()), grad_points, grad_scores};
}

int64_t cuda_architectures(const int** list) {
#ifdef __CUDA_ARCH_LIST__
  static const int compiled[] = {__CUDA_ARCH_LIST__};
  *list = compiled;
  return sizeof compiled / sizeof *compiled;
#else
  *list = nullptr;
  return 0;
#endif
}

}  // namespace mask2former

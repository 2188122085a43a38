// Tensors in, tensors out; the arithmetic is in kernel.h.
#include "../ms_deform_attn.h"

#include <ATen/Dispatch.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <vector>

#include "problem.h"
#include "processor.h"
#include "share.h"

namespace mask2former {
namespace {

using cpu::Kernels;
using cpu::Problem;

template <typename T>
struct Stored {
  using type = T;
};
template <>
struct Stored<at::BFloat16> {
  using type = cpu::BFloat16;
};

// The widest instruction set that PyTorch uses here (ATEN_CPU_CAPABILITY narrows it) and that the channels fill.
template <typename T>
Kernels<T> choose_kernels(int64_t channels) {
#if defined(__x86_64__)
  const int64_t lanes = 64 / static_cast<int64_t>(sizeof(typename cpu::SumType<T>::type));
  if (capability() == "AVX512" && channels % lanes == 0) return cpu::kernels_avx512<T>();
  if (capability() == "AVX512" || capability() == "AVX2") return cpu::kernels_avx2<T>();
#endif
  return cpu::kernels_default<T>();
}

// Level tables and the problem that points into them.
template <typename T>
struct Call {
  std::vector<int32_t> heights, widths, starts;
  Problem<T> problem{};
  Kernels<T> kernels;

  Call(const Sizes& n, at::IntArrayRef shapes, bool fused) : kernels(choose_kernels<T>(n.D)) {
    int64_t start = 0;
    for (int64_t level = 0; level < n.L; ++level) {
      heights.push_back(static_cast<int32_t>(shapes[2 * level]));
      widths.push_back(static_cast<int32_t>(shapes[2 * level + 1]));
      starts.push_back(static_cast<int32_t>(start));
      start += shapes[2 * level] * shapes[2 * level + 1];
    }
    problem.B = n.B, problem.S = n.S, problem.M = n.M, problem.D = n.D, problem.Q = n.Q, problem.L = n.L;
    problem.P = n.P, problem.fused = fused;
    problem.heights = heights.data(), problem.widths = widths.data(), problem.starts = starts.data();
  }

  template <typename Function>
  void run(Function function, int64_t tasks, int64_t piece) const {
    const int64_t bytes = kernels.scratch_bytes(problem);
    share<char>(tasks, piece, bytes, [&](int64_t begin, int64_t end, char* scratch) {
      std::memset(scratch, 0, bytes);
      function(problem, begin, end, scratch);
    });
  }
};

template <typename T>
const typename Stored<T>::type* pointer(const at::Tensor& tensor) {
  return reinterpret_cast<const typename Stored<T>::type*>(tensor.const_data_ptr<T>());
}

// (B, S, M, D) -> (B, M, S, D): a head's cells side by side. With the heads between them, M * D * 4 bytes, often a power
// of two, lie from cell to cell, and all cells share the few sets of a cache that belong to these addresses: the copy
// costs a tenth of what it saves.
at::Tensor by_head(const at::Tensor& value) { return value.transpose(1, 2).contiguous(); }

constexpr int64_t kRows = 1024;  // of the softmax's gradient; fewer are not worth a thread

}  // namespace

at::Tensor forward_cpu(const at::Tensor& value_, at::IntArrayRef shapes, const at::Tensor& points_,
                       const at::Tensor& scores_, bool fused) {
  const Sizes n = check_inputs(value_, shapes, points_, scores_, fused);
  const at::Tensor value = by_head(value_), points = points_.contiguous(), scores = scores_.contiguous();
  at::Tensor output = value.new_empty({n.B, n.Q, n.M * n.D});
  if (output.numel() == 0) return output;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, value.scalar_type(), "ms_deform_attn_forward", [&] {
    using T = typename Stored<scalar_t>::type;
    using A = typename cpu::SumType<T>::type;
    Call<T> call(n, shapes, fused);
    call.problem.value = pointer<scalar_t>(value);
    call.problem.points = points.const_data_ptr<A>();
    call.problem.scores = scores.const_data_ptr<A>();
    call.problem.output = reinterpret_cast<T*>(output.data_ptr<scalar_t>());
    call.run(call.kernels.forward, n.B * call.problem.query_blocks() * n.M, n.M);
  });
  return output;
}

Gradients backward_cpu(const at::Tensor& grad_output_, const at::Tensor& value_, at::IntArrayRef shapes,
                       const at::Tensor& points_, const at::Tensor& scores_, bool fused) {
  const Sizes n = check_inputs(value_, shapes, points_, scores_, fused);
  TORCH_CHECK_VALUE(grad_output_.scalar_type() == value_.scalar_type() &&
                        grad_output_.sizes() == at::IntArrayRef({n.B, n.Q, n.M * n.D}),
                    "grad_output must be like the output, got ", grad_output_.sizes(), " ",
                    grad_output_.scalar_type());
  const at::Tensor value = by_head(value_), points = points_.contiguous(), scores = scores_.contiguous();
  const at::Tensor grad_output = grad_output_.contiguous();
  at::Tensor grad_value = points.new_zeros(value.sizes());  // bfloat16 is summed in float32
  at::Tensor grad_points = points.new_empty(points.sizes()), grad_scores = scores.new_empty(scores.sizes());
  if (grad_output.numel() == 0) {
    return {value_.new_zeros(value_.sizes()), grad_points.zero_(), grad_scores.zero_()};
  }
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
    using T = typename Stored<scalar_t>::type;
    using A = typename cpu::SumType<T>::type;
    Call<T> call(n, shapes, fused);
    call.problem.value = pointer<scalar_t>(value);
    call.problem.points = points.const_data_ptr<A>();
    call.problem.scores = scores.const_data_ptr<A>();
    call.problem.grad_output = pointer<scalar_t>(grad_output);
    call.problem.grad_value = grad_value.data_ptr<A>();
    call.problem.grad_points = grad_points.data_ptr<A>();
    call.problem.grad_scores = grad_scores.data_ptr<A>();
    call.run(call.kernels.backward, n.B * n.M * n.L, n.B * n.M < at::get_num_threads() ? 1 : n.L);
    if (fused) call.run(call.kernels.softmax_backward, n.B * n.Q * n.M, kRows);
  });
  return {grad_value.to(value.scalar_type()).transpose(1, 2).contiguous(), grad_points, grad_scores};
}

}  // namespace mask2former

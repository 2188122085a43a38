// Tensors in, tensors out; the arithmetic is in products_kernel.h.
#include "../products.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <memory>
#include <string>
#include <vector>

#include "products.h"

namespace mask2former {
namespace {

using cpu::Activation;
using cpu::ProductKernels;
using cpu::RowPlaces;
using Optional = std::optional<at::Tensor>;

constexpr int64_t kRowsAtLeast = 24;  // of a thread, below which starting it costs more than it saves
constexpr int64_t kVectorFloats = 8;  // channels of the Winograd kernel are multiples of it

const ProductKernels& kernels() {
#if defined(__x86_64__)
  static const ProductKernels chosen = cpu::product_kernels_avx2();
  TORCH_CHECK(has_product_kernels(), "this processor has no kernels of products");
  return chosen;
#else
  TORCH_CHECK(false, "this processor has no kernels of products");
#endif
}

// Python has checked all this with better words; here it keeps direct calls of torch.ops from reading wild memory.
void check_float(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu(), name,
                    " must be float32 on the CPU, got ", tensor.scalar_type(), " on ", tensor.device());
}

const float* vector_of(const char* name, const Optional& vector, int64_t size, at::Tensor& kept) {
  if (!vector.has_value()) return nullptr;
  check_float(name, *vector);
  TORCH_CHECK_VALUE(vector->dim() == 1 && vector->size(0) == size, name, " must have shape (", size, "), got ",
                    vector->sizes());
  kept = vector->contiguous();
  return kept.const_data_ptr<float>();
}

Activation activation_of(int64_t number) {
  TORCH_CHECK_VALUE(number >= 0 && number <= 3, "activation must be from 0 to 3, got ", number);
  return static_cast<Activation>(number);
}

// The rows (..., K) of a tensor, copied only if they cannot be read where they are.
struct Input {
  at::Tensor kept;
  RowPlaces places;
  int64_t rows;

  Input(const at::Tensor& x, int64_t K) : kept(x) {
    check_float("x", x);
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == K, "x must have shape (..., ", K, "), got ", x.sizes());
    if (x.dim() != 4 || x.stride(3) != 1) kept = x.contiguous().view({1, 1, -1, K});
    rows = kept.size(0) * kept.size(1) * kept.size(2);
    places = {kept.const_data_ptr<float>(), kept.size(1),   kept.size(2),
              kept.stride(0),               kept.stride(1), kept.stride(2)};
  }
};

void check_weight(const char* name, const at::Tensor& weight, int64_t columns) {
  check_float(name, weight);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0, name,
                    " must have shape (N, K), both at least 1, got ", weight.sizes());
  TORCH_CHECK_VALUE(columns < 0 || weight.size(1) == columns, name, " must have ", columns, " columns, got ",
                    weight.sizes());
}

at::Tensor packed(const at::Tensor& weight) {
  const at::Tensor dense = weight.contiguous();
  const int64_t N = weight.size(0), K = weight.size(1);
  at::Tensor result = at::empty({kernels().packed_floats(N, K)}, weight.options());
  const float* from = dense.const_data_ptr<float>();
  float* to = result.data_ptr<float>();
  at::parallel_for(0, kernels().panels(N), 4,
                   [&](int64_t begin, int64_t end) { kernels().pack(from, N, K, to, begin, end); });
  return result;
}

at::Tensor output_for(const at::Tensor& x, int64_t N) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  return at::empty(shape, x.options());
}

const float* residual_of(const Optional& residual, const at::Tensor& output, at::Tensor& kept) {
  if (!residual.has_value()) return nullptr;
  check_float("residual", *residual);
  TORCH_CHECK_VALUE(residual->sizes() == output.sizes(), "residual must have shape ", output.sizes(), ", got ",
                    residual->sizes());
  kept = residual->contiguous();
  return kept.const_data_ptr<float>();
}

template <typename Function>
void with_scratch(int64_t tasks, int64_t grain, int64_t floats, Function function) {
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[floats]);
    function(begin, end, scratch.get());
  });
}

}  // namespace

bool has_product_kernels() {
#if defined(__x86_64__)
  return at::get_cpu_capability() == "AVX2";
#else
  return false;
#endif
}

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, const Optional& residual,
                      int64_t activation) {
  check_weight("weight", weight, -1);
  const int64_t N = weight.size(0), K = weight.size(1);
  const Input input(x, K);
  at::Tensor output = output_for(x, N), kept_bias, kept_residual;
  if (output.numel() == 0) return output;
  const at::Tensor ready = packed(weight);
  const cpu::Linear problem = {input.places,
                               input.rows,
                               K,
                               N,
                               ready.const_data_ptr<float>(),
                               vector_of("bias", bias, N, kept_bias),
                               residual_of(residual, output, kept_residual),
                               output.data_ptr<float>(),
                               N,
                               activation_of(activation)};
  with_scratch(input.rows, kRowsAtLeast, kernels().linear_scratch(problem),
               [&](int64_t begin, int64_t end, float* scratch) { kernels().linear(problem, begin, end, scratch); });
  return output;
}

at::Tensor feed_forward_cpu(const at::Tensor& x, const at::Tensor& weight1, const Optional& bias1,
                            const at::Tensor& weight2, const Optional& bias2, const Optional& residual,
                            int64_t activation) {
  check_weight("weight1", weight1, -1);
  const int64_t K = weight1.size(1), F = weight1.size(0), N = weight2.size(0);
  check_weight("weight2", weight2, F);
  const Input input(x, K);
  at::Tensor output = output_for(x, N), kept_bias1, kept_bias2, kept_residual;
  if (output.numel() == 0) return output;
  const at::Tensor ready1 = packed(weight1), ready2 = packed(weight2);
  const cpu::FeedForward problem = {input.places,
                                    input.rows,
                                    K,
                                    F,
                                    N,
                                    ready1.const_data_ptr<float>(),
                                    vector_of("bias1", bias1, F, kept_bias1),
                                    ready2.const_data_ptr<float>(),
                                    vector_of("bias2", bias2, N, kept_bias2),
                                    residual_of(residual, output, kept_residual),
                                    output.data_ptr<float>(),
                                    N,
                                    activation_of(activation)};
  with_scratch(
      input.rows, kRowsAtLeast, kernels().feed_forward_scratch(problem),
      [&](int64_t begin, int64_t end, float* scratch) { kernels().feed_forward(problem, begin, end, scratch); });
  return output;
}

at::Tensor convolution3x3_cpu(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, bool relu) {
  check_float("x", x);
  check_float("weight", weight);
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                        weight.size(1) == x.size(1),
                    "x (B, K, H, W) and weight (N, K, 3, 3) must agree, got ", x.sizes(), " and ", weight.sizes());
  const int64_t N = weight.size(0), K = weight.size(1);
  TORCH_CHECK_VALUE(N > 0 && K > 0 && N % kVectorFloats == 0 && K % kVectorFloats == 0,
                    "weight must have multiples of ", kVectorFloats, " channels, got ", weight.sizes());
  at::Tensor output =
      at::empty({x.size(0), N, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const at::Tensor maps = x.contiguous(at::MemoryFormat::ChannelsLast), dense = weight.contiguous();
  at::Tensor transformed = at::empty({kernels().transformed_floats(N, K)}, weight.options()), kept_bias;
  const float* from = dense.const_data_ptr<float>();
  float* to = transformed.data_ptr<float>();
  at::parallel_for(0, kernels().panels(N), 1,
                   [&](int64_t begin, int64_t end) { kernels().transform(from, N, K, to, begin, end); });
  const cpu::Convolution3x3 problem = {maps.const_data_ptr<float>(),
                                       x.size(0),
                                       x.size(2),
                                       x.size(3),
                                       K,
                                       N,
                                       transformed.const_data_ptr<float>(),
                                       vector_of("bias", bias, N, kept_bias),
                                       output.data_ptr<float>(),
                                       relu};
  with_scratch(
      kernels().convolution_blocks(problem), 1, kernels().convolution_scratch(problem),
      [&](int64_t begin, int64_t end, float* scratch) { kernels().convolution(problem, begin, end, scratch); });
  return output;
}

}  // namespace mask2former

// Tensors in, tensors out; the arithmetic is in products_kernel.h.
#include "../products.h"

#include <c10/util/Exception.h>

#include <vector>

#include "products.h"
#include "processor.h"
#include "share.h"

namespace mask2former {
namespace {

using cpu::Activation;
using cpu::ProductKernels;
using cpu::RowPlaces;
using Optional = std::optional<at::Tensor>;

constexpr int64_t kRows = 48;      // a piece of work
constexpr int64_t kFewRows = 192;  // up to which a panel of weights is packed where it is used
constexpr int64_t kPanel = 16;     // columns; a head has whole panels of them
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

// Weight and bias of a normalisation of rows of `size` numbers, or none.
struct Norm {
  at::Tensor kept[2];
  cpu::LayerNorm norm = {};

  Norm(const char* name, at::TensorList parts, double eps, int64_t size) {
    if (parts.empty()) return;
    TORCH_CHECK_VALUE(parts.size() == 2, name, " must be empty or weight and bias, got ", parts.size(), " tensors");
    norm = {vector_of(name, parts[0], size, kept[0]), vector_of(name, parts[1], size, kept[1]),
            static_cast<float>(eps)};
  }
};

// The rows (..., K) of a tensor, copied only if they cannot be read where they are, and what is made of them first.
struct Input {
  at::Tensor kept, kept_added;
  Norm norm;
  cpu::Rows rows;

  Input(const at::Tensor& x, int64_t K, const Optional& added, at::TensorList before, double eps)
      : kept(x), norm("norm_before", before, eps, K) {
    check_float("x", x);
    TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == K, "x must have shape (..., ", K, "), got ", x.sizes());
    if (x.dim() != 4 || x.stride(3) != 1) kept = x.contiguous().view({1, 1, -1, K});
    const RowPlaces places = {kept.const_data_ptr<float>(), kept.size(1),   kept.size(2),
                              kept.stride(0),               kept.stride(1), kept.stride(2)};
    rows = {places, kept.size(0) * kept.size(1) * kept.size(2), K, nullptr, 1, norm.norm};
    if (!added.has_value()) return;
    check_float("added", *added);
    TORCH_CHECK_VALUE(added->dim() == 2 && added->size(1) == K && added->size(0) > 0 && x.dim() >= 2 &&
                          added->size(0) == x.size(-2),
                      "added must have the last two sizes of x, ", x.sizes(), ", got ", added->sizes());
    kept_added = added->contiguous();
    rows.added = kept_added.const_data_ptr<float>();
    rows.period = added->size(0);
  }
};

void check_weight(const char* name, const at::Tensor& weight, int64_t columns) {
  check_float(name, weight);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0, name,
                    " must have shape (N, K), both at least 1, got ", weight.sizes());
  TORCH_CHECK_VALUE(columns < 0 || weight.size(1) == columns, name, " must have ", columns, " columns, got ",
                    weight.sizes());
}

// Packed weights, in memory that the next call for the same `Slot` overwrites.
template <int Slot>
const float* packed(const at::Tensor& weight) {
  static thread_local Workspace workspace;
  const at::Tensor dense = weight.contiguous();
  const int64_t N = weight.size(0), K = weight.size(1);
  const float* from = dense.const_data_ptr<float>();
  float* to = workspace.get<float>(kernels().packed_floats(N, K));
  share<float>(kernels().panels(N), 4, 0,
               [&](int64_t begin, int64_t end, float*) { kernels().pack(from, N, K, to, begin, end); });
  return to;
}

at::Tensor output_for(const at::Tensor& x, int64_t N) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  return x.new_empty(shape);
}

// What becomes of the sums of N columns, in a tensor whose rows lie side by side.
struct Result {
  at::Tensor kept[3];
  Norm norm;
  cpu::Output output;

  Result(at::Tensor& to, int64_t N, at::MemoryFormat order, const Optional& scale, const Optional& bias,
         const Optional& residual, int64_t activation, at::TensorList after = {}, double eps = 0)
      : norm("norm_after", after, eps, N) {
    const float* added = nullptr;
    if (residual.has_value()) {
      check_float("residual", *residual);
      TORCH_CHECK_VALUE(residual->sizes() == to.sizes(), "residual must have shape ", to.sizes(), ", got ",
                        residual->sizes());
      kept[0] = residual->contiguous(order);
      added = kept[0].const_data_ptr<float>();
    }
    output = {vector_of("scale", scale, N, kept[1]),
              vector_of("bias", bias, N, kept[2]),
              added,
              to.data_ptr<float>(),
              N,
              N,
              0,
              activation_of(activation),
              norm.norm};
  }
};

}  // namespace

bool has_product_kernels() { return capability() == "AVX2"; }

at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& weight, const Optional& bias, const Optional& residual,
                      int64_t activation, const Optional& added, at::TensorList norm_before, double eps_before,
                      at::TensorList norm_after, double eps_after, int64_t heads) {
  check_weight("weight", weight, -1);
  const int64_t N = weight.size(0), K = weight.size(1), panels = kernels().panels(N);
  const Input input(x, K, added, norm_before, eps_before);
  at::Tensor to = output_for(x, N);
  if (to.numel() == 0) return to;
  Result result(to, N, at::MemoryFormat::Contiguous, {}, bias, residual, activation, norm_after, eps_after);
  cpu::Output& output = result.output;
  if (heads > 0) {
    TORCH_CHECK_VALUE(x.dim() == 3 && x.size(0) == 1 && N % heads == 0 && N / heads % kPanel == 0 &&
                          !residual.has_value() && norm_after.empty(),
                      "heads must divide the weight's rows into multiples of ", kPanel,
                      ", without residual and norm_after, of x (1, S, K); got ", heads, " and ", x.sizes());
    output.step = output.head = N / heads;
    output.head_step = x.size(1) * output.head;
    to = to.view({1, heads, x.size(1), output.head});
  }
  const bool few = input.rows.count <= kFewRows && heads == 0 && norm_after.empty();
  const at::Tensor dense = weight.contiguous();
  const cpu::Linear problem = {input.rows, N, few ? dense.const_data_ptr<float>() : packed<0>(dense), output};
  if (few)
    share<float>(panels, panels / (4 * at::get_num_threads()) + 1, kernels().few_rows_scratch(problem),
                 [&](int64_t begin, int64_t end, float* scratch) { kernels().few_rows(problem, begin, end, scratch); });
  else
    share<float>(input.rows.count, kRows, kernels().linear_scratch(problem),
                 [&](int64_t begin, int64_t end, float* scratch) { kernels().linear(problem, begin, end, scratch); });
  return to;
}

at::Tensor feed_forward_cpu(const at::Tensor& x, const at::Tensor& weight1, const Optional& bias1,
                            const at::Tensor& weight2, const Optional& bias2, const Optional& residual,
                            int64_t activation, at::TensorList norm_before, double eps_before,
                            at::TensorList norm_after, double eps_after) {
  check_weight("weight1", weight1, -1);
  const int64_t K = weight1.size(1), F = weight1.size(0), N = weight2.size(0);
  check_weight("weight2", weight2, F);
  const Input input(x, K, {}, norm_before, eps_before);
  at::Tensor to = output_for(x, N), kept_bias;
  if (to.numel() == 0) return to;
  const Result result(to, N, at::MemoryFormat::Contiguous, {}, bias2, residual, 0, norm_after, eps_after);
  const cpu::FeedForward problem = {input.rows,
                                    F,
                                    N,
                                    packed<0>(weight1),
                                    vector_of("bias1", bias1, F, kept_bias),
                                    packed<1>(weight2),
                                    activation_of(activation),
                                    result.output};
  share<float>(
      input.rows.count, kRows, kernels().feed_forward_scratch(problem),
      [&](int64_t begin, int64_t end, float* scratch) { kernels().feed_forward(problem, begin, end, scratch); });
  return to;
}

at::Tensor convolution_cpu(const at::Tensor& x, const at::Tensor& weight, const Optional& scale, const Optional& bias,
                           const Optional& residual, at::IntArrayRef stride, at::IntArrayRef padding,
                           int64_t activation) {
  check_float("x", x);
  check_float("weight", weight);
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) && weight.numel() > 0,
                    "x (B, K, H, W) and weight (N, K, h, w) must agree, got ", x.sizes(), " and ", weight.sizes());
  int64_t size[2];
  for (int64_t i = 0; i < 2; ++i) {
    TORCH_CHECK_VALUE(stride.size() == 2 && stride[i] > 0 && padding.size() == 2 && padding[i] >= 0,
                      "stride must be two positive numbers and padding two not negative ones, got ", stride, " and ",
                      padding);
    const int64_t room = x.size(2 + i) + 2 * padding[i] - weight.size(2 + i);
    TORCH_CHECK_VALUE(room >= 0, "x with its padding must be as large as weight, got ", x.sizes(), ", ", padding,
                      " and ", weight.sizes());
    size[i] = room / stride[i] + 1;
  }
  const int64_t N = weight.size(0), K = weight.numel() / N, rows = x.size(0) * size[0] * size[1];
  at::Tensor to = x.new_empty({x.size(0), size[0], size[1], N}).permute({0, 3, 1, 2});
  if (to.numel() == 0) return to;
  const at::Tensor maps = x.contiguous(at::MemoryFormat::ChannelsLast), dense = weight.contiguous().view({N, K});
  const Result result(to, N, at::MemoryFormat::ChannelsLast, scale, bias, residual, activation);
  const cpu::Linear linear = {{{}, rows, K, nullptr, 1, {}}, N, packed<0>(dense), result.output};
  const cpu::Windows problem = {linear,         maps.const_data_ptr<float>(),
                                x.size(2),      x.size(3),
                                x.size(1),      size[0],
                                size[1],        weight.size(2),
                                weight.size(3), stride[0],
                                stride[1],      padding[0],
                                padding[1]};
  share<float>(rows, kRows, kernels().linear_scratch(linear),
               [&](int64_t begin, int64_t end, float* scratch) { kernels().windows(problem, begin, end, scratch); });
  return to;
}

at::Tensor convolution3x3_cpu(const at::Tensor& x, const at::Tensor& weight, const Optional& scale,
                              const Optional& bias, bool relu) {
  check_float("x", x);
  check_float("weight", weight);
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 &&
                        weight.size(1) == x.size(1),
                    "x (B, K, H, W) and weight (N, K, 3, 3) must agree, got ", x.sizes(), " and ", weight.sizes());
  const int64_t N = weight.size(0), K = weight.size(1);
  TORCH_CHECK_VALUE(N > 0 && K > 0 && N % kVectorFloats == 0 && K % kVectorFloats == 0,
                    "weight must have multiples of ", kVectorFloats, " channels, got ", weight.sizes());
  at::Tensor to = x.new_empty({x.size(0), x.size(2), x.size(3), N}).permute({0, 3, 1, 2});
  if (to.numel() == 0) return to;
  const at::Tensor maps = x.contiguous(at::MemoryFormat::ChannelsLast), dense = weight.contiguous();
  at::Tensor kept_scale, kept_bias;
  static thread_local Workspace workspace;
  const float* from = dense.const_data_ptr<float>();
  float* transformed = workspace.get<float>(kernels().transformed_floats(N, K));
  share<float>(kernels().panels(N), 1, 0,
               [&](int64_t begin, int64_t end, float*) { kernels().transform(from, N, K, transformed, begin, end); });
  const cpu::Convolution3x3 problem = {maps.const_data_ptr<float>(),
                                       x.size(0),
                                       x.size(2),
                                       x.size(3),
                                       K,
                                       N,
                                       transformed,
                                       vector_of("scale", scale, N, kept_scale),
                                       vector_of("bias", bias, N, kept_bias),
                                       to.data_ptr<float>(),
                                       relu};
  share<float>(
      kernels().convolution_blocks(problem), 1, kernels().convolution_scratch(problem),
      [&](int64_t begin, int64_t end, float* scratch) { kernels().convolution(problem, begin, end, scratch); });
  return to;
}

}  // namespace mask2former

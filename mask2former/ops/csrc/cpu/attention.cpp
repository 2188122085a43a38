// Tensors in, tensors out; the arithmetic is in attention_kernel.h.
#include "../attention.h"

#include <c10/util/Exception.h>

#include <cmath>

#include "attention.h"
#include "processor.h"
#include "share.h"

namespace mask2former {
namespace {

using cpu::AttentionKernels;
using cpu::AttentionRows;

constexpr int64_t kMostQueries = 102;  // of a task; with fewer a block of keys is turned for less work
constexpr int64_t kMostHeads = 12;     // of windows, a piece of work; each asks for the next one's numbers

// Without fused multiply-add instructions they would be slow.
AttentionKernels choose_kernels() {
  TORCH_CHECK(has_attention_kernels(), "this processor has no kernels of attention");
#if defined(__x86_64__)
  return capability() == "AVX512" ? cpu::attention_kernels_avx512() : cpu::attention_kernels_avx2();
#else
  return {};
#endif
}

void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu() && tensor.sizes() == shape, name,
                    " must be float32 on the CPU and have shape ", shape, ", got ", tensor.scalar_type(), " on ",
                    tensor.device(), " and ", tensor.sizes());
}

void check_heads(int64_t num_heads, int64_t channels) {
  TORCH_CHECK_VALUE(num_heads > 0 && channels > 0 && channels % num_heads == 0, "num_heads must divide ", channels,
                    " channels, got ", num_heads);
}

// The tensor, (B, n, C), copied only if its channels are apart.
AttentionRows rows_of(const at::Tensor& tensor, at::Tensor& kept) {
  kept = tensor.stride(2) == 1 ? tensor : tensor.contiguous();
  return {kept.const_data_ptr<float>(), kept.stride(0), kept.stride(1)};
}

}  // namespace

bool has_attention_kernels() { return has_wide_vectors(); }

at::Tensor attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t num_heads,
                         const std::optional<at::Tensor>& blocked) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && k.size(1) > 0, "q and k must be (B, Q, C) and (B, S, C), S at ",
                    "least 1, got ", q.sizes(), " and ", k.sizes());
  const int64_t B = q.size(0), Q = q.size(1), C = q.size(2), S = k.size(1);
  check_shape("q", q, {B, Q, C});
  check_shape("k", k, {B, S, C});
  check_shape("v", v, {B, S, C});
  check_heads(num_heads, C);
  at::Tensor kept[4], out = q.new_empty({B, Q, C});
  if (out.numel() == 0) return out;
  if (blocked.has_value()) {
    TORCH_CHECK_VALUE(blocked->scalar_type() == at::kBool && blocked->device().is_cpu() &&
                          blocked->sizes() == at::IntArrayRef({B, Q, S}),
                      "blocked must be bool on the CPU and have shape ", at::IntArrayRef({B, Q, S}), ", got ",
                      blocked->scalar_type(), " on ", blocked->device(), " and ", blocked->sizes());
    kept[3] = blocked->contiguous();
  }
  const AttentionKernels kernels = choose_kernels();
  // about four tasks a thread, but blocks of queries of which each pays for turning the keys
  const int64_t parts = (4 * at::get_num_threads() + B * num_heads - 1) / (B * num_heads);
  const int64_t most = std::max(kMostQueries / 4, std::min(kMostQueries, (Q + parts - 1) / parts));
  const int64_t blocks = (Q + most - 1) / most;
  const cpu::Attention problem = {rows_of(q, kept[0]),
                                  rows_of(k, kept[1]),
                                  rows_of(v, kept[2]),
                                  B,
                                  Q,
                                  S,
                                  num_heads,
                                  C / num_heads,
                                  1 / std::sqrt(static_cast<float>(C / num_heads)),
                                  blocked.has_value() ? kept[3].const_data_ptr<bool>() : nullptr,
                                  out.data_ptr<float>(),
                                  (Q + blocks - 1) / blocks};
  share<float>(kernels.attention_tasks(problem), 1, kernels.attention_scratch(problem),
               [&](int64_t begin, int64_t end, float* scratch) { kernels.attention(problem, begin, end, scratch); });
  return out;
}

at::Tensor window_attention_cpu(const at::Tensor& qkv, const std::optional<at::Tensor>& qkv_bias,
                                const at::Tensor& position_bias, int64_t num_heads, int64_t side, int64_t shift,
                                double scale) {
  TORCH_CHECK_VALUE(qkv.dim() == 4 && qkv.size(3) % 3 == 0, "qkv must have shape (B, H, W, 3 C), got ", qkv.sizes());
  const int64_t B = qkv.size(0), H = qkv.size(1), W = qkv.size(2), C = qkv.size(3) / 3, T = side * side;
  check_shape("qkv", qkv, {B, H, W, 3 * C});
  check_heads(num_heads, C);
  TORCH_CHECK_VALUE(side > 0 && shift >= 0 && shift < side, "side must be positive and shift in [0, side), got ", side,
                    " and ", shift);
  check_shape("position_bias", position_bias, {num_heads, T, T});
  if (qkv_bias.has_value()) check_shape("qkv_bias", *qkv_bias, {3 * C});
  at::Tensor out = qkv.new_empty({B, H, W, C});
  if (out.numel() == 0) return out;
  const at::Tensor map = qkv.contiguous(), bias = position_bias.contiguous();
  const at::Tensor padding = qkv_bias.has_value() ? qkv_bias->contiguous() : qkv.new_zeros({3 * C});
  const AttentionKernels kernels = choose_kernels();
  const cpu::WindowAttention problem = {map.const_data_ptr<float>(),
                                        padding.const_data_ptr<float>(),
                                        bias.const_data_ptr<float>(),
                                        B,
                                        H,
                                        W,
                                        num_heads,
                                        C / num_heads,
                                        side,
                                        shift,
                                        static_cast<float>(scale),
                                        out.data_ptr<float>()};
  const int64_t tasks = kernels.windows_tasks(problem);
  const int64_t piece = std::max<int64_t>(1, std::min(kMostHeads, tasks / (8 * at::get_num_threads())));
  share<float>(tasks, piece, kernels.windows_scratch(problem),
               [&](int64_t begin, int64_t end, float* scratch) { kernels.windows(problem, begin, end, scratch); });
  return out;
}

}  // namespace mask2former

// Attention in float32 without gradients: the entries that library.cpp registers, on CPUs only.
// mask2former/ops/attention.py has the contracts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace mask2former {

// Whether this processor has kernels for them; without, the other entries raise.
bool has_attention_kernels();
at::Tensor attention_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t num_heads,
                         const std::optional<at::Tensor>& blocked);
at::Tensor window_attention_cpu(const at::Tensor& qkv, const std::optional<at::Tensor>& qkv_bias,
                                const at::Tensor& position_bias, int64_t num_heads, int64_t side, int64_t shift,
                                double scale);

}  // namespace mask2former

// Products of float32 matrices with what follows them: the entries that library.cpp registers, on CPUs only.
// mask2former/ops/fused.py has the contracts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace mask2former {

// Whether this processor has kernels for them; without, the other entries raise.
bool has_product_kernels();
at::Tensor linear_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& residual, int64_t activation,
                      const std::optional<at::Tensor>& added, at::TensorList norm_before, double eps_before,
                      at::TensorList norm_after, double eps_after, int64_t heads);
at::Tensor feed_forward_cpu(const at::Tensor& x, const at::Tensor& weight1, const std::optional<at::Tensor>& bias1,
                            const at::Tensor& weight2, const std::optional<at::Tensor>& bias2,
                            const std::optional<at::Tensor>& residual, int64_t activation, at::TensorList norm_before,
                            double eps_before, at::TensorList norm_after, double eps_after);
at::Tensor convolution_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                           at::IntArrayRef stride, at::IntArrayRef padding, int64_t activation);
at::Tensor convolution3x3_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scale,
                              const std::optional<at::Tensor>& bias, bool relu);

}  // namespace mask2former

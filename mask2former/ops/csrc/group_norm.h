// Group normalisation of maps in channels-last order: the entry that library.cpp registers, on CPUs with product kernels
// only. mask2former/ops/fused.py has the contract.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace mask2former {

// In place: x (B, C, H, W) normalised, plus `coarse` (B, C, h, w) resized bilinearly, then a ReLU if wanted.
void group_norm_cpu_(at::Tensor& x, int64_t groups, const at::Tensor& weight, const at::Tensor& bias, double eps,
                     const std::optional<at::Tensor>& coarse, bool relu);

}  // namespace mask2former

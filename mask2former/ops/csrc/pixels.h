// Post-processing: the entries that library.cpp registers, on CPUs only. mask2former/ops/pixels.py has the contracts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace mask2former {

// Whether this processor has kernels for them; without, the other entries raise.
bool has_pixel_kernels();
// Each axis is (first, second) int64 and (first weight, second weight) float32, or empty lists.
at::Tensor blend_cpu(const at::Tensor& maps, at::TensorList columns, at::TensorList rows, int64_t width);
std::tuple<at::Tensor, at::Tensor> largest_cpu(const at::Tensor& scores);
at::Tensor class_scores_cpu(const at::Tensor& logits, const at::Tensor& probability, bool labels);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> inside_cpu(const at::Tensor& logits);

}  // namespace mask2former

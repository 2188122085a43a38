// Random points of the training loss: the entries that library.cpp registers, on CPUs only. All floats are float32; a row
// is a matched pair of a predicted and a true mask. mask2former/ops/mask_points.py has the contracts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace mask2former {

at::Tensor uncertain_points_cpu(const at::Tensor& mask_logits, const at::Tensor& candidates, int64_t count);
at::Tensor drawn_points_cpu(const at::Tensor& mask_logits, int64_t seed, int64_t candidates, int64_t uncertain,
                            int64_t others);
// The sums (T, 4), and for the backward pass sigmoid and true mask at the points, (T, P) each.
std::tuple<at::Tensor, at::Tensor, at::Tensor> mask_loss_sums_cpu(const at::Tensor& mask_logits,
                                                                  const at::Tensor& points, at::TensorList masks,
                                                                  at::IntArrayRef counts, const at::Tensor& index,
                                                                  at::IntArrayRef canvas);
at::Tensor mask_loss_sums_backward_cpu(const at::Tensor& grad_sums, const at::Tensor& probability,
                                       const at::Tensor& target, const at::Tensor& points, at::IntArrayRef size);
// Of one image, see mask2former/ops/matching.py: softplus and sigmoid (R), x t and p t (R, N), t (N).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pair_sums_cpu(const at::Tensor& embeddings,
                                                                                     const at::Tensor& features,
                                                                                     const at::Tensor& points,
                                                                                     const at::Tensor& masks,
                                                                                     at::IntArrayRef canvas);
std::tuple<at::Tensor, at::Tensor> sigmoid_and_softplus_sum_cpu(const at::Tensor& logits);

}  // namespace mask2former

// Multi-scale deformable attention: the entries that library.cpp registers, one set a device.
//
// Shapes, as in mask2former/ops/ms_deform_attn.py:
//   value (B, S, M, D); spatial_shapes h0, w0, h1, w1, ... of the L levels; output (B, Q, M * D)
//   points (B, Q, M, L, P, 2) and scores (B, Q, M, L, P), both in the type that sums are made in (float, or double where
//   value is double):
//     plain: sampling locations, (x, y) in [0, 1] of the level, and attention weights;
//     fused: offsets from the query's own cell, (x, y) in pixels of the level, and attention logits; Q = S.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace mask2former {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of value, points, scores

// Sizes of one call, read from the tensors and checked against each other.
struct Sizes {
  int64_t B, S, M, D, Q, L, P;
};

Sizes check_inputs(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& points,
                   const at::Tensor& scores, bool fused);

at::Tensor forward_cpu(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& points,
                       const at::Tensor& scores, bool fused);
Gradients backward_cpu(const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
                       const at::Tensor& points, const at::Tensor& scores, bool fused);

#ifdef MASK2FORMER_WITH_CUDA
at::Tensor forward_cuda(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& points,
                        const at::Tensor& scores, bool fused);
Gradients backward_cuda(const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef spatial_shapes,
                        const at::Tensor& points, const at::Tensor& scores, bool fused);
// Architectures compiled in, as nvcc counts them: 900 is sm_90. Returns how many.
int64_t cuda_architectures(const int** list);
#endif

}  // namespace mask2former

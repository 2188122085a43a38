// Operator schemas and the Python module. Importing mask2former._C registers the operators; the module itself holds only
// what was compiled in. Fake kernels and gradients are registered from Python.
#include "attention.h"
#include "group_norm.h"
#include "ms_deform_attn.h"
#include "pixels.h"
#include "points.h"
#include "products.h"

#include <Python.h>
#include <c10/util/Exception.h>
#include <torch/library.h>
#include <torch/version.h>

#include <limits>
#include <string>

namespace mask2former {

Sizes check_inputs(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& points,
                   const at::Tensor& scores, bool fused) {
  // Python has checked all this with better words; here it keeps direct calls of torch.ops from reading wild memory.
  TORCH_CHECK_VALUE(value.dim() == 4 && points.dim() == 6 && scores.dim() == 5 && points.size(5) == 2,
                    "value, points and scores must have 4, 6 and 5 dimensions, got ", value.sizes(), ", ",
                    points.sizes(), " and ", scores.sizes());
  const Sizes n{value.size(0),  value.size(1),  value.size(2), value.size(3),
                points.size(1), points.size(3), points.size(4)};
  TORCH_CHECK_VALUE(points.size(0) == n.B && points.size(2) == n.M && scores.sizes() == points.sizes().slice(0, 5),
                    "points and scores must agree with value, got ", value.sizes(), ", ", points.sizes(), " and ",
                    scores.sizes());
  TORCH_CHECK_VALUE(static_cast<int64_t>(spatial_shapes.size()) == 2 * n.L && n.L > 0,
                    "spatial_shapes must be h, w of each of L = ", n.L, " levels, got ", spatial_shapes);
  int64_t total = 0;
  for (int64_t level = 0; level < n.L; ++level) {
    const int64_t h = spatial_shapes[2 * level], w = spatial_shapes[2 * level + 1];
    TORCH_CHECK_VALUE(h > 0 && w > 0, "spatial_shapes must be at least 1, got ", spatial_shapes);
    total += h * w;
  }
  TORCH_CHECK_VALUE(total == n.S && n.S <= std::numeric_limits<int32_t>::max(),
                    "spatial_shapes must add up to S = ", n.S, " (below 2^31), got ", spatial_shapes);
  TORCH_CHECK_VALUE(!fused || n.Q == n.S, "the fused entry must have a query a cell, S = ", n.S, ", got ", n.Q);
  const auto sum_type = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(points.scalar_type() == sum_type && scores.scalar_type() == sum_type,
                    "points and scores must be ", sum_type, ", got ", points.scalar_type(), " and ",
                    scores.scalar_type());
  TORCH_CHECK_VALUE(points.device() == value.device() && scores.device() == value.device(),
                    "points and scores must be on ", value.device(), ", got ", points.device(), " and ",
                    scores.device());
  return n;
}

namespace {

#define MASK2FORMER_ENTRIES(device)                                                                                 \
  at::Tensor forward_plain_##device(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& locations,   \
                                    const at::Tensor& weights) {                                                    \
    return forward_##device(value, shapes, locations, weights, false);                                              \
  }                                                                                                                 \
  at::Tensor forward_fused_##device(const at::Tensor& value, at::IntArrayRef shapes, const at::Tensor& offsets,     \
                                    const at::Tensor& logits) {                                                     \
    return forward_##device(value, shapes, offsets, logits, true);                                                  \
  }                                                                                                                 \
  Gradients backward_plain_##device(const at::Tensor& grad, const at::Tensor& value, at::IntArrayRef shapes,        \
                                    const at::Tensor& locations, const at::Tensor& weights) {                       \
    return backward_##device(grad, value, shapes, locations, weights, false);                                       \
  }                                                                                                                 \
  Gradients backward_fused_##device(const at::Tensor& grad, const at::Tensor& value, at::IntArrayRef shapes,        \
                                    const at::Tensor& offsets, const at::Tensor& logits) {                          \
    return backward_##device(grad, value, shapes, offsets, logits, true);                                           \
  }

MASK2FORMER_ENTRIES(cpu)
#ifdef MASK2FORMER_WITH_CUDA
MASK2FORMER_ENTRIES(cuda)
#endif

}  // namespace

// SymInt, so that one compiled graph can serve several image sizes.
TORCH_LIBRARY(mask2former, m) {
  m.def("ms_deform_attn_forward(Tensor value, SymInt[] spatial_shapes, Tensor locations, Tensor weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor locations, "
      "Tensor weights) -> (Tensor, Tensor, Tensor)");
  m.def("ms_deform_attn_fused_forward(Tensor value, SymInt[] spatial_shapes, Tensor offsets, Tensor logits) -> Tensor");
  m.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor offsets, "
      "Tensor logits) -> (Tensor, Tensor, Tensor)");
  m.def("uncertain_points(Tensor mask_logits, Tensor candidates, SymInt count) -> Tensor");
  m.def(
      "drawn_points(Tensor mask_logits, SymInt seed, SymInt candidates, SymInt uncertain, SymInt others) -> Tensor");
  m.def(
      "mask_loss_sums(Tensor mask_logits, Tensor points, Tensor[] masks, SymInt[] counts, Tensor index, SymInt[] canvas) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "mask_loss_sums_backward(Tensor grad_sums, Tensor probability, Tensor target, Tensor points, SymInt[] size) "
      "-> Tensor");
  m.def(
      "pair_sums(Tensor embeddings, Tensor features, Tensor points, Tensor masks, SymInt[] canvas) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sigmoid_and_softplus_sum(Tensor logits) -> (Tensor, Tensor)");
  m.def("has_pixel_kernels() -> bool", &has_pixel_kernels);
  m.def("blend(Tensor maps, Tensor[] columns, Tensor[] rows, int width) -> Tensor");
  m.def("largest(Tensor scores) -> (Tensor, Tensor)");
  m.def("class_scores(Tensor logits, Tensor probability, bool labels) -> Tensor");
  m.def("inside(Tensor logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("has_product_kernels() -> bool", &has_product_kernels);
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int activation, Tensor? added, "
      "Tensor[] norm_before, float eps_before, Tensor[] norm_after, float eps_after, int heads) -> Tensor");
  m.def(
      "feed_forward(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? residual, "
      "int activation, Tensor[] norm_before, float eps_before, Tensor[] norm_after, float eps_after) "
      "-> Tensor");
  m.def(
      "convolution(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, int[2] stride, "
      "int[2] padding, int activation) -> Tensor");
  m.def("convolution3x3(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, bool relu) -> Tensor");
  m.def(
      "group_norm_(Tensor(a!) x, int groups, Tensor weight, Tensor bias, float eps, Tensor? coarse, bool relu) -> ()");
  m.def("has_attention_kernels() -> bool", &has_attention_kernels);
  m.def("attention(Tensor q, Tensor k, Tensor v, int num_heads, Tensor? blocked) -> Tensor");
  m.def(
      "window_attention(Tensor qkv, Tensor? qkv_bias, Tensor position_bias, int num_heads, int side, int shift, "
      "float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(mask2former, CPU, m) {
  m.impl("ms_deform_attn_forward", &forward_plain_cpu);
  m.impl("ms_deform_attn_backward", &backward_plain_cpu);
  m.impl("ms_deform_attn_fused_forward", &forward_fused_cpu);
  m.impl("ms_deform_attn_fused_backward", &backward_fused_cpu);
  m.impl("uncertain_points", &uncertain_points_cpu);
  m.impl("drawn_points", &drawn_points_cpu);
  m.impl("mask_loss_sums", &mask_loss_sums_cpu);
  m.impl("mask_loss_sums_backward", &mask_loss_sums_backward_cpu);
  m.impl("pair_sums", &pair_sums_cpu);
  m.impl("sigmoid_and_softplus_sum", &sigmoid_and_softplus_sum_cpu);
  m.impl("blend", &blend_cpu);
  m.impl("largest", &largest_cpu);
  m.impl("class_scores", &class_scores_cpu);
  m.impl("inside", &inside_cpu);
  m.impl("linear", &linear_cpu);
  m.impl("feed_forward", &feed_forward_cpu);
  m.impl("convolution", &convolution_cpu);
  m.impl("group_norm_", &group_norm_cpu_);
  m.impl("convolution3x3", &convolution3x3_cpu);
  m.impl("attention", &attention_cpu);
  m.impl("window_attention", &window_attention_cpu);
}

#ifdef MASK2FORMER_WITH_CUDA
TORCH_LIBRARY_IMPL(mask2former, CUDA, m) {
  m.impl("ms_deform_attn_forward", &forward_plain_cuda);
  m.impl("ms_deform_attn_backward", &backward_plain_cuda);
  m.impl("ms_deform_attn_fused_forward", &forward_fused_cuda);
  m.impl("ms_deform_attn_fused_backward", &backward_fused_cuda);
}
#endif

}  // namespace mask2former

#ifndef MASK2FORMER_CUDA_VERSION
#define MASK2FORMER_CUDA_VERSION ""
#endif
#ifndef MASK2FORMER_CUDA_PTX
#define MASK2FORMER_CUDA_PTX 0
#endif

// torch_version: PyTorch compiled against; cuda_version: "" or "13.0"; cuda_archs: "800,900" compiled in;
// cuda_ptx: 1 if newer devices can compile the newest of them for themselves.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "Native kernels of mask2former.ops.", -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  std::string archs;
#ifdef MASK2FORMER_WITH_CUDA
  const int* list = nullptr;
  const int64_t count = mask2former::cuda_architectures(&list);
  for (int64_t i = 0; i < count; ++i) archs += (i ? "," : "") + std::to_string(list[i]);
#endif
  if (PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "cuda_version", MASK2FORMER_CUDA_VERSION) < 0 ||
      PyModule_AddStringConstant(module, "cuda_archs", archs.c_str()) < 0 ||
      PyModule_AddIntConstant(module, "cuda_ptx", MASK2FORMER_CUDA_PTX) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}

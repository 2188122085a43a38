// Tensors in, tensors out; the arithmetic is in pixels_kernel.h.
#include "../pixels.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>

#include "pixels.h"
#include "processor.h"
#include "share.h"

namespace mask2former {
namespace {

using cpu::Axis;
using cpu::PixelKernels;

constexpr int64_t kPixelsAtLeast = 4096;  // of a thread
constexpr int64_t kClassTasks = 16;       // a piece of work

// Without fused multiply-add instructions they would be slow.
PixelKernels choose_kernels() {
  TORCH_CHECK(has_pixel_kernels(), "this processor has no kernels of pixels");
#if defined(__x86_64__)
  return capability() == "AVX512" ? cpu::pixel_kernels_avx512() : cpu::pixel_kernels_avx2();
#else
  return {};
#endif
}

// An axis of a call, checked: places that are not there would be read from wild memory.
struct Places {
  std::array<at::Tensor, 4> kept;
  Axis axis = {};

  Places(const char* name, at::TensorList parts, int64_t source, int64_t size_without) {
    axis.size = size_without;
    if (parts.empty()) {
      TORCH_CHECK_VALUE(size_without <= source, name, " must have places for more than ", source, " numbers");
      return;
    }
    TORCH_CHECK_VALUE(parts.size() == 4, name, " must be empty or four tensors, got ", parts.size());
    axis.size = parts[0].numel();
    for (size_t i = 0; i < 4; ++i) {
      const at::ScalarType type = i < 2 ? at::kLong : at::kFloat;
      TORCH_CHECK_VALUE(parts[i].dim() == 1 && parts[i].numel() == axis.size && parts[i].scalar_type() == type, name,
                        " must be two int64 and two float32 vectors of one size, got ", parts[i].sizes(), " ",
                        parts[i].scalar_type());
      kept[i] = parts[i].contiguous();
    }
    for (size_t i = 0; i < 2; ++i) {
      const int64_t* place = kept[i].const_data_ptr<int64_t>();
      for (int64_t k = 0; k < axis.size; ++k)
        TORCH_CHECK_VALUE(place[k] >= 0 && place[k] < source, name, " must be places in [0, ", source, "), got ",
                          place[k]);
    }
    axis.first = kept[0].const_data_ptr<int64_t>();
    axis.second = kept[1].const_data_ptr<int64_t>();
    axis.first_weight = kept[2].const_data_ptr<float>();
    axis.second_weight = kept[3].const_data_ptr<float>();
  }
};

}  // namespace

bool has_pixel_kernels() { return has_wide_vectors(); }

at::Tensor blend_cpu(const at::Tensor& maps, at::TensorList columns, at::TensorList rows, int64_t width) {
  TORCH_CHECK_VALUE(maps.dim() == 3 && maps.scalar_type() == at::kFloat, "maps must be (N, h, w) float32, got ",
                    maps.sizes(), " ", maps.scalar_type());
  const at::Tensor source = maps.stride(2) == 1 ? maps : maps.contiguous();
  const Places across("columns", columns, maps.size(2), width), down("rows", rows, maps.size(1), maps.size(1));
  at::Tensor out = maps.new_empty({maps.size(0), down.axis.size, across.axis.size});
  if (out.numel() == 0) return out;
  const cpu::Blend problem = {source.const_data_ptr<float>(), source.stride(0), source.stride(1),   maps.size(1),
                              maps.size(2),                   down.axis,        across.axis, out.data_ptr<float>()};
  const PixelKernels kernels = choose_kernels();
  const int64_t grain = 1 + kPixelsAtLeast / (down.axis.size * across.axis.size);
  share<float>(maps.size(0), grain, kernels.blend_scratch(problem),
               [&](int64_t begin, int64_t end, float* scratch) { kernels.blend(problem, begin, end, scratch); });
  return out;
}

std::tuple<at::Tensor, at::Tensor> largest_cpu(const at::Tensor& scores_) {
  TORCH_CHECK_VALUE(scores_.dim() == 2 && scores_.size(0) > 0 && scores_.scalar_type() == at::kFloat,
                    "scores must be (N, P) float32 with N at least 1, got ", scores_.sizes(), " ",
                    scores_.scalar_type());
  const at::Tensor scores = scores_.stride(1) == 1 ? scores_ : scores_.contiguous();
  at::Tensor values = scores.new_empty({scores.size(1)});
  at::Tensor places = scores.new_empty({scores.size(1)}, at::kLong);
  const PixelKernels kernels = choose_kernels();
  const float* from = scores.const_data_ptr<float>();
  float* value = values.data_ptr<float>();
  int64_t* place = places.data_ptr<int64_t>();
  share<float>(scores.size(1), kPixelsAtLeast, 0, [&](int64_t begin, int64_t end, float*) {
    kernels.largest(from, scores.size(0), scores.stride(0), begin, end, value, place);
  });
  return {values, places};
}

at::Tensor class_scores_cpu(const at::Tensor& logits_, const at::Tensor& probability, bool labels) {
  for (const at::Tensor* x : {&logits_, &probability})
    TORCH_CHECK_VALUE(x->dim() == 2 && x->scalar_type() == at::kFloat && x->device().is_cpu(),
                      "logits and probability must be (Q, P) and (Q, K) float32 on the CPU, got ", x->sizes(), " ",
                      x->scalar_type(), " on ", x->device());
  const int64_t Q = probability.size(0), K = probability.size(1), pixels = logits_.size(1);
  TORCH_CHECK_VALUE(logits_.size(0) == Q && K > 0, "logits must have as many rows as probability, which must have a ",
                    "column, got ", logits_.sizes(), " and ", probability.sizes());
  const at::Tensor logits = logits_.stride(1) == 1 ? logits_ : logits_.contiguous();
  const int64_t rows = (K + cpu::kClassRows - 1) / cpu::kClassRows * cpu::kClassRows;
  const at::Tensor weights = logits.new_zeros({rows, Q});
  weights.narrow(0, 0, K).copy_(probability.t());
  at::Tensor out = labels ? logits.new_empty({pixels}, at::kInt) : logits.new_empty({K, pixels});
  const cpu::ClassScores problem = {logits.const_data_ptr<float>(),
                                    logits.stride(0),
                                    Q,
                                    K,
                                    pixels,
                                    weights.const_data_ptr<float>(),
                                    labels ? nullptr : out.data_ptr<float>(),
                                    labels ? out.data_ptr<int32_t>() : nullptr};
  const PixelKernels kernels = choose_kernels();
  share<float>((pixels + cpu::kClassPixels - 1) / cpu::kClassPixels, kClassTasks, kernels.class_scratch(problem),
               [&](int64_t begin, int64_t end, float* scratch) { kernels.class_scores(problem, begin, end, scratch); });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> inside_cpu(const at::Tensor& logits_) {
  TORCH_CHECK_VALUE(logits_.dim() == 3 && logits_.scalar_type() == at::kFloat, "logits must be (N, R, W) float32, got ",
                    logits_.sizes(), " ", logits_.scalar_type());
  const at::Tensor logits = logits_.contiguous();
  const int64_t N = logits.size(0), height = logits.size(1), width = logits.size(2);
  at::Tensor masks = logits.new_empty({N, height, width}, at::kByte);
  at::Tensor columns = logits.new_empty({N, width}, at::kByte);
  at::Tensor rows = logits.new_empty({N, height}, at::kByte);
  at::Tensor areas = logits.new_empty({N}, at::kLong), sums = logits.new_empty({N});
  const cpu::Inside problem = {logits.const_data_ptr<float>(), height,
                               width,                          masks.data_ptr<uint8_t>(),
                               columns.data_ptr<uint8_t>(),    rows.data_ptr<uint8_t>(),
                               areas.data_ptr<int64_t>(),      sums.data_ptr<float>()};
  const PixelKernels kernels = choose_kernels();
  share<float>(N, 1 + kPixelsAtLeast / std::max<int64_t>(1, height * width), 0,
               [&](int64_t begin, int64_t end, float*) { kernels.inside(problem, begin, end); });
  return {masks.view(at::kBool), columns.view(at::kBool), rows.view(at::kBool), areas, sums};
}

}  // namespace mask2former

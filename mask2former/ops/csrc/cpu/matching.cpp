// Tensors in, tensors out; the arithmetic is in matching_kernel.h.
#include "matching.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../points.h"
#include "processor.h"
#include "share.h"

namespace mask2former {
namespace {

using cpu::MatchingKernels;

constexpr int64_t kGroupRows = 96;  // whose embeddings and sums stay in the cache, and a unit of work of a thread

MatchingKernels choose_kernels() {
#if defined(__x86_64__)
  if (capability() == "AVX512") return cpu::matching_kernels_avx512();
  if (capability() == "AVX2") return cpu::matching_kernels_avx2();
#endif
  return cpu::matching_kernels_default();
}

// Python has checked all this with better words; here it keeps direct calls of torch.ops from reading wild memory.
void check_image(const at::Tensor& embeddings, const at::Tensor& features, const at::Tensor& points,
                 const at::Tensor& masks, at::IntArrayRef canvas) {
  TORCH_CHECK_VALUE(embeddings.dim() == 2 && features.dim() == 3 && points.dim() == 2 && points.size(1) == 2 &&
                        embeddings.size(1) == features.size(0) && features.numel() > 0,
                    "embeddings (R, C), features (C, h, w) and points (P, 2) must agree, got ", embeddings.sizes(),
                    ", ", features.sizes(), " and ", points.sizes());
  TORCH_CHECK_VALUE(embeddings.scalar_type() == at::kFloat && features.scalar_type() == at::kFloat &&
                        points.scalar_type() == at::kFloat,
                    "embeddings, features and points must be float32, got ", embeddings.scalar_type(), ", ",
                    features.scalar_type(), " and ", points.scalar_type());
  TORCH_CHECK_VALUE(masks.dim() == 3 && (masks.scalar_type() == at::kBool || masks.scalar_type() == at::kByte) &&
                        (masks.size(0) == 0 || masks.numel() > 0),
                    "masks must be (N, H, W) bool or uint8, and none empty, got ", masks.sizes(), " ",
                    masks.scalar_type());
  TORCH_CHECK_VALUE((features.size(1) + 2) * (features.size(2) + 2) <= std::numeric_limits<int32_t>::max() &&
                        masks.size(1) * masks.size(2) <= std::numeric_limits<int32_t>::max(),
                    "features and masks must have fewer than 2^31 cells each, got ", features.sizes(), " and ",
                    masks.sizes());
  TORCH_CHECK_VALUE(canvas.size() == 2, "canvas must be (height, width), got ", canvas);
}

// (tiles, C, tile_points): all channels at the points.
at::Tensor read_features(const MatchingKernels& kernels, const at::Tensor& features, const at::Tensor& points) {
  const int64_t C = features.size(0), height = features.size(1), width = features.size(2), count = points.size(0);
  const int64_t tile = kernels.tile_points(), tiles = (count + tile - 1) / tile;
  at::Tensor panels = features.new_empty({tiles, C, tile});
  float* output = panels.data_ptr<float>();
  const float *maps = features.const_data_ptr<float>(), *where = points.const_data_ptr<float>();
  share<float>(C, 1, kernels.map_floats(height, width), [&](int64_t begin, int64_t end, float* scratch) {
    for (int64_t c = begin; c < end; ++c)
      kernels.read_channel(maps + c * height * width, height, width, where, count, C, output + c * tile,
                           scratch);
  });
  return panels;
}

// (tiles, N, tile_points): all masks at the points; `sums` (N).
at::Tensor read_masks(const MatchingKernels& kernels, const at::Tensor& masks, const at::Tensor& points,
                      at::IntArrayRef canvas, float* sums) {
  const int64_t N = masks.size(0), height = masks.size(1), width = masks.size(2), count = points.size(0);
  const int64_t tile = kernels.tile_points(), tiles = (count + tile - 1) / tile;
  at::Tensor panels = points.new_empty({tiles, N, tile});
  float* output = panels.data_ptr<float>();
  const uint8_t* first = static_cast<const uint8_t*>(masks.const_data_ptr());
  const float* where = points.const_data_ptr<float>();
  share<float>(N, 1, 0, [&](int64_t begin, int64_t end, float*) {
    for (int64_t n = begin; n < end; ++n) {
      const cpu::PointRow mask{nullptr, 0, 0, first + n * height * width, height, width, static_cast<float>(canvas[0]),
                               static_cast<float>(canvas[1]), where, count};
      sums[n] = kernels.read_mask(mask, N, output + n * tile);
    }
  });
  return panels;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pair_sums_cpu(
    const at::Tensor& embeddings_, const at::Tensor& features_, const at::Tensor& points_, const at::Tensor& masks_,
    at::IntArrayRef canvas) {
  check_image(embeddings_, features_, points_, masks_, canvas);
  const at::Tensor embeddings = embeddings_.contiguous(), features = features_.contiguous();
  const at::Tensor points = points_.contiguous(), masks = masks_.contiguous();
  const int64_t R = embeddings.size(0), C = embeddings.size(1), N = masks.size(0), count = points.size(0);
  at::Tensor softplus = embeddings.new_empty({R}), predicted = embeddings.new_empty({R});
  at::Tensor wanted = embeddings.new_empty({N});
  at::Tensor inner = embeddings.new_empty({R, N}), overlap = embeddings.new_empty({R, N});
  const MatchingKernels kernels = choose_kernels();
  const at::Tensor at_points = read_features(kernels, features, points);
  const at::Tensor targets = read_masks(kernels, masks, points, canvas, wanted.data_ptr<float>());
  const float *rows = embeddings.const_data_ptr<float>(), *f = at_points.const_data_ptr<float>();
  const float* t = targets.const_data_ptr<float>();
  const int64_t groups = (R + kGroupRows - 1) / kGroupRows;
  float *s = softplus.data_ptr<float>(), *p = predicted.data_ptr<float>();
  float *x = inner.data_ptr<float>(), *o = overlap.data_ptr<float>();
  share<char>(groups, 1, kernels.group_bytes(kGroupRows, C, N), [&](int64_t begin, int64_t end, char* block) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * kGroupRows, size = std::min(kGroupRows, R - first);
      const cpu::MatchingGroup group{rows + first * C, f, t, size, C, N, count, s + first, p + first, x + first * N,
                                     o + first * N};
      kernels.pair_sums(group, block);
    }
  });
  return {softplus, predicted, inner, overlap, wanted};
}

}  // namespace mask2former

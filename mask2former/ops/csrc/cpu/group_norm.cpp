// Tensors in, tensors out; the arithmetic is in group_norm_kernel.h.
#include "../group_norm.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "../products.h"
#include "group_norm.h"
#include "share.h"

namespace mask2former {
namespace {

constexpr int64_t kPixels = 512;  // a piece of work
constexpr int64_t kLanes = 8;

const cpu::GroupNormKernels& kernels() {
#if defined(__x86_64__)
  static const cpu::GroupNormKernels chosen = cpu::group_norm_kernels_avx2();
  TORCH_CHECK(has_product_kernels(), "this processor has no kernels of group normalisation");
  return chosen;
#else
  TORCH_CHECK(false, "this processor has no kernels of group normalisation");
#endif
}

void check_maps(const char* name, const at::Tensor& maps, const at::Tensor& x) {
  TORCH_CHECK_VALUE(maps.dim() == 4 && maps.scalar_type() == at::kFloat && maps.device().is_cpu() &&
                        maps.is_contiguous(at::MemoryFormat::ChannelsLast) && maps.size(0) == x.size(0) &&
                        maps.size(1) == x.size(1) && maps.numel() > 0,
                    name, " must be (B, C, H, W) float32 on the CPU in channels-last order, not empty, got ",
                    maps.sizes(), " ", maps.scalar_type());
}

// Sums of x - pivot and of its squares for each channel of one image, in float64 and in one order for any threads.
std::vector<double> sums_of(const float* x, int64_t pixels, int64_t channels) {
  const int64_t pieces = (pixels + kPixels - 1) / kPixels;
  std::vector<double> parts(pieces * 2 * channels), sums(2 * channels);
  share<float>(pieces, 1, 0, [&](int64_t begin, int64_t end, float*) {
    for (int64_t at = begin; at < end; ++at)
      kernels().channel_sums(x + at * kPixels * channels, std::min(kPixels, pixels - at * kPixels), channels, x,
                             parts.data() + at * 2 * channels);
  });
  for (size_t k = 0; k < parts.size(); ++k) sums[k % sums.size()] += parts[k];
  return sums;
}

}  // namespace

void group_norm_cpu_(at::Tensor& x, int64_t groups, const at::Tensor& weight_, const at::Tensor& bias_, double eps,
                     const std::optional<at::Tensor>& coarse, bool relu) {
  check_maps("x", x, x);
  const int64_t B = x.size(0), C = x.size(1), pixels = x.size(2) * x.size(3);
  TORCH_CHECK_VALUE(groups > 0 && C % groups == 0 && C % kLanes == 0, "channels must be a multiple of groups and of ",
                    kLanes, ", got ", C, " and ", groups);
  for (const at::Tensor* part : {&weight_, &bias_})
    TORCH_CHECK_VALUE(part->scalar_type() == at::kFloat && part->sizes() == at::IntArrayRef({C}),
                      "weight and bias must be (", C, ") float32, got ", part->sizes(), " ", part->scalar_type());
  if (coarse.has_value()) check_maps("coarse", *coarse, x);
  const at::Tensor weight = weight_.contiguous(), bias = bias_.contiguous();
  const at::Tensor affine = x.new_empty({2, B, C});
  float *numbers = x.data_ptr<float>(), *scale = affine.data_ptr<float>(), *shift = scale + B * C;
  const int64_t size = C / groups;
  for (int64_t b = 0; b < B; ++b) {
    const float* image = numbers + b * pixels * C;
    const std::vector<double> sums = sums_of(image, pixels, C);
    for (int64_t first = 0; first < C; first += size) {
      double mean = 0, spread = 0;
      for (int64_t c = first; c < first + size; ++c) mean += (image[c] + sums[c] / pixels) / size;
      for (int64_t c = first; c < first + size; ++c) {
        const double own = sums[c] / pixels, distance = image[c] + own - mean;
        spread += (sums[C + c] / pixels - own * own + distance * distance) / size;
      }
      const double factor = 1 / std::sqrt(spread + eps);
      for (int64_t c = first; c < first + size; ++c) {
        const double own = weight.const_data_ptr<float>()[c] * factor;
        scale[b * C + c] = static_cast<float>(own);
        shift[b * C + c] = static_cast<float>(bias.const_data_ptr<float>()[c] - mean * own);
      }
    }
  }
  cpu::Maps added = {};
  if (coarse.has_value()) added = {coarse->const_data_ptr<float>(), coarse->size(2), coarse->size(3)};
  const cpu::MapRows problem = {numbers, x.size(2), x.size(3), C, scale, shift, added, relu};
  share<float>(B * x.size(2), 1 + kPixels / x.size(3), 0,
               [&](int64_t begin, int64_t end, float*) { kernels().map_rows(problem, begin, end); });
}

}  // namespace mask2former

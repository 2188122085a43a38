// Tensors in, tensors out; the arithmetic is in points_kernel.h.
#include "../points.h"

#include <c10/util/Exception.h>

#include <limits>
#include <vector>

#include "points.h"
#include "processor.h"
#include "share.h"

namespace mask2former {
namespace {

using cpu::PointKernels;
using cpu::PointRow;

PointKernels choose_kernels() {
#if defined(__x86_64__)
  if (capability() == "AVX512") return cpu::point_kernels_avx512();
  if (capability() == "AVX2") return cpu::point_kernels_avx2();
#endif
  return cpu::point_kernels_default();
}

void check_cells(const at::Tensor& maps) {
  TORCH_CHECK_VALUE((maps.size(1) + 2) * (maps.size(2) + 2) <= std::numeric_limits<int32_t>::max(),
                    "mask_logits must have fewer than 2^31 cells a map, got ", maps.sizes());
}

// Python has checked all this with better words; here it keeps direct calls of torch.ops from reading wild memory.
void check_maps(const at::Tensor& mask_logits, const at::Tensor& points) {
  TORCH_CHECK_VALUE(mask_logits.dim() == 3 && points.dim() == 3 && points.size(2) == 2 &&
                        points.size(0) == mask_logits.size(0),
                    "mask_logits (T, h, w) and points (T, P, 2) must agree, got ", mask_logits.sizes(), " and ",
                    points.sizes());
  TORCH_CHECK_VALUE(mask_logits.scalar_type() == at::kFloat && points.scalar_type() == at::kFloat,
                    "mask_logits and points must be float32, got ", mask_logits.scalar_type(), " and ",
                    points.scalar_type());
  check_cells(mask_logits);
}

// The rows of a call, and what they point into.
class Rows {
 public:
  Rows(const at::Tensor& mask_logits, const at::Tensor& points, at::TensorList masks, at::IntArrayRef counts,
       const at::Tensor& index, at::IntArrayRef canvas)
      : logits_(mask_logits.contiguous()), points_(points.contiguous()) {
    check_maps(mask_logits, points);
    const int64_t rows = size();
    TORCH_CHECK_VALUE(canvas.size() == 2, "canvas must be (height, width), got ", canvas);
    TORCH_CHECK_VALUE(index.scalar_type() == at::kLong && index.dim() == 1 && index.size(0) == rows,
                      "index must be (T,) int64, got ", index.sizes(), " ", index.scalar_type());
    TORCH_CHECK_VALUE(counts.size() == masks.size(), "counts must have an entry an image, got ", counts);
    for (const at::Tensor& mask : masks) {
      TORCH_CHECK_VALUE(mask.dim() == 3 && (mask.scalar_type() == at::kBool || mask.scalar_type() == at::kByte),
                        "masks must be (N, H, W) bool or uint8, got ", mask.sizes(), " ", mask.scalar_type());
      TORCH_CHECK_VALUE(mask.size(1) * mask.size(2) <= std::numeric_limits<int32_t>::max(),
                        "masks must have fewer than 2^31 pixels each, got ", mask.sizes());
      masks_.push_back(mask.contiguous());
    }
    const at::Tensor indices = index.contiguous();
    for (size_t b = 0; b < counts.size(); ++b)
      for (int64_t k = 0; k < counts[b]; ++k) {
        const int64_t t = static_cast<int64_t>(rows_.size());
        TORCH_CHECK_VALUE(t < rows, "counts must add up to T = ", rows, ", got ", counts);
        rows_.push_back(row(t, masks_[b], indices.const_data_ptr<int64_t>()[t], canvas));
      }
    TORCH_CHECK_VALUE(static_cast<int64_t>(rows_.size()) == rows, "counts must add up to T = ", rows, ", got ", counts);
  }

  int64_t size() const { return logits_.size(0); }
  int64_t height() const { return logits_.size(1); }
  int64_t width() const { return logits_.size(2); }
  const PointRow& operator[](int64_t t) const { return rows_[t]; }

 private:
  PointRow row(int64_t t, const at::Tensor& masks, int64_t n, at::IntArrayRef canvas) const {
    TORCH_CHECK_VALUE(n >= 0 && n < masks.size(0) && masks.numel() > 0,
                      "index must name masks that are there and not empty, got ", n, " of ", masks.sizes());
    const int64_t height = masks.size(1), width = masks.size(2);
    return {logits_.const_data_ptr<float>() + t * this->height() * this->width(),
            this->height(),
            this->width(),
            static_cast<const uint8_t*>(masks.const_data_ptr()) + n * height * width,
            height,
            width,
            static_cast<float>(canvas[0]),
            static_cast<float>(canvas[1]),
            points_.const_data_ptr<float>() + 2 * t * points_.size(1),
            points_.size(1)};
  }

  at::Tensor logits_, points_;
  std::vector<at::Tensor> masks_;
  std::vector<PointRow> rows_;
};

// function(t, scratch) for each of the rows; rows write to different places.
template <typename Function>
void for_rows(int64_t rows, int64_t scratch_floats, Function function) {
  share<float>(rows, 1, scratch_floats, [&](int64_t begin, int64_t end, float* scratch) {
    for (int64_t t = begin; t < end; ++t) function(t, scratch);
  });
}

}  // namespace

at::Tensor uncertain_points_cpu(const at::Tensor& mask_logits, const at::Tensor& candidates, int64_t count) {
  check_maps(mask_logits, candidates);
  const at::Tensor maps = mask_logits.contiguous(), from = candidates.contiguous();
  const int64_t rows = maps.size(0), height = maps.size(1), width = maps.size(2), number = from.size(1);
  TORCH_CHECK_VALUE(count >= 0 && count <= number, "count must be from 0 to the number of candidates ", number,
                    ", got ", count);
  at::Tensor output = from.new_empty({rows, count, 2});
  if (output.numel() == 0) return output;
  const PointKernels kernels = choose_kernels();
  const float *map = maps.const_data_ptr<float>(), *points = from.const_data_ptr<float>();
  float* chosen = output.data_ptr<float>();
  for_rows(rows, kernels.candidate_floats(height, width, number), [&](int64_t t, float* scratch) {
    kernels.uncertain(map + t * height * width, height, width, points + 2 * t * number, {}, number, count,
                      chosen + 2 * t * count, scratch);
  });
  return output;
}

at::Tensor drawn_points_cpu(const at::Tensor& mask_logits, int64_t seed, int64_t candidates, int64_t uncertain,
                            int64_t others) {
  TORCH_CHECK_VALUE(mask_logits.dim() == 3 && mask_logits.scalar_type() == at::kFloat,
                    "mask_logits must be (T, h, w) float32, got ", mask_logits.sizes(), " ", mask_logits.scalar_type());
  check_cells(mask_logits);
  TORCH_CHECK_VALUE(uncertain >= 0 && uncertain <= candidates && others >= 0,
                    "candidates must be at least uncertain, and no number negative, got ", candidates, ", ", uncertain,
                    " and ", others);
  const at::Tensor maps = mask_logits.contiguous();
  const int64_t rows = maps.size(0), height = maps.size(1), width = maps.size(2), count = uncertain + others;
  at::Tensor output = maps.new_empty({rows, count, 2});
  if (output.numel() == 0) return output;
  const PointKernels kernels = choose_kernels();
  const float* map = maps.const_data_ptr<float>();
  float* points = output.data_ptr<float>();
  for_rows(rows, kernels.candidate_floats(height, width, candidates), [&](int64_t t, float* scratch) {
    cpu::PointStream stream{static_cast<uint64_t>(seed), static_cast<uint32_t>(t), 0};
    float* row = points + 2 * t * count;
    if (uncertain > 0)
      kernels.uncertain(map + t * height * width, height, width, nullptr, stream, candidates, uncertain, row, scratch);
    stream.use = 1;
    kernels.draw(stream, others, row + 2 * uncertain);
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mask_loss_sums_cpu(const at::Tensor& mask_logits,
                                                                  const at::Tensor& points, at::TensorList masks,
                                                                  at::IntArrayRef counts, const at::Tensor& index,
                                                                  at::IntArrayRef canvas) {
  const Rows rows(mask_logits, points, masks, counts, index, canvas);
  const int64_t number = points.size(1);
  at::Tensor sums = mask_logits.new_empty({rows.size(), cpu::kPointSums});
  at::Tensor probability = mask_logits.new_empty({rows.size(), number});
  at::Tensor target = probability.new_empty(probability.sizes());
  const PointKernels kernels = choose_kernels();
  float *output = sums.data_ptr<float>(), *p = probability.data_ptr<float>(), *t = target.data_ptr<float>();
  for_rows(rows.size(), kernels.map_floats(rows.height(), rows.width()), [&](int64_t row, float* scratch) {
    kernels.loss_sums(rows[row], output + row * cpu::kPointSums, p + row * number, t + row * number, scratch);
  });
  return {sums, probability, target};
}

at::Tensor mask_loss_sums_backward_cpu(const at::Tensor& grad_sums, const at::Tensor& probability_,
                                       const at::Tensor& target_, const at::Tensor& points_, at::IntArrayRef size) {
  TORCH_CHECK_VALUE(points_.dim() == 3 && points_.size(2) == 2 && size.size() == 2,
                    "points must be (T, P, 2) and size (h, w), got ", points_.sizes(), " and ", size);
  const int64_t rows = points_.size(0), count = points_.size(1), height = size[0], width = size[1];
  TORCH_CHECK_VALUE(grad_sums.sizes() == at::IntArrayRef({rows, cpu::kPointSums}) &&
                        probability_.sizes() == at::IntArrayRef({rows, count}) &&
                        target_.sizes() == probability_.sizes(),
                    "grad_sums (T, 4), probability and target (T, P) must agree with points ", points_.sizes(),
                    ", got ", grad_sums.sizes(), ", ", probability_.sizes(), " and ", target_.sizes());
  const at::Tensor gradients = grad_sums.contiguous(), probability = probability_.contiguous();
  const at::Tensor target = target_.contiguous(), points = points_.contiguous();
  at::Tensor grad_logits = points.new_empty({rows, height, width});
  const PointKernels kernels = choose_kernels();
  const float *gradient = gradients.const_data_ptr<float>(), *p = probability.const_data_ptr<float>();
  const float *t = target.const_data_ptr<float>(), *where = points.const_data_ptr<float>();
  float* output = grad_logits.data_ptr<float>();
  for_rows(rows, kernels.map_floats(height, width), [&](int64_t row, float* scratch) {
    kernels.loss_gradient(gradient + row * cpu::kPointSums, p + row * count, t + row * count, where + 2 * row * count,
                          count, height, width, output + row * height * width, scratch);
  });
  return grad_logits;
}

std::tuple<at::Tensor, at::Tensor> sigmoid_and_softplus_sum_cpu(const at::Tensor& logits_) {
  TORCH_CHECK_VALUE(logits_.dim() > 0 && logits_.scalar_type() == at::kFloat,
                    "logits must be float32 with at least one dimension, got ", logits_.sizes(), " ",
                    logits_.scalar_type());
  const at::Tensor logits = logits_.contiguous();
  const int64_t count = logits.size(-1);
  at::Tensor probability = logits.new_empty(logits.sizes());
  at::Tensor sums = logits.new_empty(logits.sizes().slice(0, logits.dim() - 1));
  const PointKernels kernels = choose_kernels();
  const float* x = logits.const_data_ptr<float>();
  float *p = probability.data_ptr<float>(), *sum = sums.data_ptr<float>();
  for_rows(sums.numel(), 0, [&](int64_t t, float*) { sum[t] = kernels.sigmoid(x + t * count, count, p + t * count); });
  return {probability, sums};
}

}  // namespace mask2former

// What the CPU kernels of random points work on: plain data, for the reason that problem.h gives.
#pragma once

#include <cstdint>

namespace mask2former::cpu {

// One row of mask_loss_sums: a map of logits and a binary mask at the same points.
struct PointRow {
  const float* logits;  // (height, width) of the whole canvas
  int64_t height, width;
  const uint8_t* mask;  // (mask_height, mask_width), not empty; the canvas's upper left part
  int64_t mask_height, mask_width;
  float canvas_height, canvas_width;
  const float* points;  // (count, 2)
  int64_t count;
};

// Which random points: of one row, for one use.
struct PointStream {
  uint64_t seed;
  uint32_t row, use;
};

constexpr int64_t kPointSums = 4;  // of a row: softplus(x) - x t; p t; p; t

struct PointKernels {
  // Floats of scratch memory that a map, or `count` candidates of it, need.
  int64_t (*map_floats)(int64_t height, int64_t width);
  int64_t (*candidate_floats)(int64_t height, int64_t width, int64_t count);
  // The `kept` (at least one) of `count` candidates where the map is closest to zero; null: those of the stream.
  void (*uncertain)(const float* map, int64_t height, int64_t width, const float* candidates, PointStream stream,
                    int64_t count, int64_t kept, float* output, float* scratch);
  void (*draw)(const PointStream& stream, int64_t count, float* points);
  // `probability` and `target` are those of each point.
  void (*loss_sums)(const PointRow& row, float* sums, float* probability, float* target, float* scratch);
  // From the gradient of the sums that of the logits (height, width), which is written whole.
  void (*loss_gradient)(const float* gradient, const float* probability, const float* target, const float* points,
                        int64_t count, int64_t height, int64_t width, float* grad_logits, float* scratch);
  // sigmoid(x), and the sum of softplus(x).
  float (*sigmoid)(const float* x, int64_t count, float* probability);
};

PointKernels point_kernels_default();
#if defined(__x86_64__)
PointKernels point_kernels_avx2();
PointKernels point_kernels_avx512();
#endif

}  // namespace mask2former::cpu

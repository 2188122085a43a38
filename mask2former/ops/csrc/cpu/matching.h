// What the CPU kernels of the matching cost work on: plain data, for the reason that problem.h gives.
#pragma once

#include <cstdint>

#include "points.h"

namespace mask2former::cpu {

// Some predictions of one image, with all its masks.
struct MatchingGroup {
  const float* embeddings;  // (rows, C)
  const float* features;    // (tiles, C, tile_points), zeros behind the last point
  const float* targets;     // (tiles, N, tile_points), likewise
  int64_t rows, channels, masks, count;
  float *softplus, *predicted;  // (rows)
  float *inner, *overlap;       // (rows, N)
};

struct MatchingKernels {
  int64_t (*tile_points)();
  int64_t (*map_floats)(int64_t height, int64_t width);  // of scratch memory that `read_channel` needs
  void (*read_channel)(const float* map, int64_t height, int64_t width, const float* points, int64_t count,
                       int64_t channels, float* panels, float* scratch);
  float (*read_mask)(const PointRow& mask, int64_t masks, float* panels);
  int64_t (*group_bytes)(int64_t rows, int64_t channels, int64_t masks);  // of memory that `pair_sums` needs
  void (*pair_sums)(const MatchingGroup& group, char* block);
};

MatchingKernels matching_kernels_default();
#if defined(__x86_64__)
MatchingKernels matching_kernels_avx2();
MatchingKernels matching_kernels_avx512();
#endif

}  // namespace mask2former::cpu

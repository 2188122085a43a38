// What the CPU kernels of group normalisation work on: plain data, for the reason that problem.h gives.
#pragma once

#include <cstdint>

namespace mask2former::cpu {

// Maps of the same number of channels, pixel by pixel.
struct Maps {
  const float* first;
  int64_t height, width;
};

// Rows of maps (B, height, width, C), in place: x * scale + shift, one of each for an image and channel, plus the coarse
// map (B, h, w, C) resized bilinearly unless it is null, then a ReLU if wanted.
struct MapRows {
  float* x;
  int64_t height, width, channels;
  const float *scale, *shift;  // (B, C)
  Maps coarse;
  bool relu;
};

struct GroupNormKernels {
  // Adds to sums (2, C) those of x - pivot and of its squares, x of `count` pixels.
  void (*channel_sums)(const float* x, int64_t count, int64_t channels, const float* pivot, double* sums);
  void (*map_rows)(const MapRows& problem, int64_t begin, int64_t end);  // tasks are rows of all images
};

#if defined(__x86_64__)
GroupNormKernels group_norm_kernels_avx2();
#endif

}  // namespace mask2former::cpu

// What the CPU kernels of post-processing work on: plain data, for the reason that problem.h gives.
#pragma once

#include <cstdint>

namespace mask2former::cpu {

// Where the places along an axis of a result come from: two places of the source, and their weights.
struct Axis {
  const int64_t *first, *second;
  const float *first_weight, *second_weight;
  int64_t size;  // of the result; without places (null) the axis is copied
};

// Bilinear resize of maps: columns, then rows.
struct Blend {
  const float* maps;
  int64_t map_step, row_step;  // in floats; the numbers of a row lie side by side
  int64_t height, width;       // of a map
  Axis rows, columns;
  float* out;  // (maps, rows.size, columns.size)
};

// Of each pixel, the sum over queries of its mask probability times the query's class probabilities, for each class.
struct ClassScores {
  const float* logits;  // (Q, pixels), `step` numbers apart
  int64_t step, Q, K, pixels;
  const float* probability;  // (K, Q), and rows of zeros up to whole `kClassRows`
  float* scores;             // (K, pixels), or null
  int32_t* labels;           // (pixels): the first class with the largest score, as of `largest`; or null
};

constexpr int64_t kClassRows = 6;
constexpr int64_t kClassPixels = 64;  // a task; fewer at the end

// Binary masks where logits are positive, and what is known of them.
struct Inside {
  const float* logits;  // (N, height, width)
  int64_t height, width;
  uint8_t *masks, *columns, *rows;  // (N, height, width); (N, width) and (N, height): where the mask has pixels
  int64_t* areas;                   // (N)
  float* sums;                      // (N), of the probabilities inside; no number if a logit is none
};

struct PixelKernels {
  int64_t (*blend_scratch)(const Blend& problem);
  void (*blend)(const Blend& problem, int64_t begin, int64_t end, float* scratch);  // maps
  // Of each of the pixels [begin, end) the largest of `count` scores, `step` floats apart, and the first place that has
  // it. Where one is no number, that and the last place.
  void (*largest)(const float* scores, int64_t count, int64_t step, int64_t begin, int64_t end, float* values,
                  int64_t* places);
  int64_t (*class_scratch)(const ClassScores& problem);
  void (*class_scores)(const ClassScores& problem, int64_t begin, int64_t end, float* scratch);
  void (*inside)(const Inside& problem, int64_t begin, int64_t end);  // masks
};

#if defined(__x86_64__)
PixelKernels pixel_kernels_avx2();
PixelKernels pixel_kernels_avx512();
#endif

}  // namespace mask2former::cpu
